// Fibers: one CUDA thread each, with a stack of its own; switching between them costs some nanoseconds.
#pragma once

#include <cstddef>
#include <vector>

namespace almostgpt::emulator {

class Fiber {
 public:
  // The next switch to it calls fiber_main() on that stack; the top of stack number n is shifted a
  // little, so that the same frame of all fibers does not fall into one set of the cache.
  void prepare(char* stack, int number);

  // Leaves `from` and goes on in `to`. A fiber that `ends` is not switched to again.
  static void switch_between(Fiber& from, Fiber& to, bool ends = false);

 private:
  friend void fiber_entered();
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;  // null: the host's
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

// Defined by the scheduler; never returns. To be called first in it: fiber_entered.
extern "C" void almostgpt_fiber_main();
void fiber_entered();

// Stacks with a guard page below each, mapped by 32.
class Stacks {
 public:
  static constexpr size_t kGuard = 4096;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kBytes = 1 << 18;
#else
  static constexpr size_t kBytes = 1 << 17;
#endif
  ~Stacks();
  char* operator[](size_t number);
  // Gives back the memory of all but the first ones.
  void keep(size_t count);

 private:
  static constexpr size_t kOfWarp = 32 * (kGuard + kBytes);
  std::vector<char*> warps_;
};

}  // namespace almostgpt::emulator
