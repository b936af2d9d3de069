// setmaxnreg: the warps of a block give and take registers.
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {
namespace {

struct Change {
  int count;
  bool increase;
};

void check(const Block& block, Warp& warp, Change change, Location at) {
  const char* name = change.increase ? "setmaxnreg_inc" : "setmaxnreg_dec";
  if (change.count < 24 || change.count > 256 || change.count % 8)
    fail("registers", at, format("%s<%d>: must be a multiple of 8 from 24 to 256", name, change.count));
  if (block.size() % 128)
    fail("registers", at, format("%s in a block of %d threads, which are not whole warpgroups", name, block.size()));
  if (change.increase ? change.count < warp.registers : change.count > warp.registers)
    fail("registers", at, format("%s<%d> by a warp with %d registers a thread", name, change.count, warp.registers));
}

// All four warps make the same changes in the same order.
void check_warpgroup(Block& block, Warp& warp, Change change, Location at) {
  auto& calls = block.warpgroups[warp.id / 4].register_changes;
  for (int i = warp.id / 4 * 4; i < warp.id / 4 * 4 + 4; ++i)
    if (!block.warps[i].alive && block.warps[i].register_changes <= warp.register_changes)
      fail("registers", at, format("warp %d calls, but warp %d of the same warpgroup has returned without", warp.id, i));
  if (warp.register_changes < calls.size()) {
    const RegisterCall& call = calls[warp.register_changes];
    if (call.count != change.count || call.increase != change.increase || call.at != at)
      fail("registers", at, format("the warps of warpgroup %d do not make the same call: another is at %s", warp.id / 4,
                                   text(call.at).c_str()));
  } else {
    calls.push_back({change.count, change.increase, at});
  }
  ++warp.register_changes;
}

void wake_waiters(Block& block) {
  for (Warp& warp : block.warps)
    if (block.register_waiters >> warp.id & 1) make_ready(warp, warp.alive);
  block.register_waiters = 0;
}

}  // namespace

void registers_at_exit(Warp& warp) {
  const auto& calls = warp.block->warpgroups[warp.id / 4].register_changes;
  if (warp.register_changes < calls.size())
    fail("registers", calls[warp.register_changes].at,
         format("warp %d returns without the setmaxnreg that another warp of its warpgroup has called", warp.id));
}

void setmaxnreg(int count, bool increase, Location at) {
  const device::Card& card = running->limits.card;
  const char* name = increase ? "setmaxnreg_inc" : "setmaxnreg_dec";
  if (card.major != 9)
    fail("capability", at,
         format("%s needs compute capability 9.0 (sm_90a); the card has %d.%d", name, card.major, card.minor));
  Change change{count, increase};
  collective(name, &change, ~0u, [](void** arguments, uint32_t, Location where_called) {
    const Change wanted = *static_cast<Change*>(arguments[0]);
    Block& block = *current->block;
    Warp& warp = *current->warp;
    check(block, warp, wanted, where_called);
    check_warpgroup(block, warp, wanted, where_called);
    if (wanted.increase) return;
    block.free_registers += (warp.registers - wanted.count) * 32;
    warp.registers = wanted.count;
    wake_waiters(block);
  }, at);
  if (!increase) return;
  // The first lane that finds enough takes them for the warp; the others find them taken.
  Block& block = *current->block;
  Warp& warp = *current->warp;
  while (warp.registers != count) {
    const int missing = (count - warp.registers) * 32;
    if (block.free_registers >= missing) {
      block.free_registers -= missing;
      warp.registers = count;
    } else {
      block.register_waiters |= 1u << warp.id;
      wait("setmaxnreg_inc", at, count);
    }
  }
}

}  // namespace almostgpt::emulator
