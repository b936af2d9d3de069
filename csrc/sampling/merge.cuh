// What the threads of a block found, merged in a fixed order: the draw, the sum of exponentials, and any
// other struct of 4-byte members with a neutral default and a `merge` that does not mind the order of two.
#pragma once

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

constexpr float kLog2e = 1.442695041f, kLn2 = 0.693147181f;

// The largest logit + noise so far. `error` is what the sum lost to rounding: noise that a low temperature
// makes tiny still decides among equal logits. The order is total, so it does not matter who came first.
struct Choice {
  float sum = -INFINITY, error = INFINITY;
  int id = 0;

  DEVICE bool beats(const Choice& other) const {
    if (sum != other.sum) return sum > other.sum;
    return error > other.error || (error == other.error && id < other.id);
  }
  DEVICE void merge(const Choice& other) {
    if (other.beats(*this)) *this = other;
  }
  // NaN is above all, so that it shows; of what is infinite the noise decides; -inf never comes in.
  DEVICE void offer(float logit, float noise, int token) {
    const float total = logit + noise;
    if (total < sum) return;  // nearly always
    const float back = total - logit;
    float lost = (logit - (total - back)) + (noise - back);  // Knuth's TwoSum
    if (total == INFINITY) lost = noise;
    Choice offered;
    offered.sum = total == total ? total : INFINITY;
    offered.error = total == total ? lost : INFINITY;
    offered.id = token;
    if (total != -INFINITY) merge(offered);
  }
};

// ln of a sum of exponentials, seen piece by piece.
struct LogSum {
  float largest = -INFINITY, sum = 0.0f;

  DEVICE static float exp_of(float x, float largest) {
    return exp2_approx((x - (largest == -INFINITY ? 0.0f : largest)) * kLog2e);
  }
  template <int n> DEVICE void add(const float (&values)[n]) {
    float most = largest;
    UNROLL for (int i = 0; i < n; ++i) most = max(most, values[i]);
    sum *= exp_of(largest, most);
    UNROLL for (int i = 0; i < n; ++i) sum += exp_of(values[i], most);
    largest = most;
  }
  DEVICE void merge(const LogSum& other) {
    const float most = max(largest, other.largest);
    sum = sum * exp_of(largest, most) + other.sum * exp_of(other.largest, most);
    largest = most;
  }
  DEVICE float log_probability(float logit) const { return (logit - largest) - kLn2 * log2_approx(sum); }
};

template <class S> constexpr int kWords = sizeof(S) / 4;

template <class S> DEVICE S warp_merge(S mine) {
  UNROLL for (int bits = 16; bits > 0; bits /= 2) {
    uint32_t words[kWords<S>];
    memcpy(words, &mine, sizeof(S));
    UNROLL for (int i = 0; i < kWords<S>; ++i) words[i] = shfl_xor(words[i], bits);
    S other;
    memcpy(&other, words, sizeof(S));
    mine.merge(other);
  }
  return mine;
}

// Shared memory of a merge: a column for each warp, and one for the outcome.
constexpr int kMaxWarps = 32, kMaxWords = 16, kColumns = kMaxWarps + 1;
constexpr uint32_t kMergeBytes = (kMaxWords * kColumns * 4 + 15) / 16 * 16;

// In all threads, over the warps by the first of them: shuffles have one unit, and all warps doing the same
// would wait for it.
template <class S> DEVICE S block_merge(S mine) {
  static_assert(kWords<S> <= kMaxWords);
  const auto place = [](int word, int column) { return shared_base() + 4 * (word * kColumns + column); };
  const auto store = [&](const S& from, int column) {
    uint32_t words[kWords<S>];
    memcpy(words, &from, sizeof(S));
    UNROLL for (int i = 0; i < kWords<S>; ++i) store_shared(place(i, column), words[i]);
  };
  const auto load = [&](int column) {
    uint32_t words[kWords<S>];
    UNROLL for (int i = 0; i < kWords<S>; ++i) words[i] = load_shared<uint32_t>(place(i, column));
    S found;
    memcpy(&found, words, sizeof(S));
    return found;
  };
  mine = warp_merge(mine);
  if (lane_id() == 0) store(mine, warp_id());
  cta_sync();
  if (warp_id() == 0) {
    S all = warp_merge(lane_id() < block_size() / 32 ? load(lane_id()) : S());
    if (lane_id() == 0) store(all, kMaxWarps);
  }
  cta_sync();
  return load(kMaxWarps);
}

}  // namespace almostgpt
