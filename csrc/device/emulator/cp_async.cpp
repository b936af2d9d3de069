// cp.async: copies of 4 or 16 bytes that a thread starts, groups and waits for.
#include <cstring>

#include "device/emulator/faults.h"
#include "device/emulator/global_memory.h"
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"
#include "device/emulator/shared_memory.h"

namespace almostgpt::emulator {
namespace {

const Fault commit_fault("cp_async_commit", {"drop"});
const Fault wait_fault("cp_async_wait", {"drop", "lax"});

void move(Block& block, AsyncCopy& copy) {
  unsigned char* to = block.at(copy.to);
  std::memcpy(to, copy.from, copy.bytes);
  std::memset(to + copy.bytes, 0, copy.size - copy.bytes);
  copy.done = true;
}

}  // namespace

void cp_async(uint32_t to, const void* from, uint32_t size, bool valid, Location at) {
  preempt();
  Thread& me = *current;
  Block& block = *me.block;
  check_shared_bounds(block, to, size, "cp.async", at);
  check_shared_alignment(to, size, "cp.async", at);
  if (valid) {
    check_global(me.actor(), from, size, size, Access::load, "cp.async", at);
    count_access(*me.warp, me.lane, at, false, false, reinterpret_cast<uintptr_t>(from), size);
  } else {
    check_alignment(from, size, "cp.async", at);  // PTX allows no other address, even where nothing is read
  }
  check_shared_write(block, to, size, me.actor(), at, InFlight::cp_async);
  // Where nothing is read the pointer may be null, which memcpy must not be given.
  static const unsigned char nothing[16] = {};
  AsyncCopy copy{to, valid ? from : nothing, size, valid ? size : 0u, me.copy_group, false};
  if (happens_early()) move(block, copy);
  me.copies.push_back(copy);
}

void cp_async_commit(Location at) {
  if (commit_fault.at(at) == Mutation::drop) return;
  ++current->copy_group;
}

void cp_async_wait(int newest, Location at) {
  const Mutation mutation = wait_fault.at(at);
  if (mutation == Mutation::drop) return;
  if (mutation == Mutation::lax) ++newest;
  Thread& me = *current;
  size_t complete = 0;
  while (complete < me.copies.size() && me.copies[complete].group < me.copy_group - newest) {
    AsyncCopy& copy = me.copies[complete++];
    if (!copy.done) move(*me.block, copy);
    arrived_in_shared(*me.block, copy.to, copy.size, me.time);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + complete);
}

}  // namespace almostgpt::emulator
