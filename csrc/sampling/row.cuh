// A row of logits as vectors of 16 bytes, wherever it begins: vectors lie where memory has them, and of the
// first and the last some elements may be outside of the row.
#pragma once

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

template <class T>
struct Row {
  static constexpr int width = kVectorWidth<T>;

  Global<const T> logits;
  Global<uint8_t> seen;  // or absent
  int length;
  int start;  // the id that the first vector would begin with: -width < start <= 0
  float penalty;

  // `misaligned`: bytes from the last multiple of 16 to the row's first element.
  DEVICE Row(Global<const T> logits, int misaligned, Global<uint8_t> seen, int length, float penalty)
      : logits(logits), seen(seen), length(length), start(-misaligned / static_cast<int>(sizeof(T))),
        penalty(penalty) {}

  DEVICE int vectors() const { return (length - start + width - 1) / width; }
  DEVICE int first_id(int vector) const { return start + vector * width; }

  // As they are in memory; -inf for what is outside.
  template <Cache cache> DEVICE u32x4 load(int vector) const {
    const int first = first_id(vector);
    if (first >= 0 && first + width <= length) return load_global_as<u32x4, cache>(logits + first);
    float values[width];
    UNROLL for (int i = 0; i < width; ++i) {
      const bool inside = first + i >= 0 && first + i < length;
      values[i] = inside ? to_float(load_global<cache>(logits + first + i)) : -INFINITY;
    }
    return pack<T>(values);
  }

  // Of tokens that were in the sequence.
  DEVICE void penalise(int vector, float (&values)[width]) const {
    if (penalty == 1.0f) return;
    const int first = first_id(vector);
    UNROLL for (int i = 0; i < width; ++i) {
      if (first + i < 0 || first + i >= length || load_global(seen + first + i) == 0) continue;
      values[i] = values[i] < 0.0f ? values[i] * penalty : values[i] / penalty;
    }
  }
};

}  // namespace almostgpt
