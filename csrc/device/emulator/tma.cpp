// TMA: boxes of tensors between global and shared memory.
//
// A load is in flight until it completes, at the latest when no thread can run. A store reads shared
// memory at the latest in the tma_wait_read, and writes at the latest in the tma_wait, of its thread.
#include <algorithm>
#include <cstring>

#include "device/emulator/faults.h"
#include "device/emulator/global_memory.h"
#include "device/emulator/mbarrier.h"
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"
#include "device/emulator/shared_memory.h"

namespace almostgpt::emulator {
namespace {

const Fault commit_fault("tma_commit", {"drop"});
const Fault wait_fault("tma_wait", {"drop", "lax"});
const Fault wait_read_fault("tma_wait_read", {"drop", "lax"});

constexpr size_t kCapturedStores = 16;  // that have been read, and wait to be written

// Calls row(offset, run, skipped, bytes) for every row of the box: where it begins in the unswizzled
// tile, and of what lies inside the tensor the address, how many bytes of the row come before, and the length.
template <class Row> void for_each_row(const TensorMap& map, const int* coordinates, Row row) {
  const int64_t element = map.element_bytes;
  const uint32_t inner = map.box[0] * map.element_bytes;
  uint32_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  const int64_t first = std::max<int64_t>(coordinates[0], 0);
  const int64_t last = std::min<int64_t>(int64_t{coordinates[0]} + map.box[0], static_cast<int64_t>(map.dims[0]));
  for (uint32_t r = 0; r < rows; ++r) {
    bool inside = first < last;
    uint64_t offset = 0;
    uint32_t rest = r;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t x = int64_t{coordinates[i]} + rest % map.box[i];
      rest /= map.box[i];
      inside &= x >= 0 && x < static_cast<int64_t>(map.dims[i]);
      if (inside) offset += static_cast<uint64_t>(x) * map.strides[i];
    }
    if (inside) {
      row(r * inner, map.base + offset + first * element, static_cast<uint32_t>((first - coordinates[0]) * element),
          static_cast<uint32_t>((last - first) * element));
    } else {
      row(r * inner, static_cast<unsigned char*>(nullptr), 0u, 0u);
    }
  }
}

void check_map(const TensorMap* map, uint32_t address, int rank, const char* what, Location at) {
  require_sm90(what, at);
  if (map->magic != TensorMap::kMagic) fail("tma", at, format("%s: this is no tensor map", what));
  if (map->rank != rank) fail("tma", at, format("%s: %d coordinates for a map of rank %d", what, rank, map->rank));
  // Swizzled tiles begin where their pattern does, which is stricter than the hardware's 128 bytes.
  check_shared_alignment(address, std::max(128, 8 * static_cast<int>(map->span)), what, at);
}

// --- stores -----------------------------------------------------------------------------------------------

void start_store(BulkStore&& store, const char* what) {
  Thread& me = *current;
  Block& block = *me.block;
  check_shared_bounds(block, store.from, store.bytes, what, store.at);
  store.group = me.store_group;
  store.time = ++me.warp->store_time;
  Actor reader = me.actor();
  reader.id = block.store_reader(me.warp->id);
  reader.time = store.time;
  reader.async = true;
  check_shared_read(block, store.from, store.bytes, reader, store.at);

  Actor writer = reader;
  writer.id = block.store_writer(me.warp->id);
  const Access access = store.add ? Access::atomic : Access::store;
  if (store.flat_to) {
    check_global(writer, store.flat_to, store.bytes, 16, access, what, store.at);
    count_sectors(reinterpret_cast<uintptr_t>(store.flat_to), store.bytes);
  } else {
    for_each_row(store.map, store.coordinates, [&](uint32_t, const unsigned char* to, uint32_t, uint32_t bytes) {
      if (!bytes) return;
      check_global(writer, to, bytes, store.map.element_bytes, access, what, store.at);
      count_sectors(reinterpret_cast<uintptr_t>(to), bytes);
    });
  }
  me.stores.push_back(std::move(store));
}

// Reads shared memory.
void capture(Block& block, BulkStore& store) {
  if (store.captured) return;
  store.data.assign(block.at(store.from), block.at(store.from) + store.bytes);
  store.captured = true;
}

void put(unsigned char* to, const unsigned char* from, uint32_t bytes, bool add) {
  if (!add) {
    std::memcpy(to, from, bytes);
    return;
  }
  for (uint32_t i = 0; i < bytes; i += 4) {
    float sum, value;
    std::memcpy(&sum, to + i, 4);
    std::memcpy(&value, from + i, 4);
    sum += value;
    std::memcpy(to + i, &sum, 4);
  }
}

// Writes global memory.
void write(BulkStore& store) {
  memory_changed();
  if (store.flat_to) {
    put(static_cast<unsigned char*>(store.flat_to), store.data.data(), store.bytes, store.add);
    return;
  }
  const auto span = store.map.span;
  for_each_row(store.map, store.coordinates, [&](uint32_t offset, unsigned char* to, uint32_t skipped, uint32_t bytes) {
    // By pieces that swizzling leaves together.
    for (uint32_t done = 0; done < bytes;) {
      const uint32_t byte = offset + skipped + done;
      const uint32_t piece = std::min(16 - byte % 16, bytes - done);
      const uint32_t from = device::swizzled(store.from + byte, span) - store.from;
      put(to + done, store.data.data() + from, piece, store.add);
      done += piece;
    }
  });
}

// The thread knows what the agent has done until that time.
void know_agent(Thread& thread, int agent, uint32_t time) {
  ClockRef known = Clock::copy(*thread.known);
  (*known)[agent] = std::max((*known)[agent], time);
  thread.known = known;
}

void wait_for_stores(int newest, bool only_read) {
  Thread& me = *current;
  uint32_t time = 0;
  size_t complete = 0;
  for (; complete < me.stores.size() && me.stores[complete].group < me.store_group - newest; ++complete) {
    BulkStore& store = me.stores[complete];
    capture(*me.block, store);
    store.read_waited = true;
    if (!only_read) write(store);
    time = store.time;
  }
  if (!time) return;
  know_agent(me, me.block->store_reader(me.warp->id), time);
  if (only_read) {
    // They stay, to be written as late as may be; but of many the oldest are.
    const size_t old = complete > kCapturedStores ? complete - kCapturedStores : 0;
    for (size_t i = 0; i < old; ++i) write(me.stores[i]);
    me.stores.erase(me.stores.begin(), me.stores.begin() + old);
    return;
  }
  know_agent(me, me.block->store_writer(me.warp->id), time);
  me.stores.erase(me.stores.begin(), me.stores.begin() + complete);
}

}  // namespace

