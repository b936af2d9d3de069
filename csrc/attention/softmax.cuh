// The softmax of rows whose scores come tile by tile (Milakov and Gimelshein, arXiv:1805.02867).
//
// A row's exponentials are taken relative to a base, so that they do not overflow; when the base moves,
// what was summed before is multiplied by what that changes. The textbook's base is the largest score so
// far. But any base near it will do, as sums and products are floating point numbers: so it moves only
// when a score is beyond it by 2^8 (as in FlashAttention-4), which after the first tile is rare, and the
// common tile needs neither the row's largest score, which four lanes would have to find together, nor
// to touch the sums.
#pragma once

#include "attention/scores.cuh"
#include "device/device.cuh"

namespace almostgpt {

using namespace device;

constexpr float kSlack = 8.0f;  // in log2; exponentials stay below 256, and in fp16's range

// The rows of a warp's accumulator fragments: row_tiles x 16, of which a lane has rows lane / 4 and
// lane / 4 + 8 of each 16, and in those, with three neighbours, columns 2 (lane % 4) and the next of every 8.
template <int row_tiles>
struct OnlineSoftmax {
  float base[row_tiles][2];  // in units of the scores, the same in the four lanes of a row
  float sum[row_tiles][2];   // of the exponentials in this lane's columns

  DEVICE OnlineSoftmax() {
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int half = 0; half < 2; ++half) base[r][half] = kMinusInfinity, sum[r][half] = 0.0f;
  }

  // Turns scores into exp2(factor (score - base)). Where the base moves, `out` moves along.
  template <int column_tiles, int out_tiles>
  DEVICE void add(float (&scores)[row_tiles][column_tiles][4], float (&out)[row_tiles][out_tiles][4], float factor) {
    exponentiate(scores, factor, [&](int r, int half, float shrink) {
      UNROLL for (int c = 0; c < out_tiles; ++c)
        UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) out[r][c][e] *= shrink;
    });
  }
  // The same for a caller whose sums cannot be touched yet: moved(r, half, shrink) says what they are to be
  // multiplied by, where the base of a row of the warp has moved.
  template <int column_tiles, class Moved>
  DEVICE void exponentiate(float (&scores)[row_tiles][column_tiles][4], float factor, Moved moved) {
    UNROLL for (int r = 0; r < row_tiles; ++r)
      UNROLL for (int half = 0; half < 2; ++half) {
        float top = kMinusInfinity;  // of this lane's columns
        UNROLL for (int c = 0; c < column_tiles; ++c)
          top = max(top, max(scores[r][c][2 * half], scores[r][c][2 * half + 1]));
        if (const uint32_t moving = ballot((top - base[r][half]) * factor > kSlack)) {
          const float shrink = move(base[r][half], top, factor, moving);
          sum[r][half] *= shrink;
          moved(r, half, shrink);
        }
        // Before a row sees anything, any finite number will do.
        const float offset = base[r][half] == kMinusInfinity ? 0.0f : base[r][half] * factor;
        UNROLL for (int c = 0; c < column_tiles; ++c)
          UNROLL for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[r][c][e] = exp2_approx(scores[r][c][e] * factor - offset);
            sum[r][half] += scores[r][c][e];
          }
      }
  }

  struct Row { float weight, lse; };  // what out is multiplied by; the logarithm of the sum, in base e

  // With a sink's logit (in log2; kMinusInfinity: none) as one score more.
  DEVICE Row finish(int r, int half, float factor, float sink) const {
    float total = sum[r][half];
    total += shfl_xor(total, 1);
    total += shfl_xor(total, 2);
    const float top = max(base[r][half] * factor, sink);
    // Seen nothing; or nothing but scores that are no numbers, of which there is then a sum that is none.
    if (top == kMinusInfinity && total == 0.0f) return {0.0f, kMinusInfinity};
    const float shrink = exp2_approx(base[r][half] * factor - top);
    total = total * shrink + exp2_approx(sink - top);
    return {shrink * rcp_approx(total), (top + log2_approx(total)) * kLn2};
  }

 private:
  // To the row's largest score so far, where one of its four lanes is in `moving`: no row depends on what
  // others see. What the sums so far are to be multiplied by.
  DEVICE static float move(float& base, float top, float factor, uint32_t moving) {
    top = max(top, shfl_xor(top, 1));
    top = max(top, shfl_xor(top, 2));
    if ((moving >> (lane_id() & ~3) & 0xf) == 0) return 1.0f;
    const float old = base;
    base = top;
    return exp2_approx((old - base) * factor);
  }
};

}  // namespace almostgpt
