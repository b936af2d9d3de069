#include "device/emulator/mbarrier.h"

#include <cstring>

#include "device/emulator/faults.h"
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"
#include "device/emulator/shared_memory.h"

namespace almostgpt::emulator {
namespace {

const Fault init_fault("mbar_init", {"drop"});
const Fault arrive_fault("mbar_arrive", {"drop", "double"});
const Fault expect_fault("mbar_arrive_expect_tx", {"drop", "bytes"});
const Fault wait_fault("mbar_wait", {"drop", "parity"});
const Fault try_wait_fault("mbar_try_wait", {"drop", "parity"});
const Fault init_fence_fault("fence_mbarrier_init", {"drop"});
const Fault proxy_fence_fault("fence_proxy_async", {"drop"});

constexpr int kMostArrivals = 0xfffff;  // 20 bits
constexpr int64_t kMostBytes = 0xfffff;
constexpr size_t kProxyFences = 32;  // that a thread remembers

// The 8 bytes in shared memory hold this and the number of the mbarrier, so that a store there is noticed.
constexpr uint64_t kMark = 0xb4441e5cull << 32;

void arrive(uint32_t address, int64_t bytes, const char* what, Location at) {
  Mbarrier& mbarrier = mbarrier_at(address, what, at);
  mbarrier.bytes += bytes;
  if (mbarrier.bytes > kMostBytes) fail("mbarrier", at, format("%s: more than 2^20 - 1 bytes are expected", what));
  release(*current, mbarrier.arrivals);
  --mbarrier.pending;
  complete_phase(*current->block, mbarrier, at);
}

void check_parity(uint32_t parity, Location at) {
  if (parity > 1) fail("mbarrier", at, format("a parity of %u; must be 0 or 1", parity),
                       "pass the number of the phase & 1");
}

void remember_fence() {
  Thread& me = *current;
  if (me.proxy_fences.size() == kProxyFences) me.proxy_fences.erase(me.proxy_fences.begin());
  me.proxy_fences.push_back({me.time++, me.known});
}

}  // namespace

void require_sm90(const char* primitive, Location at) {
  const device::Card& card = running->limits.card;
  if (card.major < 9)
    fail("capability", at,
         format("%s needs compute capability 9.0; the card has %d.%d", primitive, card.major, card.minor));
}

Mbarrier& mbarrier_at(uint32_t address, const char* what, Location at) {
  Block& block = *current->block;
  check_shared_bounds(block, address, 8, what, at);
  check_shared_alignment(address, 8, what, at);
  uint64_t word;
  std::memcpy(&word, block.at(address), 8);
  const auto number = static_cast<uint32_t>(word);
  if (word >> 32 != kMark >> 32 || number >= block.mbarriers.size() || block.mbarriers[number].address != address)
    fail("mbarrier", at, format("%s: at byte %u of shared memory there is no mbarrier: not initialised, or overwritten",
                                what, address - kSharedBase));
  Mbarrier& mbarrier = block.mbarriers[number];
  if (running->options.check && !current->actor().after(mbarrier.initialised_by, mbarrier.initialised_time))
    fail("race", at, format("%s on the mbarrier at byte %u of shared memory, which %s initialised with no barrier "
                            "between\n  this access:  %s\n  other access: %s",
                            what, address - kSharedBase, block.name_of(mbarrier.initialised_by).c_str(),
                            text(at).c_str(), text(mbarrier.initialised_at).c_str()));
  return mbarrier;
}

void complete_phase(Block& block, Mbarrier& mbarrier, Location at) {
  if (mbarrier.pending < 0)
    fail("mbarrier", at, format("more arrivals in a phase than the %d of mbar_init at %s", mbarrier.expected,
                                text(mbarrier.initialised_at).c_str()));
  if (mbarrier.pending || mbarrier.bytes) return;
  const uint32_t parity = mbarrier.phase & 1;
  ++mbarrier.phase;
  mbarrier.pending = mbarrier.expected;
  mbarrier.completed = Clock::copy(*mbarrier.arrivals.joined());
  memory_changed();
  for (Warp& warp : block.warps) {
    uint32_t& waiting = mbarrier.waiting[warp.id];
    uint32_t wake = 0;
    for (uint32_t rest = waiting; rest; rest &= rest - 1) {
      Thread& thread = block.threads[32 * warp.id + __builtin_ctz(rest)];
      if ((thread.waiting.argument & 1) != parity) continue;
      wake |= 1u << thread.lane;
      acquire(thread, mbarrier.completed);
    }
    waiting &= ~wake;
    make_ready(warp, wake);
  }
}

void mbar_init(uint32_t address, uint32_t arrivals, Location at) {
  require_sm90("mbar_init", at);
  if (init_fault.at(at) == Mutation::drop) return;
  Block& block = *current->block;
  check_shared_bounds(block, address, 8, "mbar_init", at);
  check_shared_alignment(address, 8, "mbar_init", at);
  if (arrivals == 0 || arrivals > kMostArrivals)
    fail("mbarrier", at, format("mbar_init with %u arrivals; must be 1 to %d", arrivals, kMostArrivals));
  check_shared_write(block, address, 8, current->actor(), at);
  for (const Mbarrier& other : block.mbarriers)
    if (other.address == address)
      fail("mbarrier", at, format("the mbarrier at byte %u of shared memory was initialised before, at %s",
                                  address - kSharedBase, text(other.initialised_at).c_str()));
  const size_t number = block.mbarriers.size();
  if (number == kMaxMbarriers)
    fail("mbarrier", at, format("the emulator has room for %d mbarriers in a block", kMaxMbarriers));
  Mbarrier mbarrier{};
  mbarrier.address = address;
  mbarrier.expected = mbarrier.pending = static_cast<int>(arrivals);
  mbarrier.arrivals.joined() = Clock::zero();
  mbarrier.initialised_at = at;
  mbarrier.initialised_by = current->id;
  mbarrier.initialised_time = current->time;
  block.mbarriers.push_back(std::move(mbarrier));
  const uint64_t word = kMark | number;
  std::memcpy(block.at(address), &word, 8);
}

void mbar_arrive(uint32_t barrier, Location at) {
  require_sm90("mbar_arrive", at);
  preempt();
  const Mutation mutation = arrive_fault.at(at);
  if (mutation == Mutation::drop) return;
  arrive(barrier, 0, "mbar_arrive", at);
  if (mutation == Mutation::arrive_twice) arrive(barrier, 0, "mbar_arrive", at);
}

void mbar_arrive_expect_tx(uint32_t barrier, uint32_t bytes, Location at) {
  require_sm90("mbar_arrive_expect_tx", at);
  preempt();
  const Mutation mutation = expect_fault.at(at);
  if (mutation == Mutation::drop) return;
  arrive(barrier, mutation == Mutation::bytes ? int64_t{bytes} - 16 : bytes, "mbar_arrive_expect_tx", at);
}

bool mbar_try_wait(uint32_t barrier, uint32_t parity, Location at) {
  require_sm90("mbar_try_wait", at);
  preempt();
  const Mutation mutation = try_wait_fault.at(at);
  if (mutation == Mutation::drop) return true;
  check_parity(parity, at);
  if (mutation == Mutation::parity) parity ^= 1;
  if ((mbarrier_at(barrier, "mbar_try_wait", at).phase & 1) == parity) poll(barrier, parity, at);
  Mbarrier& mbarrier = mbarrier_at(barrier, "mbar_try_wait", at);  // others may have run
  if ((mbarrier.phase & 1) == parity) return false;
  acquire(*current, mbarrier.completed);
  return true;
}

void mbar_wait(uint32_t barrier, uint32_t parity, Location at) {
  require_sm90("mbar_wait", at);
  preempt();
  const Mutation mutation = wait_fault.at(at);
  if (mutation == Mutation::drop) return;
  check_parity(parity, at);
  if (mutation == Mutation::parity) parity ^= 1;
  Mbarrier& mbarrier = mbarrier_at(barrier, "mbar_wait", at);
  if ((mbarrier.phase & 1) != parity) {
    acquire(*current, mbarrier.completed);
    return;
  }
  mbarrier.waiting[current->warp->id] |= 1u << current->lane;
  wait("mbar_wait", at, barrier | parity);
}

void fence_mbarrier_init(Location at) {
  require_sm90("fence_mbarrier_init", at);
  if (init_fence_fault.at(at) == Mutation::drop) return;
  remember_fence();
}

void fence_proxy_async(Location at) {
  require_sm90("fence_proxy_async", at);
  if (proxy_fence_fault.at(at) == Mutation::drop) return;
  remember_fence();
}

}  // namespace almostgpt::emulator
