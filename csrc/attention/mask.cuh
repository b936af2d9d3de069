// Who sees whom: from which key to which each query sees, and by which queries each key is seen.
//
// Both ranges move in one direction only, from token to token, whatever the options. So the ranges of
// the first and the last token of a tile say which tiles it meets, and whether it meets them whole.
#pragma once

#include "device/device.cuh"

namespace almostgpt {

using namespace device;

struct Range {
  int begin, end;  // empty where end <= begin

  DEVICE bool has(int index) const { return index >= begin && index < end; }
};

struct Mask {
  int queries, keys;
  int left, right;  // keys seen on either side of the diagonal
  Global<const int32_t> cu_seqlens;
  int documents;  // 0: no cu_seqlens

  // Query i stands at key i + keys - queries: the last query at the last key.
  DEVICE int diagonal() const { return keys - queries; }

  DEVICE Range keys_of(int query) const {
    const Range document = documents ? document_of(query) : Range{0, keys};
    const int here = query + diagonal();
    return {max(document.begin, here - left), min(document.end, here + right + 1)};
  }
  DEVICE Range queries_of(int key) const {
    const Range document = documents ? document_of(key) : Range{0, queries};
    const int here = key - diagonal();
    return {max(document.begin, here - right), min(document.end, here + left + 1)};
  }

 private:
  // By bisection. Every token of the range that is left takes the same way, so that documents are apart
  // from each other and in order even where cu_seqlens is not: nothing waits for ever, and nothing beyond
  // the sequence is touched.
  DEVICE Range document_of(int token) const {
    Range document{0, keys};
    int low = 0, high = documents;
    while (high - low > 1) {
      const int middle = (low + high) / 2, border = load_global<Cache::read_only>(cu_seqlens + middle);
      if (border <= token) low = middle, document.begin = max(document.begin, border);
      else high = middle, document.end = min(document.end, border);
    }
    return document;
  }
};

// The ranges of a block's own tokens, numbered from its first, in shared memory: computed anew for every
// tile they would take more registers than there are.
struct Ranges {
  shared_addr memory;
  static constexpr uint32_t bytes(int tokens) { return tokens * sizeof(Range); }

  // For `tokens` tokens, by all threads of the block; a barrier must follow.
  template <class RangeOf>
  DEVICE void fill(int tokens, RangeOf range_of) const {
    for (int token = thread_id(); token < tokens; token += block_size())
      store_shared<Range>(memory + token * sizeof(Range), range_of(token));
  }
  DEVICE Range operator[](int token) const { return load_shared<Range>(memory + token * sizeof(Range)); }
};

}  // namespace almostgpt
