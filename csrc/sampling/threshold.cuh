// The value that so many of a row are no less than: of top-k by their number, of top-p by their mass.
#pragma once

#include "device/device.cuh"
#include "sampling/merge.cuh"

namespace almostgpt {

using namespace device;

// Floats as whole numbers in the same order; both zeros are one. -inf is the least, NaN is not asked for.
DEVICE uint32_t key_of(float value) {
  const float canonical = value + 0.0f;
  uint32_t bits;
  memcpy(&bits, &canonical, 4);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}
DEVICE float value_of(uint32_t key) {
  const uint32_t bits = key >> 31 != 0 ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Where a merge goes: two places by turns.
struct Places {
  shared_addr base;
  int turn = 0;

  DEVICE shared_addr next() {
    turn ^= 1;
    return base + turn * kMergeBytes;
  }
};

// What is wanted: a mass of so much, or that share of the mass of all that lie in the first bracket.
struct Goal {
  float amount, share;
};

constexpr int kPivots = 7;

// Of the keys in a bracket: the mass from each pivot up, of all, and the least and the largest of them.
struct Tally {
  float masses[kPivots] = {};
  float all = 0.0f;
  uint32_t least = ~0u, most = 0;

  DEVICE void merge(const Tally& other) {
    UNROLL for (int j = 0; j < kPivots; ++j) masses[j] += other.masses[j];
    all += other.all;
    least = other.least < least ? other.least : least;
    most = other.most > most ? other.most : most;
  }
};

// The largest value whose mass, that of all no less than it, reaches the goal, among those with keys in
// [low, high), of which the whole is taken to reach it and what is above not.
//
// A pass puts seven pivots into the bracket and keeps the eighth that the value is in, narrowed to keys that
// occur; it ends when one key is left. Only what is in the bracket is looked at closely, which soon is
// nearly nothing. Masses are sums in a fixed order, and of more terms never smaller: the same every time.
//
// each(f) calls f(id, value) for the thread's part of the row; weight(value) is a value's mass.
template <class Each, class Weight>
DEVICE float threshold(Each each, Weight weight, uint32_t low, uint32_t high, Goal goal, Places& places) {
  float above = 0.0f, wanted = -1.0f;  // the mass from `high` up
  while (high > low + 1) {
    const uint32_t span = high - low;
    const auto pivot = [&](int j) { return low + static_cast<uint32_t>(uint64_t{span} * (j + 1) >> 3); };
    Tally tally;
    each([&](int, float value) {
      const uint32_t key = key_of(value);
      if (key - low >= span) return;
      const float mass = weight(value);
      UNROLL for (int j = 0; j < kPivots; ++j) tally.masses[j] += key >= pivot(j) ? mass : 0.0f;
      tally.all += mass;
      tally.least = key < tally.least ? key : tally.least;
      tally.most = key > tally.most ? key : tally.most;
    });
    tally = block_merge(tally, places.next());
    if (wanted < 0.0f) wanted = goal.amount + goal.share * tally.all;
    if (tally.least >= tally.most) return value_of(tally.least == tally.most ? tally.least : low);
    int reached = 0;
    UNROLL for (int j = 0; j < kPivots; ++j) reached += above + tally.masses[j] >= wanted ? 1 : 0;
    UNROLL for (int j = 0; j < kPivots; ++j) above += j == reached ? tally.masses[j] : 0.0f;
    const uint32_t new_low = reached > 0 ? pivot(reached - 1) : low;
    high = reached < kPivots ? pivot(reached) : high;
    low = new_low > tally.least ? new_low : tally.least;
    high = high < tally.most + 1 ? high : tally.most + 1;
  }
  return value_of(low);
}

}  // namespace almostgpt
