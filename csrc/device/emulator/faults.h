// Faults that are planted while a kernel runs, to see that a test or a check notices them.
//
// Every call of a synchronising primitive in the source is a site. inject() drops or weakens the call at
// one of them. Most need Asynchrony::late to show: what happens early is right without its wait.
#pragma once

#include <initializer_list>
#include <vector>

#include "device/emulator/location.h"

namespace almostgpt::emulator {

enum class Mutation : uint8_t {
  none,
  drop,       // the call is not made
  lax,        // one group more may be under way
  parity,     // the other one
  bytes,      // 16 fewer expected
  relaxed,    // without acquire and release
  stride,     // half the stride offset of the descriptor of B
  arrive_twice,  // "double"
};

// A primitive that can be mutated. Each has one, static, where it is implemented.
class Fault {
 public:
  Fault(const char* primitive, std::initializer_list<const char*> mutations);
  // What to do at that call; remembers the site.
  Mutation at(Location location) const {
    const Recent& slot = recent_[static_cast<unsigned>(location.line) % kRecent];
    if (slot.location == location && slot.generation == generation_) return slot.mutation;
    return look_up(location);
  }

  const char* const primitive;
  const std::vector<const char*> mutations;

  // Sites have been forgotten, or another mutation is injected.
  static void forget_recent() { ++generation_; }

 private:
  static constexpr unsigned kRecent = 64;
  struct Recent {
    Location location;
    uint32_t generation = 0;
    Mutation mutation = Mutation::none;
  };
  Mutation look_up(Location location) const;

  static uint32_t generation_;
  mutable Recent recent_[kRecent];
};

void forget_sites();

}  // namespace almostgpt::emulator
