#include "dispatch.h"

#include <atomic>

#ifdef UPG_HAVE_X86_KERNELS
#include <cpuid.h>
#endif

namespace upg {
namespace {

#ifdef UPG_HAVE_X86_KERNELS
// Not every compiler's __builtin_cpu_supports knows it.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<const Kernels*> find_usable_kernels() {
  std::vector<const Kernels*> usable;
#ifdef UPG_HAVE_X86_KERNELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vbmi2 = avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
  if (vbmi2) usable.push_back(&kAvx512Vbmi2Kernels);
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
