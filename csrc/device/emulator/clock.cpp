#include "device/emulator/clock.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace almostgpt::emulator {
namespace {

// Clocks are carved from slabs. Whatever a failed launch left behind in abandoned fibers is free
// again when the slabs are carved anew.
constexpr size_t kSlabBytes = 1 << 18;

struct Pool {
  std::vector<std::unique_ptr<char[]>> slabs;
  size_t slabs_used = 0, offset = 0, clock_bytes = 0;
  std::vector<Clock*> carved, free;
};

Pool& pool() {
  static Pool& all = *new Pool;  // outlives every static clock reference
  return all;
}

}  // namespace

int Clock::actors_ = 0;

void Clock::set_actors(int actors) {
  Pool& p = pool();
  for (Clock* clock : p.carved) clock->others.reset();
  p.carved.clear();
  p.free.clear();
  // Memory of an unusually large launch goes back.
  if (p.slabs.size() > 64) p.slabs.resize(64);
  p.slabs_used = p.offset = 0;
  actors_ = (actors + 7) & ~7;
  p.clock_bytes = (sizeof(Clock) + actors_ * sizeof(uint32_t) + 15) & ~size_t{15};
}

ClockRef Clock::take() {
  Pool& p = pool();
  Clock* clock;
  if (!p.free.empty()) {
    clock = p.free.back();
    p.free.pop_back();
  } else {
    if (p.slabs_used == 0 || p.offset + p.clock_bytes > kSlabBytes) {
      if (p.slabs_used == p.slabs.size()) p.slabs.push_back(std::make_unique<char[]>(kSlabBytes));
      ++p.slabs_used;
      p.offset = 0;
    }
    clock = new (p.slabs[p.slabs_used - 1].get() + p.offset) Clock;
    p.offset += p.clock_bytes;
    p.carved.push_back(clock);
  }
  clock->references_ = 1;
  return ClockRef(clock);
}

void Clock::drop() {
  others.reset();
  pool().free.push_back(this);
}

ClockRef Clock::zero() {
  ClockRef clock = take();
  std::memset(&(*clock)[0], 0, actors_ * sizeof(uint32_t));
  return clock;
}

ClockRef Clock::copy(const Clock& other) {
  ClockRef clock = take();
  std::memcpy(&(*clock)[0], reinterpret_cast<const uint32_t*>(&other + 1), actors_ * sizeof(uint32_t));
  clock->others = other.others;
  return clock;
}

void Clock::join(const Clock& other) {
  uint32_t* __restrict to = &(*this)[0];
  const uint32_t* __restrict from = reinterpret_cast<const uint32_t*>(&other + 1);
  for (int i = 0; i < actors_; ++i) to[i] = std::max(to[i], from[i]);
  if (other.others) others = emulator::join(others, other.others);
}

bool Clock::knows_all_of(const Clock& other) const {
  if (other.others && other.others != others) return false;  // perhaps; a join finds out
  for (int i = 0; i < actors_; ++i)
    if ((*this)[i] < other[i]) return false;
  return true;
}

bool Clock::knows(uint32_t block, int actor, uint32_t time) const {
  const ClockRef* clock = find(others, block);
  return clock && (**clock)[actor] >= time;
}

const ClockRef* find(const KnowledgeRef& knowledge, uint32_t block) {
  if (!knowledge) return nullptr;
  auto found = std::lower_bound(knowledge->begin(), knowledge->end(), block,
                                [](const auto& entry, uint32_t index) { return entry.first < index; });
  return found != knowledge->end() && found->first == block ? &found->second : nullptr;
}

KnowledgeRef without(const KnowledgeRef& knowledge, uint32_t block) {
  if (!find(knowledge, block)) return knowledge;
  auto rest = std::make_shared<Knowledge>();
  for (const auto& entry : *knowledge)
    if (entry.first != block) rest->push_back(entry);
  return rest->empty() ? nullptr : rest;
}

KnowledgeRef join(const KnowledgeRef& a, const KnowledgeRef& b) {
  if (!b || a == b) return a;
  if (!a) return b;
  auto all = std::make_shared<Knowledge>();
  all->reserve(a->size() + b->size());
  auto i = a->begin(), j = b->begin();
  while (i != a->end() || j != b->end()) {
    if (j == b->end() || (i != a->end() && i->first < j->first)) {
      all->push_back(*i++);
    } else if (i == a->end() || j->first < i->first) {
      all->push_back(*j++);
    } else {
      ClockRef both = i->second;
      if (!(i->second == j->second) && !i->second->knows_all_of(*j->second)) {
        if (j->second->knows_all_of(*i->second)) {
          both = j->second;
        } else {
          both = Clock::copy(*i->second);
          both->join(*j->second);
        }
      }
      all->emplace_back(i->first, std::move(both));
      ++i, ++j;
    }
  }
  return all;
}

void Arrivals::add(const ClockRef& clock) {
  if (!joined_) joined_ = Clock::zero();
  if (last_ == clock) return;
  joined_->join(*clock);
  last_ = clock;
}

}  // namespace almostgpt::emulator
