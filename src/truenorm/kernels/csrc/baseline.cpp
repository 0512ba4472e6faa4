// What every processor of the family runs: SSE2 on x86-64, NEON on aarch64.
#define ISA baseline
#define NAME "baseline"
#define BYTES 16
#define HALF 0
#include "isa.h"
