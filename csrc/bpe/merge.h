// The merges of byte-pair encoding, from the distinct chunks of a text and how often each occurs.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "chunk_map.h"

namespace almostgpt::bpe {

// Tokens 0 to 255 are the bytes; merge number i makes token 256 + i of these two.
struct Merge {
  uint32_t left, right;
};

// Up to `count` merges, fewer where no two tokens are left beside each other. Each is the most frequent
// pair of its time, of equally frequent ones the one with the smaller left token, then the smaller right one.
// Within a chunk it is applied from left to right.
//
// `chunks` is emptied as soon as it is read. `progress(merges so far)` is called after each; what it throws
// ends the work.
//
// Throws std::length_error where the distinct chunks together have 4 GiB or more, or too many pairs.
std::vector<Merge> find_merges(ChunkMap&& chunks, size_t count,
                               const std::function<void(size_t)>& progress);

}  // namespace almostgpt::bpe
