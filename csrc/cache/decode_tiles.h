// How decode attention is cut, by head dimension, by what slots hold, and by the shared memory that a
// card gives a block (attention/tiles.h lists them). Plain C++.
//
// A warp works alone on tiles of 16 keys, which it copies into memory of its own, `stages` of them at a
// time: there is no barrier between warps while keys pass by. What counts is how many bytes are on their
// way: a multiprocessor of an H200 has to have about 29 KiB under way to keep the memory busy
// (4.8 TB/s x 0.8 us / 132).
#pragma once

#include <cstdint>

#include "attention/tiles.h"

namespace almostgpt {

constexpr int kDecodeKeys = 16;  // of a tile: the depth of the second product's instruction

template <int head_dim_, bool int8_, int row_tiles_, int warps_, int stages_>
struct DecodeTile {
  static constexpr int head_dim = head_dim_, row_tiles = row_tiles_, warps = warps_, stages = stages_;
  static constexpr bool int8 = int8_;
  static constexpr int rows = row_tiles * kFragmentRows;  // queries of one key head: heads x tokens
  static constexpr int threads = 32 * warps;
  static constexpr uint32_t query_bytes = rows * head_dim * 2;
  static constexpr uint32_t key_bytes = kDecodeKeys * head_dim * (int8 ? 1 : 2);
  static constexpr uint32_t scale_bytes = int8 ? 2 * kDecodeKeys * 4 : 0;
  // A row of a warp's sums, in floats: the padding keeps the rows that are written at once in different banks.
  static constexpr int sum_stride = head_dim + (int8 ? 16 : 8);
  static constexpr uint32_t sum_bytes = kFragmentRows * (sum_stride + 1) * 4;  // and one lse for each row

  // Two copies of the queries; then the keys and values that are under way, and when all have passed by
  // the warps' sums; then the scales.
  static constexpr uint32_t stage_bytes = warps * stages * 2 * key_bytes;
  static constexpr uint32_t work_bytes = stage_bytes > warps * sum_bytes ? stage_bytes : warps * sum_bytes;
  static constexpr uint32_t scales_at = 2 * query_bytes + work_bytes;
  static constexpr uint32_t shared_bytes = scales_at + warps * stages * scale_bytes + 16;
  static constexpr int blocks = 2;  // on a multiprocessor, by registers
};

// Calls f with the tile for so many rows: 16, or 32 where the registers hold the sums of as many. Four
// tiles of rows at 64 columns spilled on sm_120.
template <int head_dim, bool int8, class F>
constexpr int with_decode_tile(int shared_bytes, int rows, F f) {
  const auto of_rows = [&](auto warps, auto stages) {
    if constexpr (head_dim < 256) {
      if (rows > kFragmentRows) return f(DecodeTile<head_dim, int8, 2, warps(), stages()>());
    }
    return f(DecodeTile<head_dim, int8, 1, warps(), stages()>());
  };
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  using Four = std::integral_constant<int, 4>;
  if constexpr (head_dim == 64 || (head_dim == 128 && int8)) {
    return of_rows(Four(), Four());
  } else if constexpr (head_dim == 128) {
    // Two blocks of 104 KiB, or of 72.
    return shared_bytes >= 220 * kKiB ? of_rows(Four(), Three()) : of_rows(Four(), Two());
  } else if constexpr (int8) {
    return shared_bytes >= 116 * kKiB ? of_rows(Four(), Three()) : of_rows(Four(), Two());
  } else {
    static_assert(head_dim == 256);
    if (shared_bytes >= 212 * kKiB) return of_rows(Four(), Three());
    return shared_bytes >= 148 * kKiB ? of_rows(Four(), Two()) : of_rows(Two(), Two());
  }
}

// Into how many parts the keys of each of `groups` go, so that `slots` blocks have about the same to do:
// the fewest that leave no more than a tenth of the card idle beside the best there is.
constexpr int split_keys(int64_t groups, int64_t slots, int64_t most) {
  most = most < 128 ? most : 128;
  const auto used = [&](int64_t parts) {  // share of the slots, over all rounds
    const int64_t blocks = groups * parts, rounds = (blocks + slots - 1) / slots;
    return static_cast<double>(blocks) / static_cast<double>(rounds * slots);
  };
  double best = 0;
  for (int64_t parts = 1; parts <= most; ++parts) best = used(parts) > best ? used(parts) : best;
  for (int64_t parts = 1; parts < most; ++parts)
    if (used(parts) >= 0.9 * best) return static_cast<int>(parts);
  return static_cast<int>(most < 1 ? 1 : most);
}

}  // namespace almostgpt
