#include "device/emulator/global_memory.h"

#include <algorithm>
#include <cstring>

#include "device/emulator/faults.h"
#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"
#include "device/emulator/shared_memory.h"

namespace almostgpt::emulator {
namespace {

const Fault fence_fault("fence_gpu", {"drop"});
const Fault load_acquire_fault("load_acquire", {"relaxed"});
const Fault store_release_fault("store_release", {"relaxed"});
const Fault atomic_fault("atomic_add_acq_rel", {"relaxed"});

bool writes(Access access) { return access >= Access::store; }
bool is_strong(Access access) {
  return access == Access::strong_load || access == Access::strong_store || access == Access::atomic;
}

[[noreturn]] void out_of_bounds(const unsigned char* address, size_t bytes, const char* what, Location at) {
  // The buffer that it was probably meant for: the nearest.
  const Buffer* nearest = nullptr;
  uintptr_t least = ~uintptr_t{0};
  const auto where = reinterpret_cast<uintptr_t>(address);
  for (const Buffer& buffer : buffers()) {
    const auto begin = reinterpret_cast<uintptr_t>(buffer.begin), end = begin + buffer.bytes;
    const uintptr_t distance = where < begin ? begin - where : where >= end ? where - end : 0;
    if (distance < least) {
      least = distance;
      nearest = &buffer;
    }
  }
  if (!nearest || least > (size_t{1} << 20))
    fail("out-of-bounds", at, format("a %s of %zu bytes at %p, which is in no buffer of the session", what, bytes,
                                     static_cast<const void*>(address)));
  fail("out-of-bounds", at, format("a %s of %zu bytes at byte %lld of buffer '%s', which has %zu", what, bytes,
                                   static_cast<long long>(where - reinterpret_cast<uintptr_t>(nearest->begin)),
                                   nearest->name.c_str(), nearest->bytes));
}

Buffer& buffer_of(const unsigned char* address, size_t bytes, const char* what, Location at) {
  static size_t last = 0;
  auto& all = buffers();
  const auto holds = [&](const Buffer& buffer) {
    const size_t offset = static_cast<size_t>(address - buffer.begin);  // huge if it lies before
    return offset < buffer.bytes && bytes <= buffer.bytes - offset;
  };
  if (last < all.size() && holds(all[last])) return all[last];
  for (size_t i = 0; i < all.size(); ++i)
    if (holds(all[i])) return all[last = i];
  out_of_bounds(address, bytes, what, at);
}

std::string place(const Buffer& buffer, size_t word) {
  const auto before = static_cast<long long>(reinterpret_cast<uintptr_t>(buffer.begin) % 4);
  const long long byte = static_cast<long long>(word * 4) - before;
  return format("byte %lld of buffer '%s'", std::max(byte, 0LL), buffer.name.c_str());
}

std::string who(const GlobalCell::Entry& other) {
  const uint32_t index = other.block - 1;
  if (index == current->block->index) return current->block->name_of(other.actor);
  const Dim3 place = place_of(index);
  const bool is_thread = other.actor < running->shape.threads;
  return (is_thread ? format("thread %d", other.actor) : std::string("TMA")) +
         format(" of block (%u, %u, %u)", place.x, place.y, place.z);
}

[[noreturn]] void race(const Buffer& buffer, size_t word, const Actor& actor, bool write, const GlobalCell::Entry& other,
                       Location at) {
  const bool own_block = other.block == current->block->index + 1;
  const char* order = write ? other.write ? "write-after-write" : "write-after-read" : "read-after-write";
  fail("race", at,
       format("%s in global memory: %s %s %s, which %s %s with nothing that orders the two\n  this access:  %s\n"
              "  other access: %s",
              order, current->block->name_of(actor.id).c_str(), write ? "writes" : "reads", place(buffer, word).c_str(),
              who(other).c_str(), other.write ? "wrote" : "read", text(at).c_str(),
              text(location_of(other.location)).c_str()),
       own_block ? nullptr
                 : "order the blocks: after the first access a barrier, then fence_gpu and an atomic by one thread (or "
                   "store_release, atomic_add_acq_rel); before the second the atomic, then fence_gpu (or load_acquire), and "
                   "a barrier");
}

// Whether no later access needs the entry once `entry` is remembered too.
bool covers(const GlobalCell::Entry& entry, const GlobalCell::Entry& old) {
  return !(old.mask & ~entry.mask) && (entry.write || !old.write) && (!entry.strong || old.strong);
}

void check_cell(Buffer& buffer, size_t word, const Actor& actor, uint8_t mask, Access access, const char* what,
                Location at) {
  GlobalCell& cell = buffer.cell(word);
  const bool write = writes(access), strong = is_strong(access);
  const uint32_t block = current->block->index + 1;
  const GlobalCell::Entry entry{block, actor.time, static_cast<uint16_t>(actor.id), number_of(at), mask, write, strong,
                                actor.async};
  if (access == Access::read_only_load) {
    if (cell.written & mask)
      fail("read-only", at, format("a %s through the read-only cache of %s, which was written in this launch", what,
                                   place(buffer, word).c_str()));
    cell.read_only |= mask;
  }
  if (write) {
    if (cell.read_only & mask)
      fail("read-only", at, format("a %s to %s, which was read through the read-only cache in this launch", what,
                                   place(buffer, word).c_str()));
    cell.written |= mask;
  }

  GlobalCell::Entry* slot = nullptr;
  for (auto& old : cell.entries) {
    if (!old.block) {
      if (!slot) slot = &old;
      continue;
    }
    const bool before = old.block == block ? actor.after(old.actor, old.time)
                                           : actor.known->knows(old.block - 1, old.actor, old.time);
    if (old.mask & mask) {
      if (!before && (write || old.write) && !(strong && old.strong)) race(buffer, word, actor, write, old, at);
      if (actor.async && old.write && !old.async)
        fail("proxy", at,
             format("TMA %s %s, which a plain store wrote in this launch at %s: TMA goes another way and may not see it",
                    write ? "writes" : "reads", place(buffer, word).c_str(), text(location_of(old.location)).c_str()),
             "write it in a kernel before, or by tma_store");
    }
    if (before && covers(entry, old)) {
      old.block = 0;
      if (!slot) slot = &old;
    }
  }
  // More than four unordered accesses: one is forgotten, a read rather than a write.
  if (!slot) {
    for (auto& old : cell.entries)
      if (!old.write) slot = &old;
    if (!slot && !write) return;
    if (!slot) slot = &cell.entries[actor.id & 3];
  }
  *slot = entry;
}

}  // namespace

GlobalCell& Buffer::cell(size_t word) {
  auto& chunk = shadow[word / kChunk];
  if (!chunk) chunk = std::make_unique<GlobalCell[]>(kChunk);
  return chunk[word % kChunk];
}

std::vector<Buffer>& buffers() {
  static std::vector<Buffer> all;
  return all;
}

void add_buffer(const char* name, const void* address, size_t bytes, Use use) {
  if (bytes == 0) return;
  auto* begin = static_cast<unsigned char*>(const_cast<void*>(address));
  for (Buffer& other : buffers()) {
    if (begin + bytes <= other.begin || other.begin + other.bytes <= begin) continue;
    if (use == Use::input && other.use == Use::input) continue;
    if (begin != other.begin || bytes != other.bytes)
      fail("session", {}, format("buffer '%s' overlaps '%s', and one of them may be written", name, other.name.c_str()),
           "give an output memory of its own, or exactly that of one input");
    // In place: the memory has both names, and is initialised if any says so.
    other.name += std::string("/") + name;
    if (other.use != use) {
      other.use = Use::input_output;
      other.initialised.clear();
    }
    return;
  }
  Buffer buffer;
  buffer.name = name;
  buffer.begin = begin;
  buffer.bytes = bytes;
  buffer.use = use;
  if (use == Use::output) buffer.initialised.resize(buffer.words());
  buffers().push_back(std::move(buffer));
}

void begin_global_memory(Launch& launch) {
  for (Buffer& buffer : buffers()) {
    buffer.traffic = &launch.statistics.buffers[buffer.name];
    buffer.shadow.clear();
    if (buffer.use != Use::input) buffer.shadow.resize(buffer.words() / Buffer::kChunk + 1);
  }
}

void check_global(const Actor& actor, const void* where, size_t bytes, size_t alignment, Access access,
                  const char* what, Location at) {
  const auto* address = static_cast<const unsigned char*>(where);
  if (reinterpret_cast<uintptr_t>(address) & (alignment - 1))
    fail("misaligned", at, format("a %s at %p of global memory must be at a multiple of %zu", what, where, alignment));
  Buffer& buffer = buffer_of(address, bytes, what, at);
  const bool write = writes(access);
  if (write && buffer.use == Use::input)
    fail("input-written", at, format("a %s to byte %zu of buffer '%s', which is an input", what,
                                     static_cast<size_t>(address - buffer.begin), buffer.name.c_str()));
  (write ? running->statistics.global.written : running->statistics.global.read) += bytes;
  (write ? buffer.traffic->written : buffer.traffic->read) += bytes;
  // Nobody writes an input, so nothing can go wrong with reading it.
  if (!running->options.check || buffer.use == Use::input) return;

  const uintptr_t base = reinterpret_cast<uintptr_t>(buffer.begin) / 4 * 4;
  const uint64_t begin = reinterpret_cast<uintptr_t>(address) - base, end = begin + bytes;
  for (uint64_t word = begin / 4; word < (end + 3) / 4; ++word) {
    const uint8_t mask = byte_mask(word, begin, end);
    if (buffer.use == Use::output) {
      const bool reads = !write || access == Access::atomic;
      if (reads && (mask & ~buffer.initialised[word]))
        fail("uninitialised", at,
             format("a %s of %s, an output which nobody has written", what, place(buffer, word).c_str()));
      if (write) buffer.initialised[word] |= mask;
    }
    check_cell(buffer, word, actor, mask, access, what, at);
  }
}

// --- the primitives ---------------------------------------------------------------------------------------

namespace {

void access_by_lane(const void* address, uint32_t bytes, Access access, const char* what, Location at) {
  preempt();
  check_global(current->actor(), address, bytes, bytes, access, what, at);
  count_access(*current->warp, current->lane, at, false, writes(access), reinterpret_cast<uintptr_t>(address), bytes);
}

void write(void* to, const void* from, uint32_t bytes) {
  if (running->spinning && std::memcmp(to, from, bytes)) memory_changed();
  std::memcpy(to, from, bytes);
}

// What is published at a word. A read-modify-write goes on publishing what was there before it.
void publish_at(const void* word, const KnowledgeRef& knowledge, bool keep) {
  const auto key = reinterpret_cast<uintptr_t>(word);
  if (!keep) {
    if (knowledge) running->published[key] = knowledge;
    else running->published.erase(key);
  } else if (knowledge) {
    KnowledgeRef& published = running->published[key];
    published = join(published, knowledge);
  }
}

void see(Thread& thread, const void* word, bool acquires) {
  const auto found = running->published.find(reinterpret_cast<uintptr_t>(word));
  if (found == running->published.end()) return;
  if (acquires) acquire(thread, found->second);
  else thread.seen = join(thread.seen, found->second);
}

template <class T> T atomic_add_as(T* to, T value, bool acquire_release, Location at) {
  access_by_lane(to, 4, Access::atomic, "atomic", at);
  Thread& me = *current;
  see(me, to, acquire_release);
  publish_at(to, acquire_release ? publish(me) : me.fenced, true);
  T old;
  std::memcpy(&old, to, 4);
  const T sum = old + value;
  const bool changes = std::memcmp(&sum, &old, 4) != 0;
  std::memcpy(to, &sum, 4);
  if (changes) {
    memory_changed();
    take_turns(at);
  } else {  // the sum with 0 is how some wait
    uint32_t bits;
    std::memcpy(&bits, &old, 4);
    poll(reinterpret_cast<uintptr_t>(to), bits, at);
  }
  return old;
}

}  // namespace

void load_global(const void* from, void* to, uint32_t bytes, bool read_only, Location at) {
  access_by_lane(from, bytes, read_only ? Access::read_only_load : Access::load, "load", at);
  std::memcpy(to, from, bytes);
}

void store_global(void* to, const void* from, uint32_t bytes, Location at) {
  access_by_lane(to, bytes, Access::store, "store", at);
  write(to, from, bytes);
}

void fence_gpu(Location at) {
  if (fence_fault.at(at) == Mutation::drop) return;
  Thread& me = *current;
  acquire(me, std::exchange(me.seen, nullptr));
  me.fenced = publish(me);
}

uint32_t load_strong(const void* from, bool acquires, Location at) {
  if (acquires && load_acquire_fault.at(at) == Mutation::relaxed) acquires = false;
  access_by_lane(from, 4, Access::strong_load, "load", at);
  uint32_t value;
  std::memcpy(&value, from, 4);
  poll(reinterpret_cast<uintptr_t>(from), value, at);
  std::memcpy(&value, from, 4);  // others may have run
  see(*current, from, acquires);
  return value;
}

void store_strong(void* to, uint32_t value, bool releases, Location at) {
  if (releases && store_release_fault.at(at) == Mutation::relaxed) releases = false;
  access_by_lane(to, 4, Access::strong_store, "store", at);
  publish_at(to, releases ? publish(*current) : current->fenced, false);
  write(to, &value, 4);
}

float atomic_add(float* to, float value, Location at) { return atomic_add_as(to, value, false, at); }

void check_alignment(const void* address, uint32_t bytes, const char* what, Location at) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned", at, format("a %s at %p of global memory must be at a multiple of %u", what, address, bytes));
}

uint32_t atomic_add(uint32_t* to, uint32_t value, bool acquire_release, Location at) {
  if (acquire_release && atomic_fault.at(at) == Mutation::relaxed) acquire_release = false;
  return atomic_add_as(to, value, acquire_release, at);
}

}  // namespace almostgpt::emulator
