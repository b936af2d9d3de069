// How the warpgroups of a Hopper kernel work together: rings that one fills and others read, and turns.
#pragma once

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

// Places in shared memory of `bytes` each, filled by TMA and read again and again. Every place has two
// mbarriers: `full`, which the bytes that arrive complete, and `empty`, at which its readers say that they
// have read. The phases of both alternate with the uses of the place, so one parity serves both.
template <int places, uint32_t bytes_>
struct Ring {
  static constexpr uint32_t bytes = bytes_, all_bytes = places * bytes, barrier_bytes = 16 * places;
  shared_addr tiles, barriers;

  struct Place {
    shared_addr tile, full, empty;
    uint32_t parity;

    // The producer's: what was there has been read. The first use waits for nothing, since the phase before
    // the first counts as complete.
    DEVICE void wait_until_empty() const { mbar_wait(empty, parity ^ 1); }
    DEVICE void expect_bytes() const { mbar_arrive_expect_tx(full, bytes_); }
    // A consumer's.
    DEVICE void wait_until_full() const { mbar_wait(full, parity); }
    // By every warp that reads, when all of its lanes have: a lane that came to wait_until_full two phases late
    // would wait for ever. Products and barriers bring the lanes together; where there are none between, warp_sync.
    DEVICE void release() const {
      if (lane_id() == 0) mbar_arrive(empty);
    }
    DEVICE void release_together() const {
      warp_sync();
      release();
    }
  };
  DEVICE Place at(uint32_t use) const {
    const uint32_t place = use % places, barrier = barriers + 16 * place;
    return {tiles + place * bytes, barrier, barrier + 8, use / places % 2};
  }

  // By one thread; `releases` of a place make it empty.
  DEVICE void init(uint32_t releases) const {
    UNROLL for (int place = 0; place < places; ++place) {
      mbar_init(at(place).full, 1);  // the producer, who also says how many bytes will come
      mbar_init(at(place).empty, releases);
    }
  }
};

// Named barriers (0 is cta_sync's).
constexpr int kTurnBarrier = 1, kGroupBarrier = 4;

// Warpgroups that take turns: who has issued its products hands on, and computes while the next one's run.
// Nothing that they compute depends on it. All take the same number of turns.
template <int warpgroups>
struct Turns {
  int mine;  // which of the warpgroups

  DEVICE void begin() const {
    if (mine == warpgroups - 1) pass();  // the first turn is that of warpgroup 0
  }
  DEVICE void take() const { bar_sync(kTurnBarrier + mine, 256); }  // 128 wait, 128 have passed
  DEVICE void pass() const { bar_arrive(kTurnBarrier + (mine + 1) % warpgroups, 256); }
  DEVICE void end() const {
    if (mine == 0) take();  // the last pass, so that no barrier is left half full
  }
};

}  // namespace almostgpt
