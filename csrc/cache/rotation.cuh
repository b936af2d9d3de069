// Sine and cosine of an angle that is a fraction of a turn in whole numbers, so that no position is too
// large: whole turns overflow, and nothing else is lost.
#pragma once

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

struct Rotation {
  float cosine, sine;

  // `phase` in turns of 2^-64. To about 1e-7, from the nearest quarter turn and polynomials of what is
  // left: the instructions sin and cos are good to 5e-7, but only near zero, and differ from card to card.
  // Source of the coefficients: Cephes, sinf.c and cosf.c.
  DEVICE explicit Rotation(uint64_t phase) {
    const uint32_t high = static_cast<uint32_t>(phase >> 32);
    const uint32_t quarters = (high + (1u << 29)) >> 30;
    const float x = static_cast<float>(static_cast<int32_t>(high - (quarters << 30))) * kRadians;
    const float xx = x * x;
    const float s = x + x * xx * (-1.6666654611e-1f + xx * (8.3321608736e-3f + xx * -1.9515295891e-4f));
    const float c =
        1.0f - 0.5f * xx + xx * xx * (4.166664568298827e-2f + xx * (-1.388731625493765e-3f + xx * 2.443315711809948e-5f));
    const bool odd = quarters & 1;
    cosine = odd ? s : c;
    sine = odd ? c : s;
    if ((quarters + 1) & 2) cosine = -cosine;
    if (quarters & 2) sine = -sine;
  }

 private:
  static constexpr float kRadians = 1.4629180792671596e-9f;  // 2 pi / 2^32
};

}  // namespace almostgpt
