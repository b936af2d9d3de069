#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kv_cache.h"

namespace almostgpt::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Values are added up in parts of so many keys: short sums round less.
constexpr int64_t kPart = 128;

// Slots next to each other that hold tokens next to each other, each seen by some query.
struct Run {
  int64_t slot, position, count;
};

// Of the queries at [first, last]: the sinks, and the ring in one piece or two.
std::vector<Run> seen_runs(const CacheSlots& slots, int64_t first, int64_t last) {
  std::vector<Run> runs;
  const int64_t S = slots.sinks, ring = slots.capacity - S;
  if (S > 0) runs.push_back({0, 0, std::min(S, last + 1)});
  for (int64_t p = std::max(S, first - (slots.reach - S) + 1); p <= last;) {
    const int64_t place = (p - S) % ring;
    const int64_t count = std::min(ring - place, last + 1 - p);
    runs.push_back({S + place, p, count});
    p += count;
  }
  return runs;
}

// Makes scores of products, for the query at t: -infinity of those it does not see. Returns the largest.
float finish_scores(const Decode& decode, const std::vector<Run>& runs, int64_t scales_row, int64_t head, int64_t t,
                    float* scores) {
  const CacheSlots& slots = decode.slots;
  const int64_t S = slots.sinks, W = slots.reach;
  float largest = -kInfinity;
  for (const Run& run : runs) {
    const bool sinks = run.position < S;
    const int64_t oldest = sinks ? 0 : t - (W - S) + 1;  // that it sees
    const int64_t begin = std::clamp<int64_t>(oldest - run.position, 0, run.count);
    const int64_t end = std::clamp<int64_t>(t + 1 - run.position, begin, run.count);
    std::fill(scores, scores + begin, -kInfinity);
    std::fill(scores + end, scores + run.count, -kInfinity);
    for (int64_t i = begin; i < end; ++i) scores[i] *= decode.scale;
    if (slots.key_scales)
      for (int64_t i = begin; i < end; ++i) scores[i] *= slots.key_scales[scales_row + run.slot + i];
    if (decode.softcap > 0.0f)
      for (int64_t i = begin; i < end; ++i) scores[i] = decode.softcap * std::tanh(scores[i] / decode.softcap);
    if (decode.alibi_slopes) {
      const int64_t from = (sinks ? std::min(t, W - 1) : t) - run.position;
      for (int64_t i = begin; i < end; ++i) scores[i] -= decode.alibi_slopes[head] * static_cast<float>(from - i);
    }
    for (int64_t i = begin; i < end; ++i) largest = std::max(largest, scores[i]);
    scores += run.count;
  }
  return largest;
}

// One key head of one sequence: rows are its query heads times the tokens.
template <class Slot>
void decode_head(Dots<Slot, float, float> products, const AttentionKernels& attention,
                 AddWeighted<Slot> add_weighted, const Decode& decode, int64_t b, int64_t kv_head) {
  const CacheSlots& slots = decode.slots;
  const int64_t T = decode.tokens, H = decode.heads, width = slots.width, group = H / slots.kv_heads;
  const int64_t there = decode.new_lengths ? decode.new_lengths[b] : T, first = decode.lengths[b];
  const int64_t rows = group * T, scales_row = (b * slots.kv_heads + kv_head) * slots.capacity;
  std::vector<float> sums(rows * width, 0.0f), totals(rows, 0.0f);
  if (there > 0) {
    const std::vector<Run> runs = seen_runs(slots, first, first + there - 1);
    int64_t keys = 0;
    for (const Run& run : runs) keys += run.count;
    std::vector<float> scores(rows * keys);
    const int64_t q_row = (b * H + kv_head * group) * T * width;
    const Slot* const k = static_cast<const Slot*>(slots.keys) + scales_row * width;
    const Slot* const v = static_cast<const Slot*>(slots.values) + scales_row * width;
    int64_t column = 0;
    for (const Run& run : runs) {
      const float* const q = run.position < slots.sinks ? decode.q_sink : decode.q;
      products(k + run.slot * width, run.count, width, q + q_row, width, rows, scores.data() + column, keys);
      column += run.count;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = kv_head * group + row / T, t = row % T;
      if (t >= there) continue;
      float* const own = scores.data() + row * keys;
      float largest = finish_scores(decode, runs, scales_row, head, first + t, own);
      if (decode.sink_logits) largest = std::max(largest, decode.sink_logits[head]);
      totals[row] = attention.exponentials(own, keys, largest);
      if (decode.sink_logits) totals[row] += std::exp(decode.sink_logits[head] - largest);
      if (slots.value_scales) {
        const float* weights_scale = slots.value_scales + scales_row;
        int64_t i = 0;
        for (const Run& run : runs)
          for (int64_t n = 0; n < run.count; ++n, ++i) own[i] *= weights_scale[run.slot + n];
      }
    }
    column = 0;
    for (size_t i = 0; i < runs.size();) {
      // A ring that begins right after the sinks goes on from them, so that sums are those without sinks.
      const int64_t slot = runs[i].slot;
      int64_t count = runs[i].count;
      while (++i < runs.size() && runs[i].slot == slot + count) count += runs[i].count;
      for (int64_t n = 0; n < count; n += kPart)
        add_weighted(scores.data() + column + n, keys, rows, v + (slot + n) * width, std::min(kPart, count - n),
                     width, sums.data());
      column += count;
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t head = kv_head * group + row / T, t = row % T;
    float* const out = decode.out + ((b * T + t) * H + head) * width;
    for (int64_t c = 0; c < width; ++c) out[c] = t < there ? sums[row * width + c] / totals[row] : 0.0f;
  }
}

}  // namespace

void decode_heads(const DotKernels& dots, const AttentionKernels& attention, const Decode& decode, int64_t begin,
                  int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / decode.slots.kv_heads, kv_head = i % decode.slots.kv_heads;
    if (decode.slots.key_scales)
      decode_head<int8_t>(dots.int8_float32, attention, attention.int8, decode, b, kv_head);
    else decode_head<float>(dots.float32, attention, attention.float32, decode, b, kv_head);
  }
}

const AttentionKernels& attention_kernels(InstructionSet set) {
#if defined(ALMOSTGPT_X86_64)
  if (set == InstructionSet::avx512) return kAvx512Attention;
  if (set == InstructionSet::avx2) return kAvx2Attention;
#endif
  (void)set;
  return kPortableAttention;
}

}  // namespace almostgpt::cpu
