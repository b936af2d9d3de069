// Attention over parts of the keys, put together: of each part the normalised sum, and its lse, the
// logarithm of what it was divided by, here to base 2.
#pragma once

#include "attention/scores.cuh"
#include "device/device.cuh"

namespace almostgpt {

using namespace device;

struct alignas(8) FloatPair { float x, y; };

struct Merged {
  f32x4 value;
  float lse;
};

// Of `parts` parts: lse(i), and part(i) gives four columns of its sum. With a sink's logit (in log2;
// kMinusInfinity: none) as one part more that has no value.
template <class Lse, class Part>
DEVICE Merged merge(int parts, float sink, Lse lse, Part part) {
  float top = sink;
  UNROLL_BY(4) for (int i = 0; i < parts; ++i) top = max(top, lse(i));
  if (top == kMinusInfinity) top = 0.0f;  // nobody saw a key; or there is a NaN, which the sums below keep
  float total = exp2_approx(sink - top);
  f32x4 sum{};
  UNROLL_BY(4)
  for (int i = 0; i < parts; ++i) {
    const float weight = exp2_approx(lse(i) - top);
    const f32x4 value = part(i);
    total += weight;
    sum.x += weight * value.x, sum.y += weight * value.y, sum.z += weight * value.z, sum.w += weight * value.w;
  }
  if (total == 0.0f) return {sum, kMinusInfinity};
  const float share = rcp_approx(total);
  return {{sum.x * share, sum.y * share, sum.z * share, sum.w * share}, top + log2_approx(total)};
}

// What the warps of a block have of 16 rows, in shared memory.
template <int head_dim, bool int8, int warps, int stride>
struct WarpSums {
  shared_addr base;  // a warp's rows after the other's, and then the lse of all

  DEVICE shared_addr row(int warp, int row) const { return base + (warp * 16 + row) * (stride * 4); }
  DEVICE shared_addr lse(int warp, int row) const { return base + (warps * 16 * stride + warp * 16 + row) * 4; }

  // A warp's rows `half` x 8 to + 7 of a fragment, each multiplied by its weight; lse to base e.
  template <int out_tiles>
  DEVICE void store(int warp, int half, float lse_e, float weight, const float (&out)[out_tiles][4]) const {
    const int here = half * 8 + lane_id() / 4, t = lane_id() % 4;
    if (t == 0) store_shared<float>(lse(warp, here), lse_e * kLog2E);
    if constexpr (int8) {  // even columns in one fragment, odd ones in the next
      UNROLL for (int d = 0; d < out_tiles; d += 2) {
        const float(&even)[4] = out[d];
        const float(&odd)[4] = out[d + 1];
        store_shared<f32x4>(row(warp, here) + (8 * d + 4 * t) * 4,
                            {even[2 * half] * weight, odd[2 * half] * weight, even[2 * half + 1] * weight,
                             odd[2 * half + 1] * weight});
      }
    } else {
      UNROLL for (int d = 0; d < out_tiles; ++d)
        store_shared<FloatPair>(row(warp, here) + (8 * d + 2 * t) * 4,
                           {out[d][2 * half] * weight, out[d][2 * half + 1] * weight});
    }
  }

  DEVICE Merged merged(int row, int column, float sink) const {
    return merge(
        warps, sink, [&](int warp) { return load_shared<float>(lse(warp, row)); },
        [&](int warp) { return load_shared<f32x4>(this->row(warp, row) + column * 4); });
  }
};

// What blocks that share the keys of a group of rows have, in global memory.
struct SplitSums {
  Global<float> sums;        // (groups, splits, rows, columns)
  Global<float> lse;         // (groups, splits, rows)
  Global<uint32_t> tickets;  // (groups,): how many of a group's blocks are done; zeros before and after

  DEVICE void store(int64_t group, int split, int splits, int rows, int row, int column, int columns,
                    const Merged& merged) const {
    const int64_t at = (group * splits + split) * rows + row;
    store_global_as<f32x4>(sums + (at * columns + column), merged.value);
    if (column == 0) store_global(lse + at, merged.lse);
  }

  // By all threads of a block that has stored its part: whether it is the last one, and so sees all parts.
  DEVICE bool last(int64_t group, int splits, shared_addr memory) const {
    cta_sync();
    if (thread_id() == 0) {
      const uint32_t ticket = atomic_add_acq_rel(tickets + group, 1u);
      store_shared<uint32_t>(memory, ticket);
      if (ticket == static_cast<uint32_t>(splits) - 1) store_relaxed(tickets + group, 0u);
    }
    cta_sync();
    return load_shared<uint32_t>(memory) == static_cast<uint32_t>(splits) - 1;
  }

  DEVICE Merged merged(int64_t group, int splits, int rows, int row, int column, int columns, float sink) const {
    const auto at = [&](int split) { return (group * splits + split) * rows + row; };
    return merge(
        splits, sink, [&](int split) { return load_global(lse + at(split)); },
        [&](int split) { return load_global_as<f32x4>(sums + (at(split) * columns + column)); });
  }
};

}  // namespace almostgpt
