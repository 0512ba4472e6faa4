// x86-64-v4: AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ISA v4
#define NAME "x86-64-v4"
#define BYTES 64
#define HALF 2
#define TARGET \
  _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512\")")
#include "isa.h"
#endif