void prefetch_tensor_map(const TensorMap* map, Location at) {
  require_sm90("prefetch_tensor_map", at);
  if (map->magic != TensorMap::kMagic) fail("tma", at, "prefetch_tensor_map: this is no tensor map");
}

void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, const int* coordinates, int rank, Location at) {
  check_map(map, to, rank, "tma_load", at);
  preempt();
  Thread& me = *current;
  Block& block = *me.block;
  const uint32_t bytes = map->box_bytes();
  check_shared_bounds(block, to, bytes, "tma_load", at);
  Mbarrier& mbarrier = mbarrier_at(barrier, "tma_load", at);
  const int number = static_cast<int>(&mbarrier - block.mbarriers.data());

  Actor agent = me.actor();
  agent.async = true;
  if (running->options.check &&
      !proxy_fenced(block, agent, mbarrier.initialised_by, mbarrier.initialised_time, true))
    fail("proxy", at, format("tma_load counts at an mbarrier that was initialised at %s without fence_mbarrier_init after",
                             text(mbarrier.initialised_at).c_str()),
         "call fence_mbarrier_init after mbar_init, in the same thread, then a barrier");
  agent.id = block.mbarrier_agent(number);
  agent.time = ++mbarrier.agent_time;
  check_shared_write(block, to, bytes, agent, at, InFlight::tma);
  for_each_row(*map, coordinates, [&](uint32_t, const unsigned char* from, uint32_t, uint32_t run) {
    if (!run) return;
    check_global(agent, from, run, map->element_bytes, Access::load, "tma_load", at);
    count_sectors(reinterpret_cast<uintptr_t>(from), run);
  });

  TmaLoad load{&block, *map, to, {}, number, agent.time, me.known, at};
  std::copy(coordinates, coordinates + rank, load.coordinates);
  running->loads.push_back(std::move(load));
  ++me.time;
  if (running->options.asynchrony == Asynchrony::early) complete_tma_load(running->loads.size() - 1);
}

