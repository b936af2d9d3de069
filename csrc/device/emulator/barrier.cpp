// Barriers of the block: bar.sync and bar.arrive.
#include "device/emulator/faults.h"
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {
namespace {

const Fault cta_sync_fault("cta_sync", {"drop"});
const Fault bar_sync_fault("bar_sync", {"drop"});
const Fault bar_arrive_fault("bar_arrive", {"drop"});

void complete(Block& block, Barrier& barrier) {
  const ClockRef& joined = barrier.arrivals.joined();
  for (Warp& warp : block.warps) {
    uint32_t& waiting = barrier.waiting[warp.id];
    for (uint32_t rest = waiting; rest; rest &= rest - 1)
      block.threads[32 * warp.id + __builtin_ctz(rest)].known = joined;
    make_ready(warp, waiting);
    waiting = 0;
  }
}

void arrive(int number, int count, bool waits, Location at) {
  Thread& me = *current;
  Block& block = *me.block;
  Barrier& barrier = block.barriers[number];
  if (barrier.arrived == 0) barrier.expected = count;
  else if (barrier.expected != count)
    fail("barrier", at, format("barrier %d is used with %d threads here and with %d at %s", number, count,
                               barrier.expected, text(barrier.at).c_str()));
  const Location& of_warp = barrier.waiting_at[me.warp->id];
  if (waits && barrier.waiting[me.warp->id] && !(of_warp == at))
    fail("divergence", at, format("a lane waits at barrier %d here while others of its warp wait there at %s", number,
                                  text(of_warp).c_str()));
  barrier.at = at;
  release(me, barrier.arrivals);
  if (++barrier.arrived < barrier.expected) {
    if (!waits) return;
    uint32_t& waiting = barrier.waiting[me.warp->id];
    waiting |= 1u << me.lane;
    barrier.waiting_at[me.warp->id] = at;
    if (waiting == me.warp->alive) lanes_are_together(*me.warp);
    wait("barrier", at, number);
    return;
  }
  if (waits && ((barrier.waiting[me.warp->id] | 1u << me.lane) == me.warp->alive)) lanes_are_together(*me.warp);
  complete(block, barrier);
  if (waits) me.known = barrier.arrivals.joined();
  barrier.arrivals.reset();
  barrier.arrived = 0;
  preempt();
}

void check_arguments(int number, int count, Location at) {
  if (number < 0 || number > 15) fail("barrier", at, format("barrier %d: there are 0 to 15", number));
  const int most = (current->block->size() + 31) / 32 * 32;
  if (count <= 0 || count % 32 || count > most)
    fail("barrier", at, format("barrier %d: %d threads; must be a multiple of 32, from 32 up to the %d of the block",
                               number, count, most));
}

}  // namespace

// Who waits cannot return; but arrivals that nobody waited for would be of the next who uses the barrier.
void barriers_at_exit(const Block& block) {
  for (const Barrier& barrier : block.barriers)
    if (barrier.arrived)
      fail("exit", barrier.at, format("the block ends when %d of %d threads have arrived at a barrier and nobody waits there",
                                      barrier.arrived, barrier.expected),
           "let as many threads wait as the last bar_arrive counts on");
}

void cta_sync(Location at) {
  if (cta_sync_fault.at(at) == Mutation::drop) return;
  arrive(0, current->block->size(), true, at);
}

void bar_sync(int barrier, int threads, Location at) {
  if (bar_sync_fault.at(at) == Mutation::drop) return;
  check_arguments(barrier, threads, at);
  arrive(barrier, threads, true, at);
}

void bar_arrive(int barrier, int threads, Location at) {
  if (bar_arrive_fault.at(at) == Mutation::drop) return;
  check_arguments(barrier, threads, at);
  arrive(barrier, threads, false, at);
}

}  // namespace almostgpt::emulator
