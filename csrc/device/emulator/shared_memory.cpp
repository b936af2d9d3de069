#include "device/emulator/shared_memory.h"

#include <cstring>

#include "device/emulator/report.h"
#include "device/emulator/runtime.h"
#include "device/emulator/scheduler.h"

namespace almostgpt::emulator {
namespace {

[[noreturn]] void race(const Block& block, const char* order, const char* verb, const char* done, uint32_t byte,
                       const Actor& actor, Location at, const SharedCell::Access& before) {
  fail("race", at,
       format("%s in shared memory: %s %s byte %u, which %s %s with no barrier between\n  this access:  %s\n"
              "  other access: %s",
              order, block.name_of(actor.id).c_str(), verb, byte, block.name_of(before.actor).c_str(), done,
              text(at).c_str(), text(location_of(before.location)).c_str()));
}

[[noreturn]] void unfenced(const Block& block, const char* verb, const char* done, uint32_t byte, const Actor& actor,
                           Location at, const SharedCell::Access& before) {
  fail("proxy", at,
       format("%s %s byte %u of shared memory, which %s %s by a plain access, without fence_proxy_async between\n"
              "  this access:  %s\n  other access: %s",
              block.name_of(actor.id).c_str(), verb, byte, block.name_of(before.actor).c_str(), done, text(at).c_str(),
              text(location_of(before.location)).c_str()));
}

[[noreturn]] void in_flight(const Block& block, const char* verb, uint32_t byte, const Actor& actor, Location at,
                            const SharedCell& cell) {
  fail("in-flight", at,
       format("%s %s byte %u of shared memory while a %s there is not known to be complete\n  this access:  %s\n"
              "  the copy:     %s",
              block.name_of(actor.id).c_str(), verb, byte, cell.in_flight == InFlight::tma ? "TMA load" : "cp.async",
              text(at).c_str(), text(location_of(cell.write.location)).c_str()));
}

void remember_read(SharedCell& cell, const Actor& actor, uint8_t mask, uint16_t location) {
  // A slot may be reused if this read covers that one: it comes after, and reads its bytes too.
  const auto free = [&](int i) {
    const SharedCell::Access& read = cell.reads[i];
    return !read.time || (!(cell.read_masks[i] & ~mask) && actor.after(read.actor, read.time));
  };
  // More than four readers without order: which are forgotten is left to chance, one of each warp is best.
  int slot = actor.id >> 5 & 3;
  if (!free(slot))
    for (int i = 0; i < 4; ++i)
      if (free(i)) {
        slot = i;
        break;
      }
  cell.reads[slot] = {actor.time, static_cast<uint16_t>(actor.id), location};
  cell.read_masks[slot] = mask;
}

}  // namespace

void check_shared_bounds(const Block& block, uint32_t address, uint32_t bytes, const char* what, Location at) {
  if (address < kSharedBase || uint64_t{address} - kSharedBase + bytes > block.shared_bytes)
    fail("out-of-bounds", at,
         format("a %s of %u bytes at byte %lld of the %u bytes of shared memory", what, bytes,
                static_cast<long long>(address) - kSharedBase, block.shared_bytes));
}

void check_shared_alignment(uint32_t address, uint32_t alignment, const char* what, Location at) {
  if (address & (alignment - 1))
    fail("misaligned", at, format("a %s at byte %lld of shared memory must be at a multiple of %u", what,
                                  static_cast<long long>(address) - kSharedBase, alignment));
}

bool proxy_fenced(const Block& block, const Actor& later, int actor, uint32_t then, bool at_issuer) {
  if (!block.is_thread(actor)) return true;
  const bool own = later.acts_for(actor);
  for (const ProxyFence& fence : block.threads[actor].proxy_fences)
    if (fence.time >= then && (own || fence.time < (*later.known)[actor])) return true;
  if (at_issuer)
    for (int i = later.first; i < later.first + later.count; ++i)
      for (const ProxyFence& fence : block.threads[i].proxy_fences)
        if ((*fence.known)[actor] >= then) return true;
  return false;
}

void check_shared_read(Block& block, uint32_t address, uint32_t bytes, const Actor& actor, Location at) {
  if (!running->options.check) return;
  const uint32_t begin = address - kSharedBase, end = begin + bytes;
  const uint16_t location = number_of(at);
  for (uint32_t word = begin / 4; word < (end + 3) / 4; ++word) {
    SharedCell& cell = block.shared_cells[word];
    const uint8_t mask = byte_mask(word, begin, end);
    if (cell.in_flight != InFlight::no) in_flight(block, "reads", 4 * word, actor, at, cell);
    if (mask & ~cell.initialised)
      fail("uninitialised", at, format("%s reads byte %u of shared memory, which nobody wrote in this block",
                                       block.name_of(actor.id).c_str(), 4 * word));
    if (cell.write.time && (cell.write_mask & mask)) {
      if (!actor.after(cell.write.actor, cell.write.time))
        race(block, "read-after-write", "reads", "wrote", 4 * word, actor, at, cell.write);
      if (actor.async && cell.generic_write && !proxy_fenced(block, actor, cell.write.actor, cell.write.time, false))
        unfenced(block, "reads", "wrote", 4 * word, actor, at, cell.write);
    }
    remember_read(cell, actor, mask, location);
  }
}

void check_shared_write(Block& block, uint32_t address, uint32_t bytes, const Actor& actor, Location at,
                        InFlight flight) {
  if (!running->options.check) return;
  const uint32_t begin = address - kSharedBase, end = begin + bytes;
  const uint16_t location = number_of(at);
  for (uint32_t word = begin / 4; word < (end + 3) / 4; ++word) {
    SharedCell& cell = block.shared_cells[word];
    const uint8_t mask = byte_mask(word, begin, end);
    if (cell.in_flight != InFlight::no) in_flight(block, "writes", 4 * word, actor, at, cell);
    const bool written = cell.write.time && (cell.write_mask & mask);
    if (written && !actor.after(cell.write.actor, cell.write.time))
      race(block, "write-after-write", "writes", "wrote", 4 * word, actor, at, cell.write);
    if (written && actor.async && cell.generic_write &&
        !proxy_fenced(block, actor, cell.write.actor, cell.write.time, true))
      unfenced(block, "overwrites", "wrote", 4 * word, actor, at, cell.write);
    for (int i = 0; i < 4; ++i) {
      SharedCell::Access& read = cell.reads[i];
      if (!read.time || !(cell.read_masks[i] & mask)) continue;
      if (!actor.after(read.actor, read.time))
        race(block, "write-after-read", "writes", "read", 4 * word, actor, at, read);
      if (actor.async && block.is_thread(read.actor) && !proxy_fenced(block, actor, read.actor, read.time, true))
        unfenced(block, "overwrites", "read", 4 * word, actor, at, read);
      if (!(cell.read_masks[i] & ~mask)) read.time = 0;  // whoever comes after the write comes after the read
    }
    const bool same_writer = cell.write.time == actor.time && cell.write.actor == actor.id;
    cell.write_mask = same_writer ? cell.write_mask | mask : mask;
    cell.write = {actor.time, static_cast<uint16_t>(actor.id), location};
    cell.in_flight = flight;
    cell.generic_write = !actor.async;
    cell.initialised |= mask;
  }
}

void arrived_in_shared(Block& block, uint32_t address, uint32_t bytes, uint32_t time) {
  if (!running->options.check) return;
  const uint32_t begin = address - kSharedBase;
  for (uint32_t word = begin / 4; word < (begin + bytes + 3) / 4; ++word) {
    SharedCell& cell = block.shared_cells[word];
    cell.in_flight = InFlight::no;
    if (time) cell.write.time = time;
  }
}

// --- the primitives ---------------------------------------------------------------------------------------

namespace {

// Where the current thread reads what nobody wrote yet, the others go on first: if one of them writes
// it, that is a race, and the race names both lines. The thread comes back when none did.
void let_a_writer_come(Block& block, uint32_t address, uint32_t bytes, Location at) {
  const uint32_t begin = address - kSharedBase, end = begin + bytes;
  bool missing = false;
  for (uint32_t word = begin / 4; word < (end + 3) / 4; ++word) {
    SharedCell& cell = block.shared_cells[word];
    const uint8_t mask = byte_mask(word, begin, end) & ~cell.initialised;
    if (!mask || cell.in_flight != InFlight::no) continue;
    remember_read(cell, current->actor(), mask, number_of(at));
    missing = true;
  }
  if (missing) wait_until_nobody_runs("a read of shared memory that nobody wrote", at);
}

}  // namespace

void load_shared(uint32_t from, void* to, uint32_t bytes, Location at) {
  preempt();
  Block& block = *current->block;
  check_shared_bounds(block, from, bytes, "load", at);
  check_shared_alignment(from, bytes, "load", at);
  if (running->options.check) let_a_writer_come(block, from, bytes, at);
  check_shared_read(block, from, bytes, current->actor(), at);
  count_access(*current->warp, current->lane, at, true, false, from, bytes);
  std::memcpy(to, block.at(from), bytes);
}

void store_shared(uint32_t to, const void* from, uint32_t bytes, Location at) {
  preempt();
  Block& block = *current->block;
  check_shared_bounds(block, to, bytes, "store", at);
  check_shared_alignment(to, bytes, "store", at);
  check_shared_write(block, to, bytes, current->actor(), at);
  count_access(*current->warp, current->lane, at, true, true, to, bytes);
  if (running->spinning && std::memcmp(block.at(to), from, bytes)) memory_changed();
  std::memcpy(block.at(to), from, bytes);
}

void load_matrix_row(uint32_t from, uint16_t (&row)[8], bool transposed, int row_number, Location at) {
  Block& block = *current->block;
  check_shared_bounds(block, from, 16, "row of ldmatrix", at);
  check_shared_alignment(from, 16, "row of ldmatrix", at);
  if (running->options.check) {
    const int first = current->warp->id * 32;
    for (int word = 0; word < 4; ++word) {
      // Transposed, an element of the word goes to each of two lanes.
      const int lane = transposed ? 8 * word + row_number / 2 : 4 * row_number + word;
      check_shared_read(block, from + 4 * word, 4, block.threads[first + lane].actor(), at);
      if (transposed) check_shared_read(block, from + 4 * word, 4, block.threads[first + lane + 4].actor(), at);
    }
  }
  std::memcpy(row, block.at(from), 16);
}

}  // namespace almostgpt::emulator
