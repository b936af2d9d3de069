// 16 bytes of elements, the most that one access moves, and their values as float.
#pragma once

namespace almostgpt::device {

template <class T> constexpr int kVectorWidth = 16 / static_cast<int>(sizeof(T));

DEVICE uint32_t pair_of(bf16, float lo, float hi) { return pack_bf16(lo, hi); }
DEVICE uint32_t pair_of(fp16, float lo, float hi) { return pack_fp16(lo, hi); }
DEVICE float pair_lo(bf16, uint32_t pair) { return unpack_bf16_lo(pair); }
DEVICE float pair_lo(fp16, uint32_t pair) { return unpack_fp16_lo(pair); }
DEVICE float pair_hi(bf16, uint32_t pair) { return unpack_bf16_hi(pair); }
DEVICE float pair_hi(fp16, uint32_t pair) { return unpack_fp16_hi(pair); }

// Of 8 elements of bf16 or fp16, or 4 of float.
template <class T> DEVICE void unpack(u32x4 vector, float (&values)[kVectorWidth<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
  UNROLL for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      memcpy(&values[i], &words[i], 4);  // one by one: all 16 bytes at once crash g++ 12.2
    } else {
      values[2 * i] = pair_lo(T(), words[i]);
      values[2 * i + 1] = pair_hi(T(), words[i]);
    }
  }
}

// Rounded to T.
template <class T> DEVICE u32x4 pack(const float (&values)[kVectorWidth<T>]) {
  uint32_t words[4];
  UNROLL for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) memcpy(&words[i], &values[i], 4);
    else words[i] = pair_of(T(), values[2 * i], values[2 * i + 1]);
  }
  return u32x4{words[0], words[1], words[2], words[3]};
}

template <class T> DEVICE T round_to(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else if constexpr (std::is_same_v<T, bf16>) return to_bf16(value);
  else return to_fp16(value);
}

}  // namespace almostgpt::device
