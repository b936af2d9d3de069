// The state of a block while it runs: its threads, warps, barriers, shared memory and asynchronous work.
// One block exists at a time, or all of a co-resident grid.
#pragma once

#include <memory>
#include <unordered_set>
#include <vector>

#include "device/emulator/card.h"
#include "device/emulator/clock.h"
#include "device/emulator/fiber.h"
#include "device/emulator/location.h"
#include "device/emulator/runtime.h"
#include "device/emulator/tensor_map.h"

namespace almostgpt::emulator {

constexpr int kMaxThreads = 1024;
constexpr int kMaxMbarriers = 64;  // what the clocks have room for

struct Block;
struct Warp;

// Who makes an access: an entry of the clocks, and its time there.
struct Actor {
  int id;
  uint32_t time;
  int first, count;  // the threads for which it acts: what they did before comes before this
  const Clock* known;
  bool async;  // through the async proxy, as TMA and wgmma

  bool acts_for(int actor) const { return static_cast<unsigned>(actor - first) < static_cast<unsigned>(count); }
  // Whether what `actor` of the same block did at `then` comes before.
  bool after(int actor, uint32_t then) const { return acts_for(actor) || (*known)[actor] >= then; }
};

// --- what a thread has under way -----------------------------------------------------------------------

struct ProxyFence {
  uint32_t time;   // of the thread
  ClockRef known;  // to it, then
};

struct AsyncCopy {  // cp.async
  uint32_t to;
  const void* from;
  uint32_t size;   // 4 or 16 bytes
  uint32_t bytes;  // read from there; the rest is zero
  int group;
  bool done;  // early: in memory, though nobody may know
};

struct BulkStore {  // TMA store or reduction
  TensorMap map;
  void* flat_to = nullptr;  // of a bulk_reduce_add_f32, which has no map
  uint32_t from, bytes;
  int coordinates[5];
  bool add;
  int group;
  uint32_t time;  // of the agents
  bool captured = false;     // shared memory has been read, into data
  bool read_waited = false;  // and the thread has waited for that
  std::vector<unsigned char> data;
  Location at;
};

struct Waiting {
  const char* what = "not started";
  Location at;
  uint32_t argument = 0;  // barrier number, or mbarrier address | parity
};

struct Thread {
  Fiber fiber;
  Block* block;
  Warp* warp;
  int id, lane;

  bool alive;
  Waiting waiting;
  uint32_t time;   // its own entry in clocks; goes on at every release
  ClockRef known;  // to it; its own entry there may lag behind `time`

  std::vector<ProxyFence> proxy_fences;
  std::vector<AsyncCopy> copies;
  int copy_group;
  std::vector<BulkStore> stores;
  int store_group;

  // Between blocks: what a relaxed write of it publishes (all that it knew at its last fence), and what
  // its relaxed reads saw published (known from its next fence on).
  KnowledgeRef fenced, seen;
  // What it has polled since memory last changed: polling that again is a spin.
  std::unordered_set<uint64_t> polled;
  uint64_t polled_at;

  Actor actor() const { return Actor{id, time, id, 1, known.get(), false}; }
};

// --- warps ---------------------------------------------------------------------------------------------

// An operation that lanes of the warp do together, waiting for the last of them.
struct Collective {
  const char* name;
  uint32_t mask, arrived = 0;
  Location at;
  void* arguments[32];
};

struct WgmmaProduct {
  int n, group;
  bool accumulate, a_mn_major, b_mn_major, is_fp16, a_in_registers;
  bool captured;  // the operands in shared memory have been read
  bool poisoned;  // the registers of d hold kPoison; what they held is in saved
  uint64_t a, b;  // descriptors
  Location at;
  uint32_t time;
  float* d[32];
  std::vector<float> saved;
  float A[16][16];
  std::vector<float> B;
};

// Accesses of the lanes that the hardware makes together: the same line, the same time around.
struct AccessGroup {
  uint16_t location;
  uint8_t bytes;
  bool shared, write;
  uint32_t lanes;
  uint64_t addresses[32];
};

struct Warp {
  Block* block;
  int id;
  uint32_t alive, ready, spinning;
  Collective collectives[4];  // of disjoint masks

  std::vector<std::unique_ptr<WgmmaProduct>> products;
  int product_group;
  uint32_t product_time;
  bool product_fence;      // wgmma_fence was called since the registers could last be touched
  uint64_t product_count;
  int registers;           // a thread may use
  size_t register_changes;
  uint32_t store_time;     // of the agents that make its TMA stores

  std::vector<AccessGroup> accesses;  // since the lanes last were together
  uint32_t cursor[32];                // the group after that of the lane's last access
};

// --- what the warps share ------------------------------------------------------------------------------

struct Barrier {
  int expected = 0, arrived = 0;
  uint32_t waiting[32] = {};  // lanes, by warp
  Location waiting_at[32];    // theirs: the lanes of a warp must wait in the same call
  Arrivals arrivals;
  Location at;
};

struct Mbarrier {
  uint32_t address;
  int expected, pending;
  int64_t bytes;  // still to come
  uint32_t phase;
  Arrivals arrivals;
  ClockRef completed;   // what arrivals of completed phases knew
  uint32_t agent_time;  // of the TMA loads that count here
  uint32_t waiting[32];
  Location initialised_at;
  int initialised_by;
  uint32_t initialised_time;
};

// The shadow of a 4-byte word of shared memory. An access of time 0 is none. Of the last writes of its
// bytes only the very last is known, of its reads four.
enum class InFlight : uint8_t { no, cp_async, tma };
struct SharedCell {
  struct Access {
    uint32_t time;
    uint16_t actor, location;
  };
  Access write, reads[4];
  uint8_t write_mask, read_masks[4];  // bytes of the word
  uint8_t initialised;
  InFlight in_flight;
  bool generic_write;  // not through the async proxy
};

// The same calls must come from all four warps of a warpgroup.
struct WgmmaCall {
  uint64_t a, b;
  Location at;
};
struct RegisterCall {
  int count;
  bool increase;
  Location at;
};
struct Warpgroup {
  std::vector<WgmmaCall> products;
  std::vector<RegisterCall> register_changes;
};

struct Block {
  uint32_t index;
  Dim3 where;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  uint32_t warps_ready, warps_spinning;
  int alive;
  Barrier barriers[16];
  std::vector<Mbarrier> mbarriers;
  int free_registers;
  uint32_t register_waiters;  // warps

  uint32_t shared_bytes = 0;
  std::unique_ptr<unsigned char, void (*)(void*)> shared_memory{nullptr, nullptr};
  std::vector<SharedCell> shared_cells;

  // Makes it the block of that index, not started.
  void reset(uint32_t index, Stacks& stacks, size_t first_stack);
  unsigned char* at(uint32_t shared_address) { return shared_memory.get() + (shared_address - kSharedBase); }

  // Entries of the clocks: the threads, then these agents.
  int size() const { return static_cast<int>(threads.size()); }
  int mbarrier_agent(int mbarrier) const { return size() + mbarrier; }
  int wgmma_agent(int warp) const { return size() + kMaxMbarriers + warp; }
  int store_reader(int warp) const { return wgmma_agent(warp) + static_cast<int>(warps.size()); }
  int store_writer(int warp) const { return store_reader(warp) + static_cast<int>(warps.size()); }
  static int actors(int threads) { return threads + kMaxMbarriers + 3 * ((threads + 31) / 32); }
  bool is_thread(int actor) const { return actor < size(); }
  std::string name_of(int actor) const;
};

}  // namespace almostgpt::emulator
