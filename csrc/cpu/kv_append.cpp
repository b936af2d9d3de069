#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kv_cache.h"

namespace almostgpt::cpu {
namespace {

constexpr double kRadians = 2 * 3.14159265358979323846 / 18446744073709551616.0;  // of a turn of 2^-64

// The angles of one position.
struct Rotation {
  std::vector<float> cosines, sines;

  // phase: whole turns overflow, and nothing else is lost; see kernels/rope.py.
  void set(const Append& append, int64_t position) {
    const int64_t half = append.rotated / 2;
    cosines.resize(half);
    sines.resize(half);
    for (int64_t i = 0; i < half; ++i) {
      const uint64_t phase = static_cast<uint64_t>(position) * static_cast<uint64_t>(append.turns[i]);
      const double angle = static_cast<double>(static_cast<int64_t>(phase)) * kRadians;
      cosines[i] = static_cast<float>(std::cos(angle));
      sines[i] = static_cast<float>(std::sin(angle));
    }
  }

  void turn(const AttentionKernels& kernels, const float* x, int64_t columns, float* y) const {
    const int64_t half = cosines.size();
    kernels.turn(x, cosines.data(), sines.data(), half, y);
    std::memcpy(y + 2 * half, x + 2 * half, (columns - 2 * half) * sizeof(float));
  }
};

// As `quantized` of kernels/kv_cache_reference.py: a row that is not finite has a scale that is not.
float quantize(const float* x, int64_t columns, int8_t* codes) {
  float largest = 0.0f;
  for (int64_t i = 0; i < columns; ++i) {
    const float size = std::fabs(x[i]);
    if (!(size <= largest)) largest = size;  // of NaN too
    if (std::isnan(largest)) break;
  }
  const float scale = largest / 127.0f;
  for (int64_t i = 0; i < columns; ++i) {
    const float code = x[i] / scale;
    codes[i] = std::isfinite(code) ? static_cast<int8_t>(std::nearbyint(std::clamp(code, -127.0f, 127.0f))) : 0;
  }
  return scale;
}

void store(const float* x, int64_t columns, void* slots, float* scales, int64_t row, int64_t width) {
  if (scales) scales[row] = quantize(x, columns, static_cast<int8_t*>(slots) + row * width);
  else std::memcpy(static_cast<float*>(slots) + row * width, x, columns * sizeof(float));
}

}  // namespace

void append_tokens(const AttentionKernels& kernels, const Append& append, int64_t begin, int64_t end) {
  const CacheSlots& slots = append.slots;
  const int64_t D = append.head_dim, T = append.tokens, S = slots.sinks;
  Rotation own, near_sinks;
  std::vector<float> turned(D);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / T, t = i % T, position = append.lengths[b] + t;
    if (append.turns) {
      own.set(append, position);
      if (append.q_sink) near_sinks.set(append, std::min(position, slots.reach - 1));
      for (int64_t head = 0; head < append.heads; ++head) {
        const float* const q = append.q.row(b, head, t);
        const int64_t row = (b * append.heads + head) * T + t;
        own.turn(kernels, q, D, append.q_out + row * D);
        if (append.q_sink) near_sinks.turn(kernels, q, D, append.q_sink + row * D);
      }
    }
    if (append.new_lengths && t >= append.new_lengths[b]) continue;
    const int64_t slot = position < S ? position : S + (position - S) % (slots.capacity - S);
    for (int64_t head = 0; head < slots.kv_heads; ++head) {
      const int64_t row = (b * slots.kv_heads + head) * slots.capacity + slot;
      const float* k = append.k.row(b, head, t);
      if (append.turns) {
        own.turn(kernels, k, D, turned.data());
        k = turned.data();
      }
      store(k, D, slots.keys, slots.key_scales, row, slots.width);
      store(append.v.row(b, head, t), D, slots.values, slots.value_scales, row, slots.width);
    }
  }
}

}  // namespace almostgpt::cpu
