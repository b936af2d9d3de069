// What must be done when a thread returns.
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {

void thread_exits(Thread& thread) {
  Warp& warp = *thread.warp;
  stores_at_exit(thread);
  wgmma_at_exit(warp);
  for (const Collective& open : warp.collectives)
    if (open.arrived && (open.mask >> thread.lane & 1))
      fail("divergence", open.at, format("lane %d returns while lanes 0x%08x wait for it in %s", thread.lane,
                                         open.arrived, open.name));
  const bool last_of_warp = warp.alive == 1u << thread.lane;
  if (!last_of_warp) return;
  registers_at_exit(warp);
  lanes_are_together(warp);
}

}  // namespace almostgpt::emulator
