// Chooses the table of the widest instruction set this machine has; FASTUNET_ISA=baseline|avx2|avx512
// overrides.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fastunet {

namespace baseline {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

const KernelTable* choose() {
  const char* wanted = std::getenv("FASTUNET_ISA");
  const std::string name = wanted == nullptr ? "" : wanted;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (name.empty() || name == "avx512")) return &avx512::table;
  if (has_avx2 && (name.empty() || name == "avx2")) return &avx2::table;
#endif
  if (name.empty() || name == "baseline") return &baseline::table;
  throw std::invalid_argument(
      "FASTUNET_ISA is '" + name +
      "', which this machine or build does not have; expected baseline, avx2 or avx512, or unset");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* const chosen = choose();
  return *chosen;
}

}  // namespace fastunet
