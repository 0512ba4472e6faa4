// Which instruction set's kernels this processor runs.
#include <cstring>

#include "job.h"

namespace truenorm {

extern const Kernels baseline;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
extern const Kernels v3, v4;
#define X86
#endif

const Kernels* find_kernels(const char* name) {
  auto wanted = [name](const Kernels& k) { return !name || !*name || !std::strcmp(name, k.name); };
#ifdef X86
  __builtin_cpu_init();
  if (wanted(v4) && __builtin_cpu_supports("x86-64-v4")) return &v4;
  if (wanted(v3) && __builtin_cpu_supports("x86-64-v3")) return &v3;
#endif
  return wanted(baseline) ? &baseline : nullptr;
}

}  // namespace truenorm
