// Tensor cores and asynchronous copies as of sm_80.
#pragma once

#include "device/emulator/primitives_core.h"

namespace almostgpt::device {

// --- tensor cores -------------------------------------------------------------------------------------------

namespace detail {

struct LoadMatrix {
  shared_addr row;
  uint32_t* registers;
};

template <bool transposed> void load_matrices(void** arguments, uint32_t, Location at) {
  const auto lane_arguments = [&](int lane) -> LoadMatrix& { return *static_cast<LoadMatrix*>(arguments[lane]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    uint32_t addresses[8];
    for (int row = 0; row < 8; ++row) {
      addresses[row] = lane_arguments(8 * matrix + row).row;
      emulator::load_matrix_row(addresses[row], elements[row], transposed, row, at);
    }
    emulator::count_matrix_rows(addresses);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t lo = transposed ? elements[j][i] : elements[i][j];
      const uint32_t hi = transposed ? elements[j + 1][i] : elements[i][j + 1];
      lane_arguments(lane).registers[matrix] = lo | hi << 16;
    }
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T> float half_of(uint32_t pair, int half) {
  const auto bits = static_cast<uint16_t>(pair >> 16 * half);
  return std::is_same_v<T, bf16> ? emulator::bf16_value(bits) : emulator::fp16_value(bits);
}

template <class T> void multiply_matrices(void** arguments, uint32_t, Location) {
  float A[16][16], B[16][8], D[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& own = *static_cast<Mma*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = half_of<T>(own.a[i], half);
      for (int i = 0; i < 2; ++i) B[2 * t + 8 * i + half][g] = half_of<T>(own.b[i], half);
    }
    for (int i = 0; i < 4; ++i) D[g + 8 * (i / 2)][2 * t + i % 2] = own.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) D[m][n] += A[m][k] * B[k][n];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Mma*>(arguments[lane])->d[i] = D[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

}  // namespace detail

DEVICE void ldmatrix_x4(uint32_t (&r)[4], shared_addr row, Location at = Location::here()) {
  detail::LoadMatrix mine{row, r};
  emulator::collective("ldmatrix_x4", &mine, ~0u, detail::load_matrices<false>, at);
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], shared_addr row, Location at = Location::here()) {
  detail::LoadMatrix mine{row, r};
  emulator::collective("ldmatrix_x4_trans", &mine, ~0u, detail::load_matrices<true>, at);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Location at = Location::here()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  detail::Mma mine{d, a, {b0, b1}};
  emulator::collective("mma_m16n8k16", &mine, ~0u, detail::multiply_matrices<T>, at);
}

// --- asynchronous copies --------------------------------------------------------------------------------------

template <class T> void cp_async16(shared_addr to, Global<T> from, bool valid = true, Location at = Location::here()) {
  emulator::cp_async(to, detail::address_of(from), 16, valid, at);
}
template <class T> void cp_async4(shared_addr to, Global<T> from, bool valid = true, Location at = Location::here()) {
  emulator::cp_async(to, detail::address_of(from), 4, valid, at);
}
DEVICE void cp_async_commit(Location at = Location::here()) { emulator::cp_async_commit(at); }
template <int N> void cp_async_wait(Location at = Location::here()) { emulator::cp_async_wait(N, at); }

}  // namespace almostgpt::device
