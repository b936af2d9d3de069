// The shadow of shared memory: every access of a thread or an agent is checked here.
#pragma once

#include "device/emulator/block.h"

namespace almostgpt::emulator {

void check_shared_bounds(const Block& block, uint32_t address, uint32_t bytes, const char* what, Location at);
void check_shared_alignment(uint32_t address, uint32_t alignment, const char* what, Location at);

// Who reads or writes is checked against who did before, and remembered. Without options().check: nothing.
void check_shared_read(Block& block, uint32_t address, uint32_t bytes, const Actor& actor, Location at);
void check_shared_write(Block& block, uint32_t address, uint32_t bytes, const Actor& actor, Location at,
                        InFlight in_flight = InFlight::no);
// What was in flight there has arrived; its write counts as made at that time, if one is given.
void arrived_in_shared(Block& block, uint32_t address, uint32_t bytes, uint32_t time = 0);

// Whether a proxy fence lies between what `actor` did at `then` and `later`: called by who did it, after
// it, and known to `later`; or, where `at_issuer`, by the thread behind `later` once it knew of it.
bool proxy_fenced(const Block& block, const Actor& later, int actor, uint32_t then, bool at_issuer);

// The bytes of word number `word` that [begin, end) covers, as a mask.
inline uint8_t byte_mask(uint64_t word, uint64_t begin, uint64_t end) {
  uint32_t mask = 15;
  if (begin > 4 * word) mask &= 15u << (begin - 4 * word);
  if (end < 4 * word + 4) mask &= (1u << (end - 4 * word)) - 1;
  return static_cast<uint8_t>(mask);
}

}  // namespace almostgpt::emulator
