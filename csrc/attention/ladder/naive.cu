// Attention, step 1 of 3: the textbook. A kernel for each line of the formula,
//
//   S = Q Kᵀ scale      P = softmax(S), row by row      out = P V
//
// and between them S, T x T floats for each head, goes to global memory and comes back.
//
// What a head of T positions and width D costs (causal: half of it):
//
//   FLOPs             2 T² D for S, 2 T² D for P V
//   bytes asked for   4 T² D + 4 T²    each element of S reads a row of Q and one of K, and is written
//                     16 T²            the softmax reads S three times and writes P in its place
//                     6 T² D           each element of out reads a row of P and a column of V
//
// 2.5 bytes for every FLOP, on cards that do some 14 FLOPs of fp32 in the time of one byte (H200: 67 TFLOP/s,
// 4.8 TB/s). Most of these bytes the caches have. Not S: 64 heads of 2,048 positions make 1 GiB of it, which is
// written, read and written again, and read, while Q, K, V and out are 134 MB in all (D = 128). And it grows with T².
//
// Step 2 never writes S down, and reads a row of K and V once for 64 queries.

#include <cmath>

#include "attention/ladder/ladder.h"
#include "device/device.cuh"

namespace almostgpt::ladder {
namespace {

using namespace device;

template <class T> struct Textbook {
  Global<const T> q, k, v;
  Global<float> scores;  // S, then P
  Global<T> out;
  int length, width;
  float scale;
  bool causal;

  // Queries are numbered through all the heads, and so are the rows of S.
  DEVICE int head(int row) const { return row / length; }
  DEVICE int seen_keys(int row) const { return causal ? row % length + 1 : length; }
  DEVICE Global<const T> of_head(Global<const T> tensor, int head) const {
    return tensor + int64_t{head} * length * width;
  }
  DEVICE Global<float> scores_of(int row) const { return scores + int64_t{row} * length; }
};

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A block takes 256 elements of a row of S, a thread one.
template <class T> KERNEL LAUNCH_BOUNDS(kThreads, 4) scores_kernel(GRID_CONSTANT const Textbook<T> a) {
  const int row = block_x(), key = block_y() * kThreads + thread_id();
  if (key >= a.seen_keys(row)) return;
  const Global<const T> q = a.q + int64_t{row} * a.width;
  const Global<const T> k = a.of_head(a.k, a.head(row)) + int64_t{key} * a.width;
  float score = 0.0f;
  for (int d = 0; d < a.width; d += 8) {
    float left[8], right[8];
    unpack<T>(load_global_as<u32x4>(q + d), left);  // 16 bytes at once
    unpack<T>(load_global_as<u32x4>(k + d), right);
    UNROLL for (int i = 0; i < 8; ++i) score += left[i] * right[i];
  }
  store_global(a.scores_of(row) + key, a.scale * score);
}

// A warp takes a row: its largest score, the sum of exp(score - largest), and the row again to divide.
// (The largest, so that no exp is beyond a float.)
template <class T> KERNEL LAUNCH_BOUNDS(kThreads, 4) softmax_kernel(GRID_CONSTANT const Textbook<T> a, int rows) {
  const int row = block_x() * kWarps + warp_id();
  if (row >= rows) return;
  const int keys = a.seen_keys(row);
  const Global<float> scores = a.scores_of(row);
  const auto exponential = [](float x) { return exp2_approx(1.44269504f * x); };  // eˣ = 2^(x log2 e)

  float largest = -INFINITY, sum = 0.0f;
  for (int key = lane_id(); key < keys; key += 32) largest = max(largest, load_global(scores + key));
  largest = warp_max(largest);
  for (int key = lane_id(); key < keys; key += 32) sum += exponential(load_global(scores + key) - largest);
  const float inverse = rcp_approx(warp_sum(sum));
  for (int key = lane_id(); key < keys; key += 32)
    store_global(scores + key, inverse * exponential(load_global(scores + key) - largest));
}

// A block takes a row of out, a thread an element.
template <class T> KERNEL LAUNCH_BOUNDS(128, 8) output_kernel(GRID_CONSTANT const Textbook<T> a) {
  const int row = block_x(), d = thread_id();
  if (d >= a.width) return;
  const Global<float> p = a.scores_of(row);
  const Global<const T> v = a.of_head(a.v, a.head(row)) + d;
  float out = 0.0f;
  for (int key = 0; key < a.seen_keys(row); ++key)
    out += load_global(p + key) * to_float(load_global(v + int64_t{key} * a.width));
  store_global(a.out + (int64_t{row} * a.width + d), round_to<T>(out));
}

template <class T> int run(const Attention& a, float* scores, void* stream) {
  const auto input = [](const void* data) { return Global(static_cast<const T*>(data)); };
  const Textbook<T> textbook{input(a.q), input(a.k), input(a.v), Global(scores), Global(static_cast<T*>(a.out)),
                             static_cast<int>(a.length), static_cast<int>(a.width), a.scale, a.causal};
  const auto blocks = [](int64_t work, int each) { return static_cast<unsigned>((work + each - 1) / each); };
  const int64_t rows = a.heads * a.length;
  const unsigned row_blocks = blocks(rows, 1);
  const LaunchShape for_scores{{row_blocks, blocks(a.length, kThreads)}, kThreads};
  const LaunchShape for_softmax{{blocks(rows, kWarps)}, kThreads};
  const LaunchShape for_output{{row_blocks}, (textbook.width + 31) / 32 * 32};
  // One after the other in the stream: a kernel begins when all blocks of the one before it are done.
  if (const int error = launch<scores_kernel<T>>(for_scores, stream, textbook)) return error;
  if (const int error = launch<softmax_kernel<T>>(for_softmax, stream, textbook, static_cast<int>(rows))) return error;
  return launch<output_kernel<T>>(for_output, stream, textbook);
}

}  // namespace

int attention_naive(const Attention& attention, float* scores, void* stream) {
  if (attention.heads * attention.length == 0) return 0;
  return attention.dtype == DType::bfloat16 ? run<bf16>(attention, scores, stream)
                                            : run<fp16>(attention, scores, stream);
}

}  // namespace almostgpt::ladder
