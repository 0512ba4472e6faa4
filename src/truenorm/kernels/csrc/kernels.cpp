// The kernels of each instruction set, in one file, and which of them this processor runs.
#include "job.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

namespace truenorm {
namespace {
using std::erf, std::exp, std::expm1, std::log1p, std::tanh;

namespace baseline {
#define BYTES 16
#define HALF 0
#include "vectors.h"
#include "activations.h"
#include "loops.h"
#include "drive.h"
#undef BYTES
#undef HALF
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,movbe,lzcnt,popcnt")
namespace v3 {
#define BYTES 32
#define HALF 1
#include "vectors.h"
#include "activations.h"
#include "loops.h"
#include "drive.h"
#undef BYTES
#undef HALF
}  // namespace v3
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512cd,avx2,fma,f16c,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")
namespace v4 {
#define BYTES 64
#define HALF 2
#include "vectors.h"
#include "activations.h"
#include "loops.h"
#include "drive.h"
#undef BYTES
#undef HALF
}  // namespace v4
#pragma GCC pop_options
#define X86 1
#endif

#define TABLE(isa, name) {name, isa::moments, isa::forward, isa::sums, isa::backward, isa::gradient}
#ifdef X86
const Kernels ALL[] = {TABLE(v4, "x86-64-v4"), TABLE(v3, "x86-64-v3"), TABLE(baseline, "baseline")};
#else
const Kernels ALL[] = {TABLE(baseline, "baseline")};
#endif

bool runs_here(const Kernels& kernels) {
#ifdef X86
  __builtin_cpu_init();
  if (&kernels == &ALL[0]) return __builtin_cpu_supports("x86-64-v4");
  if (&kernels == &ALL[1]) return __builtin_cpu_supports("x86-64-v3");
#endif
  return &kernels == &ALL[sizeof(ALL) / sizeof(*ALL) - 1];
}

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Kernels& kernels : ALL) {
    if (runs_here(kernels) && (!name || !*name || !std::strcmp(name, kernels.name))) return &kernels;
  }
  return nullptr;
}

}  // namespace truenorm
