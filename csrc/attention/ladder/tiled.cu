// Attention, step 2 of 3: FlashAttention. No score leaves the registers, and one kernel does it all.
//
// A softmax seems to need its whole row first, for the maximum and for the sum. It does not. Keep of the keys so
// far the largest score m, the sum l of exp(s - m), and the sum o of exp(s - m) v. When a larger score m' comes,
// exp(s - m') = exp(s - m) exp(m - m'): so l and o are multiplied by exp(m - m'), and go on as if m' had been
// the largest all the time. After the last key the row of out is o / l.
// Source: Dao et al., "FlashAttention", arXiv:2205.14135.
//
// A block takes 64 queries of a head, and brings K and V through shared memory in tiles of 64 keys. What a head of
// T positions and width D costs (causal: about half of what is T²):
//
//   FLOPs               4 T² D, as in step 1, and a few for each score
//   bytes of global     Q and out once, 4 T D; K and V once for 64 queries, 4 T D · T / 64 = T² D / 16
//   memory beside them  none
//
// So 64 FLOPs for every byte, where step 1 had 0.4: memory now waits for the arithmetic (from 14 on, H200). And that
// is plain: two FLOPs an FMA, 67 TFLOP/s at best, less since every number of K and V is first made a float, one
// conversion for each FMA. The tensor cores of the same card take 16-bit numbers as they are and do 989 TFLOP/s.
// Step 3 gives them both products, and lets cp.async bring the next tile while they work on this one. It still is
// this loop.

#include <cmath>

#include "attention/ladder/ladder.h"
#include "device/device.cuh"

