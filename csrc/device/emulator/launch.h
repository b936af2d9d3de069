// A launch: what is asked is checked against the card, then its blocks run, one after another or together.
#pragma once

#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "device/emulator/block.h"
#include "device/emulator/emulator.h"
#include "device/emulator/statistics.h"

namespace almostgpt::emulator {

// xorshift64
class Random {
 public:
  explicit Random(uint64_t seed) : state_(0x9e3779b97f4a7c15ull * (seed + 1) | 1) {}
  uint32_t operator()() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 16);
  }
  uint32_t below(uint64_t bound) { return static_cast<uint32_t>((*this)() % bound); }
  bool one_in(uint32_t n) { return (*this)() % n == 0; }

 private:
  uint64_t state_;
};

struct TmaLoad {
  Block* block;
  TensorMap map;
  uint32_t to;
  int coordinates[5];
  int mbarrier;
  uint32_t time;   // of the agent
  ClockRef known;  // to the thread that issued it
  Location at;
};

struct Launch {
  std::string kernel;
  device::LaunchShape shape;
  const CardLimits& limits;
  const std::function<void()>& thread_body;
  const Options options;          // those of the start
  Random random;
  KernelStatistics& statistics;

  std::vector<Block*> blocks = {};  // that exist
  size_t block_in_turn = 0;
  int alive = 0;                    // threads

  // Asynchronous loads that have not happened yet.
  std::vector<TmaLoad> loads = {};

  // Spin-waits: how often memory has changed, who spins, and since when nothing has changed.
  uint64_t changes = 0, changes_at_wake = 0;
  int spinning = 0, idle_rounds = 0, polls_in_turn = 0;

  std::vector<Thread*> last_to_run = {};  // go on when no other thread can

  // What was published at a word of global memory by a fence and a relaxed write, or a release.
  std::unordered_map<uintptr_t, KnowledgeRef> published = {};

  // The last join of two clocks: lanes that share a clock go on sharing it.
  ClockRef joined_a = {}, joined_b = {}, joined = {};
};

extern Launch* running;  // null: none

// Of the block with that index in the grid.
Dim3 place_of(uint32_t index);

}  // namespace almostgpt::emulator
