// Fibres: stacks that the emulator's lanes run on, and switching between them.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#define MSL_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MSL_ADDRESS_SANITIZER 1
#endif
#endif

#ifdef MSL_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __APPLE__
#define MSL_SYMBOL "_msl_switch"
#define MSL_HIDDEN ".private_extern _msl_switch\n"
#else
#define MSL_SYMBOL "msl_switch"
#define MSL_HIDDEN ".hidden msl_switch\n"
#endif

// Saves the registers that a call preserves on the current stack, its top in *from, and goes on with the stack `to`.
extern "C" __attribute__((visibility("hidden"))) void msl_switch(void** from, void* to);

#if defined(__x86_64__)
asm(".text\n" MSL_HIDDEN MSL_SYMBOL ":\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
#elif defined(__aarch64__)
asm(".text\n.p2align 2\n" MSL_HIDDEN MSL_SYMBOL ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp, #0]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp, #0]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n"
    "  ret\n");
#else
#error "the emulator of metal_ops runs on x86-64 and 64-bit ARM only"
#endif

namespace msl {

#ifdef MSL_ADDRESS_SANITIZER
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif
constexpr size_t kGuard = 64 << 10;  // a multiple of every page size in use

// A stack and where it stopped. One without a stack of its own stands for the thread that the fibres run on.
struct Fibre {
  void* top = nullptr;
  char* memory = nullptr;
  unsigned lane = 0;
  // For the address sanitizer: where the stack lies.
  const void* bottom = nullptr;
  size_t size = 0;
  void* shadow = nullptr;

  Fibre() = default;
  Fibre(const Fibre&) = delete;

  // A fibre that runs `entry`, which never returns. `number` spreads the stacks over the sets of the first-level cache.
  Fibre(void (*entry)(), unsigned number) {
    void* found = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (found == MAP_FAILED) std::abort();
    memory = static_cast<char*>(found);
    mprotect(memory, kGuard, PROT_NONE);
    bottom = memory + kGuard;
    size = kStack;
    void** at = reinterpret_cast<void**>(memory + kGuard + kStack - number % 16 * 256);
#if defined(__x86_64__)
    *--at = nullptr;  // what `entry` would return to; aligns the stack as after a call
    *--at = reinterpret_cast<void*>(entry);
    at -= 6;
    std::memset(at, 0, 6 * sizeof *at);
#else
    at -= 20;
    std::memset(at, 0, 20 * sizeof *at);
    at[11] = reinterpret_cast<void*>(entry);
#endif
    top = at;
  }

  ~Fibre() {
    if (memory) munmap(memory, kGuard + kStack);
  }
};

// What the sanitizer must hear when a fibre goes on running.
inline void arrived(Fibre& self, Fibre* first_from) {
#ifdef MSL_ADDRESS_SANITIZER
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(self.shadow, &bottom, &size);
  if (first_from && !first_from->bottom) {
    first_from->bottom = bottom;
    first_from->size = size;
  }
#else
  (void)self, (void)first_from;
#endif
}

inline void switch_to(Fibre& from, Fibre& to) {
#ifdef MSL_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(&from.shadow, to.bottom, to.size);
#endif
  msl_switch(&from.top, to.top);
  arrived(from, nullptr);
}

}  // namespace msl
