// Which instruction set runs: decided once, by asking the processor.
#include <cstring>

#include "kernels.h"

namespace nexus::cpu {

namespace baseline {
extern const Kernels kernels;
}
#ifdef NEXUS_X86
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

const Kernels* kernels(const char* instruction_set) {
#ifdef NEXUS_X86
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512dq");
  const struct {
    const Kernels* kernels;
    bool available;
  } sets[] = {{&avx512::kernels, has_avx512}, {&avx2::kernels, has_avx2}, {&baseline::kernels, true}};
#else
  const struct {
    const Kernels* kernels;
    bool available;
  } sets[] = {{&baseline::kernels, true}};
#endif
  for (const auto& set : sets) {
    const bool wanted = instruction_set == nullptr || !strcmp(instruction_set, set.kernels->instruction_set);
    if (set.available && wanted) {
      return set.kernels;
    }
  }
  return nullptr;
}

}  // namespace nexus::cpu
