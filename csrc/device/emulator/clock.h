// Vector clocks: who knows what of whom. An access comes before another if whoever makes the second
// knows of the first; two conflicting accesses of which neither comes before the other are a race.
//
// The actors of a block are its threads and its agents (agents do what is asynchronous: TMA, wgmma).
// A Clock says how far each actor of one block is known to have come. What is known of other blocks,
// through global memory, hangs on it as Knowledge. Both are shared and copied on write.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace almostgpt::emulator {

class Clock;

// A counted reference to a clock.
class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* clock) : clock_(clock) {}  // takes over one reference
  inline ClockRef(const ClockRef& other);
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  inline ~ClockRef();
  ClockRef& operator=(ClockRef other) {
    std::swap(clock_, other.clock_);
    return *this;
  }
  void reset() { *this = ClockRef(); }
  Clock* get() const { return clock_; }
  Clock* operator->() const { return clock_; }
  Clock& operator*() const { return *clock_; }
  explicit operator bool() const { return clock_ != nullptr; }
  bool operator==(const ClockRef& other) const { return clock_ == other.clock_; }

 private:
  Clock* clock_ = nullptr;
};

// The clocks of blocks by their index, in its order.
using Knowledge = std::vector<std::pair<uint32_t, ClockRef>>;
using KnowledgeRef = std::shared_ptr<const Knowledge>;

class Clock {
 public:
  // How many actors a block of the running launch has. Call between launches: every clock is void.
  static void set_actors(int actors);
  static int actors() { return actors_; }

  static ClockRef zero();
  static ClockRef copy(const Clock& other);

  uint32_t& operator[](int actor) { return reinterpret_cast<uint32_t*>(this + 1)[actor]; }
  uint32_t operator[](int actor) const { return reinterpret_cast<const uint32_t*>(this + 1)[actor]; }

  // From now on it knows what `other` does. Only of a clock that nobody else refers to.
  void join(const Clock& other);
  bool knows_all_of(const Clock& other) const;
  // Whether what `actor` of the other block did at `time` is known.
  bool knows(uint32_t block, int actor, uint32_t time) const;

  KnowledgeRef others;  // of other blocks; null: nothing

 private:
  friend class ClockRef;
  static ClockRef take();
  void drop();

  static int actors_;
  uint32_t references_ = 0;
};

inline ClockRef::ClockRef(const ClockRef& other) : clock_(other.clock_) {
  if (clock_) ++clock_->references_;
}
inline ClockRef::~ClockRef() {
  if (clock_ && --clock_->references_ == 0) clock_->drop();
}

// What two know together; either may be null.
KnowledgeRef join(const KnowledgeRef& a, const KnowledgeRef& b);
// The clock of a block in it, or null.
const ClockRef* find(const KnowledgeRef& knowledge, uint32_t block);
// The same without that block.
KnowledgeRef without(const KnowledgeRef& knowledge, uint32_t block);

// The join of everything that arrived: at a barrier, the same clock arrives many times in a row.
class Arrivals {
 public:
  void add(const ClockRef& clock);
  const ClockRef& joined() const { return joined_; }
  ClockRef& joined() { return joined_; }
  void reset() {
    joined_.reset();
    last_.reset();
  }

 private:
  ClockRef joined_, last_;
};

}  // namespace almostgpt::emulator
