// What becomes of q . k before the softmax, in units of log2: exp2 is the instruction that there is.
#pragma once

#include <limits>

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct ScoreArgs {
  float scale, softcap;
  Global<const float> alibi_slopes;
};

// scale q . k, nothing else: the factor waits for the exponent, where it costs nothing.
struct PlainScore {
  static constexpr bool plain = true;
  float factor;  // from q . k to log2

  DEVICE PlainScore(const ScoreArgs& args, int) : factor(args.scale * kLog2E) {}
};

// With a softcap, ALiBi or both, and any scale.
struct BentScore {
  static constexpr bool plain = false;
  static constexpr float factor = 1.0f;
  float scale;        // of the product: to log2, or to the argument of tanh
  float cap;          // in log2; 0: none
  float alibi_slope;  // in log2

  DEVICE BentScore(float factor, float softcap, float slope)
      : scale(softcap > 0.0f ? factor / softcap : factor * kLog2E), cap(softcap * kLog2E), alibi_slope(slope * kLog2E) {}
  DEVICE BentScore(const ScoreArgs& args, int head)
      : BentScore(args.scale, args.softcap,
                  args.alibi_slopes ? load_global<Cache::read_only>(args.alibi_slopes + head) : 0.0f) {}

  // `distance` from the query to the key, of either sign.
  DEVICE float operator()(float product, float distance) const {
    float slope;
    return (*this)(product, distance, slope);
  }
  // `slope`: the derivative of the bent score by scale q . k.
  DEVICE float operator()(float product, float distance, float& slope) const {
    float score = product * scale;
    slope = 1.0f;
    if (cap > 0.0f) {
      const float t = bend(score);
      slope = 1.0f - t * t;
      score = cap * t;
    }
    return score - penalty(distance);
  }

  // tanh, in two instructions of the slow unit rather than one tanh.approx, whose error of 2^-11 would be
  // 0.015 in a score near a cap of 30: 1.5 % of a probability.
  DEVICE static float bend(float x) { return 1.0f - 2.0f * rcp_approx(exp2_approx(x * (2.0f * kLog2E)) + 1.0f); }
  DEVICE float penalty(float distance) const { return alibi_slope * max(distance, -distance); }
};

}  // namespace almostgpt
