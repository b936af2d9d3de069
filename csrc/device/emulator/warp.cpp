// Operations of a warp.
#include <cstring>

#include "device/emulator/faults.h"
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {
namespace {

const Fault warp_sync_fault("warp_sync", {"drop"});

Collective& join_collective(Warp& warp, const char* name, uint32_t mask, int lane, Location at) {
  Collective* unused = nullptr;
  for (Collective& open : warp.collectives) {
    if (!open.arrived) {
      if (!unused) unused = &open;
      continue;
    }
    if (!(open.mask & mask)) continue;
    if (open.mask != mask || open.at != at || std::strcmp(open.name, name))
      fail("divergence", at,
           format("lane %d calls %s (mask 0x%08x) while lanes 0x%08x wait in %s at %s (mask 0x%08x)", lane, name, mask,
                  open.arrived, open.name, text(open.at).c_str(), open.mask));
    return open;
  }
  // Four masks without a common lane at a time are what the emulator has room for.
  if (!unused) fail("divergence", at, format("%s: four other groups of lanes of the warp wait for each other", name));
  unused->name = name;
  unused->mask = mask;
  unused->at = at;
  for (void*& argument : unused->arguments) argument = nullptr;
  return *unused;
}

}  // namespace

void collective(const char* name, void* arguments, uint32_t mask, Together together, Location at) {
  const int lane = current->lane;
  Warp& warp = *current->warp;
  if (!(mask >> lane & 1))
    fail("divergence", at, format("%s: lane %d calls, which is not in the mask 0x%08x", name, lane, mask));
  if (mask & ~warp.alive)
    fail("divergence", at, format("%s: lanes 0x%08x of the mask have returned, or do not exist", name, mask & ~warp.alive));
  Collective& group = join_collective(warp, name, mask, lane, at);
  group.arguments[lane] = arguments;
  group.arrived |= 1u << lane;
  if (group.arrived != mask) {
    wait(name, at);
    return;
  }
  if (mask == warp.alive) lanes_are_together(warp);
  together(group.arguments, mask, at);
  group.arrived = 0;
  make_ready(warp, mask);
}

void warp_sync(uint32_t mask, Location at) {
  if (warp_sync_fault.at(at) == Mutation::drop) return;
  collective("warp_sync", nullptr, mask, [](void**, uint32_t lanes, Location) {
    Thread* first = &current->block->threads[current->warp->id * 32];
    Arrivals arrivals;
    for (uint32_t rest = lanes; rest; rest &= rest - 1) release(first[__builtin_ctz(rest)], arrivals);
    for (uint32_t rest = lanes; rest; rest &= rest - 1) first[__builtin_ctz(rest)].known = arrivals.joined();
  }, at);
}

}  // namespace almostgpt::emulator
