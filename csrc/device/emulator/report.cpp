#include "device/emulator/report.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "device/emulator/block.h"
#include "device/emulator/launch.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {
namespace {

struct Advice {
  const char* kind;
  const char* text;
};

constexpr Advice kAdvice[] = {
    {"race", "put a barrier (cta_sync, bar_sync or, within a warp, warp_sync) between the two; shuffles order no memory"},
    {"uninitialised", "write it first (memory is not zero when a kernel starts); if another thread does, put a barrier between"},
    {"in-flight", "wait for the copy (cp_async_commit and cp_async_wait, or mbar_wait), then put a barrier, before touching it"},
    {"out-of-bounds", "guard the access with the size of the tensor, or ask for more shared memory at launch"},
    {"misaligned", "use a narrower access, or make the address a multiple of the width of this one"},
    {"proxy", "call fence_proxy_async in the threads that made the plain access, then a barrier, before TMA or wgmma goes there"},
    {"divergence", "have every lane of the mask reach the same call, or shrink the mask"},
    {"deadlock", "look for the arrival that is missing: a branch around a barrier, a wrong count, parity or number of bytes"},
    {"barrier", "use one barrier number for one group of threads, with the same count in every call"},
    {"mbarrier", "call mbar_init once, in one thread, with the number of arrivals of a phase, and leave its 8 bytes alone"},
    {"wgmma", "call wgmma_fence before the products, and leave their registers alone until the wgmma_wait that covers them"},
    {"tma", "hand over a map made by make_tensor_map, with one coordinate for each of its dimensions"},
    {"tensor-map", "make the tensor fit the rules of cuTensorMapEncodeTiled (sm90.cuh, make_tensor_map)"},
    {"launch", "ask for less, or plan the launch with current_card"},
    {"capability", "call it from a kernel for sm_90a only, and choose the kernel by current_card"},
    {"registers", "let setmaxnreg_dec of one warpgroup release what setmaxnreg_inc of another takes; all its four warps call"},
    {"read-only", "load with Cache::normal what is written by the same kernel"},
    {"input-written", "write to an output of the op, or name the buffer Use::input_output"},
    {"exit", "wait for everything that the thread has started (tma_wait_read, wgmma_wait, mbar_wait) before it returns"},
    {"session", "open a Session, and name every buffer, before launching"},
    {"card", "use 8.0, 8.6, 8.9, 9.0, 10.0 or 12.0"},
};

const char* advice_for(const std::string& kind) {
  for (const Advice& advice : kAdvice)
    if (kind == advice.kind) return advice.text;
  return "see docs/emulator.md";
}

}  // namespace

std::string format(const char* pattern, ...) {
  va_list arguments, again;
  va_start(arguments, pattern);
  va_copy(again, arguments);
  std::string result(std::vsnprintf(nullptr, 0, pattern, arguments), '\0');
  std::vsnprintf(result.data(), result.size() + 1, pattern, again);
  va_end(again);
  va_end(arguments);
  return result;
}

void fail(const char* kind, Location at, const std::string& what, const char* advice) {
  std::string message = std::string(kind) + ": " + what;
  if (at.line != 0) message += "\n  at " + text(at);
  if (running) message += "\n  in kernel " + running->kernel;
  if (current) {
    const Dim3& block = current->block->where;
    message += format(", block (%u, %u, %u), %s", block.x, block.y, block.z,
                      current->block->name_of(current->id).c_str());
  }
  message += std::string("\n  what to do: ") + (advice ? advice : advice_for(kind));
  if (options().abort) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::abort();
  }
  throw Error(kind, message);
}

}  // namespace almostgpt::emulator
