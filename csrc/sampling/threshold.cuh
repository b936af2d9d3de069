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

constexpr int kPivots = 7;

// Of the keys in a bracket: the mass from each pivot up, and the least and the largest of them.
template <class Mass>
struct Tally {
  Mass masses[kPivots] = {};
  uint32_t least = ~0u, most = 0;

  DEVICE void merge(const Tally& other) {
    UNROLL for (int j = 0; j < kPivots; ++j) masses[j] += other.masses[j];
    least = other.least < least ? other.least : least;
    most = other.most > most ? other.most : most;
  }
};

// The largest value such that those no less than it have the mass wanted(of all); the least if none has.
//
// A pass puts seven pivots into a bracket of keys, the first at its lower end, and keeps the seventh that the
// value is in, narrowed to keys that occur; it ends when one key is left. Only what is in the bracket is
// looked at closely, which soon is nearly nothing. Two passes divide the bracket by value, since that is how
// logits lie; then by key, so that none needs more than twelve further ones. Masses are whole numbers, exact in
// any order: what is found depends on the values alone.
//
// each(f) calls f(id, value) for the thread's part of the row; weight(value) is a value's mass; `low` is the
// key of the least value that counts, and those of all values are below `high`.
template <class Mass, class Each, class Weight, class Wanted>
DEVICE float threshold(Each each, Weight weight, Wanted wanted, uint32_t low, uint32_t high) {
  Mass above = 0, goal = 0;  // `above`: the mass from `high` up
  for (int pass = 0; high > low + 1; ++pass) {
    const uint32_t span = high - low;
    const float bottom = value_of(low), step = (value_of(high - 1) - bottom) * (1.0f / kPivots);
    const bool by_value = pass < 2 && step < INFINITY;
    uint32_t pivots[kPivots];
    UNROLL for (int j = 0; j < kPivots; ++j)
      pivots[j] = by_value ? key_of(bottom + step * j) : low + static_cast<uint32_t>(uint64_t{span} * j / kPivots);
    Tally<Mass> tally;
    each([&](int, float value) {
      const uint32_t key = key_of(value);
      if (key - low >= span) return;
      const Mass mass = weight(value);
      UNROLL for (int j = 0; j < kPivots; ++j) tally.masses[j] += key >= pivots[j] ? mass : 0;
      tally.least = key < tally.least ? key : tally.least;
      tally.most = key > tally.most ? key : tally.most;
    });
    tally = block_merge(tally);
    if (pass == 0) goal = wanted(tally.masses[0]);
    if (tally.least >= tally.most) return value_of(tally.least == tally.most ? tally.least : low);
    // The bracket from the last pivot that reaches the goal to the next.
    uint32_t new_low = tally.least, new_high = tally.most + 1;
    Mass beyond = 0;
    UNROLL for (int j = kPivots - 1; j >= 0; --j) {
      if (above + tally.masses[j] >= goal) new_low = pivots[j] > new_low ? pivots[j] : new_low;
      else if (pivots[j] < new_high) new_high = pivots[j], beyond = tally.masses[j];
    }
    low = new_low, high = new_high, above += beyond;
  }
  return value_of(low);
}

}  // namespace almostgpt