namespace almostgpt::ladder {
namespace {

using namespace device;

template <class T> struct Tiled {
  Global<const T> q, k, v;
  Global<T> out;
  int length, width;
  int blocks_per_head;
  float scale;
  bool causal;
};

constexpr int kQueries = 64;            // of a block
constexpr int kKeys = 64;               // of a tile
constexpr int kThreads = 4 * kQueries;  // each has a quarter of its query's row, and of that row of out
constexpr int kAtOnce = 16;             // keys whose scores are in registers: o is rescaled once for them

// The tile's rows have W elements: the width, and zeros up to a multiple of the four threads' vectors.
template <int W> constexpr uint32_t kTileBytes = kKeys * W * 2;

// 64 rows from `first` on; beyond the last one, and beyond the width, zeros.
template <int W, class T>
DEVICE void load_tile(shared_addr tile, Global<const T> matrix, int first, const Tiled<T>& a) {
  constexpr int vectors = W / 8;
  for (int i = thread_id(); i < kKeys * vectors; i += kThreads) {
    const int row = first + i / vectors, column = i % vectors * 8;
    const bool inside = row < a.length && column < a.width;
    const auto load = [&] { return load_global_as<u32x4>(matrix + (int64_t{row} * a.width + column)); };
    store_shared(tile + 16 * i, inside ? load() : u32x4{});
  }
}

template <class T, int W> KERNEL LAUNCH_BOUNDS(kThreads, 2) tiled_kernel(GRID_CONSTANT const Tiled<T> a) {
  const shared_addr k_tile = shared_base(), v_tile = k_tile + kTileBytes<W>;
  const int head = block_x() / a.blocks_per_head, first_query = block_x() % a.blocks_per_head * kQueries;
  const int query = first_query + thread_id() / 4;
  const int64_t offset = int64_t{head} * a.length * a.width, row = offset + int64_t{query} * a.width;

  // A thread has every fourth vector of a row. So the four of a query read 64 bytes side by side, and as the
  // eight queries of a warp all read the same key, no two of its lanes want different words of a bank.
  constexpr int vectors = W / 32;
  const auto column = [](int j) { return 8 * (thread_id() % 4 + 4 * j); };
  const auto mine = [&](int j) { return query < a.length && column(j) < a.width; };
  const auto load = [&](shared_addr tile, int key, int j, float (&values)[8]) {
    unpack<T>(load_shared<u32x4>(tile + 2 * (key * W + column(j))), values);
  };

  float q[vectors][8] = {}, o[vectors][8] = {}, largest = -INFINITY, sum = 0.0f;
  UNROLL for (int j = 0; j < vectors; ++j) {
    if (mine(j)) unpack<T>(load_global_as<u32x4>(a.q + (row + column(j))), q[j]);
    // exp(x) is exp2(x log2 e): the factor is applied here, once, and not to every score.
    UNROLL for (int i = 0; i < 8; ++i) q[j][i] *= 1.44269504f * a.scale;
  }

  // How many keys the query sees, and how many the last query of the block does. A query beyond the end
  // (of the last block) goes along as a row of zeros, and is not written.
  const int seen = a.causal ? min(query + 1, a.length) : a.length;
  const int end = a.causal ? min(first_query + kQueries, a.length) : a.length;
  for (int first = 0; first < end; first += kKeys) {
    cta_sync();  // nobody reads the tiles before these any more
    load_tile<W>(k_tile, a.k + offset, first, a);
    load_tile<W>(v_tile, a.v + offset, first, a);
    cta_sync();  // and now everybody's part of these is there

    for (int key = 0; key < min(kKeys, end - first); key += kAtOnce) {
      const float largest_before = largest;
      float s[kAtOnce];
      UNROLL for (int n = 0; n < kAtOnce; ++n) {
        float dot = 0.0f;
        UNROLL for (int j = 0; j < vectors; ++j) {
          float k[8];
          load(k_tile, key + n, j, k);
          UNROLL for (int i = 0; i < 8; ++i) dot += q[j][i] * k[i];
        }
        dot = warp_sum<4>(dot);  // the other three quarters
        s[n] = first + key + n < seen ? dot : -INFINITY;
        largest = max(largest, s[n]);
      }

      // The first key is seen by every query: `largest` is a number from the first round on, and what is
      // not seen counts exp2(-infinity) = 0.
      const float rescale = exp2_approx(largest_before - largest);
      sum *= rescale;
      UNROLL for (int j = 0; j < vectors; ++j)
        UNROLL for (int i = 0; i < 8; ++i) o[j][i] *= rescale;
      UNROLL for (int n = 0; n < kAtOnce; ++n) {
        const float p = exp2_approx(s[n] - largest);
        sum += p;
        UNROLL for (int j = 0; j < vectors; ++j) {
          float v[8];
          load(v_tile, key + n, j, v);
          UNROLL for (int i = 0; i < 8; ++i) o[j][i] += p * v[i];
        }
      }
    }
  }

  const float inverse = rcp_approx(sum);
  UNROLL for (int j = 0; j < vectors; ++j) {
    UNROLL for (int i = 0; i < 8; ++i) o[j][i] *= inverse;
    if (mine(j)) store_global_as<u32x4>(a.out + (row + column(j)), pack<T>(o[j]));
  }
}

template <class T> int run(const Attention& a, void* stream) {
  const auto input = [](const void* data) { return Global(static_cast<const T*>(data)); };
  const int blocks = static_cast<int>((a.length + kQueries - 1) / kQueries);
  const Tiled<T> tiled{input(a.q), input(a.k), input(a.v), Global(static_cast<T*>(a.out)),
                       static_cast<int>(a.length), static_cast<int>(a.width), blocks, a.scale, a.causal};
  const auto go = [&](auto width) {
    constexpr int W = decltype(width)::value;
    const LaunchShape shape{{static_cast<unsigned>(a.heads * blocks)}, kThreads, 2 * kTileBytes<W>};
    return launch<tiled_kernel<T, W>>(shape, stream, tiled);
  };
  if (a.width <= 32) return go(std::integral_constant<int, 32>());
  if (a.width <= 64) return go(std::integral_constant<int, 64>());
  return go(std::integral_constant<int, 128>());
}

}  // namespace

int attention_tiled(const Attention& attention, void* stream) {
  if (attention.heads * attention.length == 0) return 0;
  return attention.dtype == DType::bfloat16 ? run<bf16>(attention, stream) : run<fp16>(attention, stream);
}

}  // namespace almostgpt::ladder
