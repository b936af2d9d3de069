// Gumbel noise of a token at a position of a sequence: a pure function of the three and of a seed.
#pragma once

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

// Philox4x32-10: 128 random bits of a counter under a key.
// Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
DEVICE u32x4 philox(u32x4 counter, u32x2 key) {
  UNROLL for (int round = 0; round < 10; ++round) {
    const uint64_t left = uint64_t{0xD2511F53u} * counter.x, right = uint64_t{0xCD9E8D57u} * counter.z;
    counter = u32x4{static_cast<uint32_t>(right >> 32) ^ counter.y ^ key.x, static_cast<uint32_t>(right),
                    static_cast<uint32_t>(left >> 32) ^ counter.w ^ key.y, static_cast<uint32_t>(left)};
    key = u32x2{key.x + 0x9E3779B9u, key.y + 0xBB67AE85u};
  }
  return counter;
}

// g = -ln(E), E = -ln(1 - v), v = (word + 1/2) / 2^32. The tokens that are drawn have a small E, whose
// relative error is g's: so below 1/4 it comes from a series, and above from 1 - v, which the inverted
// word gives without loss.
DEVICE float gumbel(uint32_t word) {
  constexpr float ln2 = 0.693147181f, unit = 1.0f / 4294967296.0f;
  const float v = (static_cast<float>(word) + 0.5f) * unit;
  const float rest = (static_cast<float>(~word) + 0.5f) * unit;
  // -ln(1 - v) = 2 artanh(s), s = v / (2 - v) <= 1/7: what is left out is below 2e-8 of it.
  const float s = v * rcp_approx(2.0f - v), square = s * s;
  const float series = 2.0f * s * (1.0f + square * (1.0f / 3 + square * (1.0f / 5 + square * (1.0f / 7))));
  const float e = word < 1u << 30 ? series : -ln2 * log2_approx(rest);
  return -ln2 * log2_approx(e);
}

// Whose noise it is.
struct Stream {
  u32x2 seed, sequence;
  uint32_t position;

  // The words of tokens 4 block to 4 block + 3.
  DEVICE u32x4 words(int block) const {
    return philox(u32x4{static_cast<uint32_t>(block), position, sequence.x, sequence.y}, seed);
  }
  DEVICE float noise(int id) const {
    const u32x4 all = words(id >> 2);
    return gumbel((id & 2) != 0 ? ((id & 1) != 0 ? all.w : all.z) : (id & 1) != 0 ? all.y : all.x);
  }
};

DEVICE u32x2 halves(int64_t value) {
  return u32x2{static_cast<uint32_t>(value), static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32)};
}

}  // namespace almostgpt
