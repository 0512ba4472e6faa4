// x86-64-v3: AVX2, FMA and F16C.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ISA v3
#define NAME "x86-64-v3"
#define BYTES 32
#define HALF 1
#define TARGET _Pragma("GCC target(\"avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt\")")
#include "isa.h"
#endif
