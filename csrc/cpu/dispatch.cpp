#include "kernels.h"

#include <cstdlib>
#include <cstring>

namespace zsu {

static const Kernels& choose() {
#if defined(ZSU_HAS_ISA_LEVELS)
  int level = 0;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    level = 1;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      level = 2;
  }
  if (const char* requested = std::getenv("ZSU_FAST_CPU_ISA")) {
    if (!std::strcmp(requested, "baseline")) level = 0;
    else if (!std::strcmp(requested, "avx2") && level > 1) level = 1;
  }
  if (level == 2) return avx512::kernels();
  if (level == 1) return avx2::kernels();
#endif
#if defined(__aarch64__)
  return neon::kernels(); // every aarch64 CPU has NEON
#else
  return baseline::kernels();
#endif
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

} // namespace zsu

// For zsu_fast.doctor(), by ctypes.
extern "C" __attribute__((visibility("default"))) const char* zsu_fast_cpu_isa() {
  return zsu::kernels().name;
}
