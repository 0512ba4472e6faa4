// One instruction set's kernels: a file defines ISA, NAME, BYTES of a vector, HALF, and its target,
// and includes this. All names are the file's own: code for another processor is never shared.
#include <cmath>
#include <cstdint>
#if HALF
#include <immintrin.h>
#endif

#include "job.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

#ifdef TARGET
#pragma GCC push_options
TARGET
#endif
namespace truenorm {
namespace {
using std::erf, std::exp, std::expm1, std::log1p, std::tanh;

#include "vectors.h"
#include "functions.h"
#include "activations.h"
#include "loops.h"
#include "drive.h"

}  // namespace

extern const Kernels ISA;
const Kernels ISA = {NAME, moments, forward, sums, backward, gradient};

}  // namespace truenorm
#ifdef TARGET
#pragma GCC pop_options
#endif
