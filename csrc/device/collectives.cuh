// Sums and maxima over the lanes of a warp, in the same order every time.
#pragma once

namespace almostgpt::device {

// Over groups of `width` neighbouring lanes (a power of two); every lane gets the result.
template <int width = 32> DEVICE float warp_sum(float value) {
  UNROLL for (int bits = width / 2; bits > 0; bits /= 2) value += shfl_xor(value, bits);
  return value;
}

template <int width = 32> DEVICE float warp_max(float value) {
  UNROLL for (int bits = width / 2; bits > 0; bits /= 2) value = max(value, shfl_xor(value, bits));
  return value;
}

}  // namespace almostgpt::device
