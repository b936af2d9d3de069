#include "device/emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves what the ABI lets a callee not change, exchanges the stack pointers, restores. The new stack of
// a fiber is laid out as if it had saved nothing but the address of almostgpt_fiber_start, which tells
// unwinders that nobody called it.
extern "C" void almostgpt_fiber_switch(void** save_stack_pointer, void* load_stack_pointer);
extern "C" void almostgpt_fiber_start();

#if defined(__x86_64__)
asm(R"(
.text
.globl almostgpt_fiber_switch
.type almostgpt_fiber_switch,@function
almostgpt_fiber_switch:
  .cfi_startproc
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
  .cfi_endproc
.size almostgpt_fiber_switch,.-almostgpt_fiber_switch
.globl almostgpt_fiber_start
.type almostgpt_fiber_start,@function
almostgpt_fiber_start:
  .cfi_startproc
  .cfi_undefined rip
  call almostgpt_fiber_main
  ud2
  .cfi_endproc
.size almostgpt_fiber_start,.-almostgpt_fiber_start
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl almostgpt_fiber_switch
.type almostgpt_fiber_switch,%function
almostgpt_fiber_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0];  stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]; stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8,  d9,  [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0];  ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]; ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8,  d9,  [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size almostgpt_fiber_switch,.-almostgpt_fiber_switch
.globl almostgpt_fiber_start
.type almostgpt_fiber_start,%function
almostgpt_fiber_start:
  .cfi_startproc
  .cfi_undefined x30
  bl almostgpt_fiber_main
  brk #0
  .cfi_endproc
.size almostgpt_fiber_start,.-almostgpt_fiber_start
)");
#else
#error "the emulator runs on x86-64 and aarch64; another machine needs its almostgpt_fiber_switch here"
#endif

namespace almostgpt::emulator {
namespace {

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer must be told of every stack; the host's is learnt when a fiber is entered from it.
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
bool entered_from_host = false;
#endif

}  // namespace

void Fiber::prepare(char* stack, int number) {
  stack_ = stack;
  fake_stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, Stacks::kBytes);  // frames of an abandoned fiber never returned
#endif
  auto top = reinterpret_cast<uintptr_t>(stack + Stacks::kBytes - 64 - number % 32 * 192);
  void** frame = reinterpret_cast<void**>(top & ~uintptr_t{15});
#if defined(__x86_64__)
  frame -= 9;  // six registers, the address to return to, and the alignment that a call would leave
  std::memset(frame, 0, 9 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(almostgpt_fiber_start);
#else
  frame -= 20;
  std::memset(frame, 0, 20 * sizeof(void*));
  frame[11] = reinterpret_cast<void*>(almostgpt_fiber_start);  // x30
#endif
  stack_pointer_ = frame;
}

void Fiber::switch_between(Fiber& from, Fiber& to, bool ends) {
#if defined(__SANITIZE_ADDRESS__)
  entered_from_host = from.stack_ == nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack_, to.stack_ ? to.stack_ : host_stack,
                                 to.stack_ ? Stacks::kBytes : host_stack_bytes);
#else
  (void)ends;
#endif
  almostgpt_fiber_switch(&from.stack_pointer_, to.stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void fiber_entered() {
#if defined(__SANITIZE_ADDRESS__)
  if (entered_from_host) __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
  else __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

char* Stacks::operator[](size_t number) {
  while (warps_.size() * 32 <= number) {
    void* memory = mmap(nullptr, kOfWarp, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    // A guard page is a mapping of its own, of which Linux gives a process 65530: after the first
    // 16384 stacks only one in 32 has one.
    const size_t guards = warps_.size() < 16384 / 32 ? 32 : 1;
    for (size_t i = 0; i < guards; ++i) mprotect(static_cast<char*>(memory) + i * (kGuard + kBytes), kGuard, PROT_NONE);
    warps_.push_back(static_cast<char*>(memory));
  }
  return warps_[number / 32] + number % 32 * (kGuard + kBytes) + kGuard;
}

void Stacks::keep(size_t count) {
  while (warps_.size() * 32 > count) {
    munmap(warps_.back(), kOfWarp);
    warps_.pop_back();
  }
}

Stacks::~Stacks() { keep(0); }

}  // namespace almostgpt::emulator
