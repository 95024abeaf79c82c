#include "dispatch.h"

#include <atomic>

namespace upg {
namespace {

std::vector<const Kernels*> find_usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef UPG_HAVE_X86_KERNELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) usable.push_back(&kAvx512Kernels);
  if (avx2) usable.push_back(&kAvx2Kernels);
#endif
#ifdef UPG_HAVE_NEON_KERNELS
  usable.push_back(&kNeonKernels);  // every 64-bit ARM has it
#endif
  usable.push_back(&kPortableKernels);
  return usable;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{usable_kernels().front()};
  return kernels;
}

}  // namespace

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> usable = find_usable_kernels();
  return usable;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool choose_kernels(std::string_view name) {
  for (const Kernels* candidate : usable_kernels()) {
    if (name == candidate->name) {
      chosen().store(candidate, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace upg