void complete_tma_load(size_t index) {
  const TmaLoad load = running->loads[index];
  running->loads.erase(running->loads.begin() + index);
  Block& block = *load.block;
  const uint32_t bytes = load.map.box_bytes(), inner = load.map.box[0] * load.map.element_bytes;
  for_each_row(load.map, load.coordinates, [&](uint32_t offset, const unsigned char* from, uint32_t skipped, uint32_t run) {
    for (uint32_t byte = 0; byte < inner; byte += 16) {
      unsigned char chunk[16] = {};
      const uint32_t first = std::max(byte, skipped), last = std::min(byte + 16, skipped + run);
      if (first < last) std::memcpy(chunk + (first - byte), from + (first - skipped), last - first);
      std::memcpy(block.at(device::swizzled(load.to + offset + byte, load.map.span)), chunk, 16);
    }
  });
  arrived_in_shared(block, load.to, bytes);
  memory_changed();
  Mbarrier& mbarrier = block.mbarriers[load.mbarrier];
  Clock& joined = *mbarrier.arrivals.joined();
  joined.join(*load.known);
  uint32_t& time = joined[block.mbarrier_agent(load.mbarrier)];
  time = std::max(time, load.time);
  mbarrier.bytes -= bytes;
  complete_phase(block, mbarrier, load.at);
}

void tma_store(const TensorMap* map, uint32_t from, const int* coordinates, int rank, bool add, Location at) {
  const char* what = add ? "tma_reduce_add" : "tma_store";
  check_map(map, from, rank, what, at);
  if (add && !map->is_float) fail("tma", at, "tma_reduce_add: the map's type is not float", "make the map of float32");
  preempt();
  BulkStore store{};
  store.map = *map;
  store.from = from;
  store.bytes = map->box_bytes();
  std::copy(coordinates, coordinates + rank, store.coordinates);
  store.add = add;
  store.at = at;
  start_store(std::move(store), what);
  if (happens_early()) capture(*current->block, current->stores.back());
}

void bulk_reduce_add_f32(float* to, uint32_t from, uint32_t bytes, Location at) {
  require_sm90("bulk_reduce_add_f32", at);
  preempt();
  check_shared_alignment(from, 16, "bulk_reduce_add_f32", at);
  if (bytes == 0 || bytes % 16)
    fail("misaligned", at, format("bulk_reduce_add_f32 of %u bytes; must be a multiple of 16", bytes));
  BulkStore store{};
  store.flat_to = to;
  store.from = from;
  store.bytes = bytes;
  store.add = true;
  store.at = at;
  start_store(std::move(store), "bulk_reduce_add_f32");
  if (happens_early()) capture(*current->block, current->stores.back());
}

void tma_commit(Location at) {
  require_sm90("tma_commit", at);
  if (commit_fault.at(at) == Mutation::drop) return;
  ++current->store_group;
}

void tma_wait(int newest, Location at) {
  require_sm90("tma_wait", at);
  const Mutation mutation = wait_fault.at(at);
  if (mutation != Mutation::drop) wait_for_stores(newest + (mutation == Mutation::lax), false);
}

void tma_wait_read(int newest, Location at) {
  require_sm90("tma_wait_read", at);
  const Mutation mutation = wait_read_fault.at(at);
  if (mutation != Mutation::drop) wait_for_stores(newest + (mutation == Mutation::lax), true);
}

void stores_at_exit(Thread& thread) {
  for (BulkStore& store : thread.stores) {
    if (!store.read_waited)
      fail("exit", store.at, "the thread returns before it has waited until its TMA store has read shared memory",
           "call tma_commit, then tma_wait_read<0> or tma_wait<0>, in the thread that stores");
    write(store);  // only reading was waited for
  }
  thread.stores.clear();
}

}  // namespace almostgpt::emulator
