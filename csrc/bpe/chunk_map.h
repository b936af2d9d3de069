// How often each distinct chunk occurs: a hash map from bytes to counts, made for words.
//
// Nearly all chunks are short. Those of up to 15 bytes lie in the table itself, as two integers, so
// that finding one takes one line of the cache and no comparison of strings. Longer ones lie in an
// arena, and the table of theirs points there.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace almostgpt::bpe {

// As many bytes must be readable behind the last chunk that is added.
constexpr size_t chunk_padding = 16;

class ChunkMap {
 public:
  // Counts a chunk `times` times. It must have a byte at least.
  void add(const uint8_t* chunk, size_t length, uint64_t times = 1) {
    if (length <= longest_short) {
      add_short(short_key(chunk, length), times);
    } else {
      add_long(chunk, length, times);
    }
  }

  // Adds all that `other` has.
  void add(const ChunkMap& other) {
    for (const Short& entry : other.shorts_) {
      if (entry.times) add_short({entry.low, entry.high}, entry.times);
    }
    for (const Long& entry : other.longs_) {
      if (entry.times) add_long(other.bytes_.data() + entry.start, entry.length, entry.times);
    }
  }

  // Calls f(chunk, times) for each distinct chunk, in no particular order.
  template <typename F>
  void for_each(F&& f) const {
    for (const Short& entry : shorts_) {
      if (!entry.times) continue;
      char bytes[16];
      std::memcpy(bytes, &entry.low, 16);
      f(std::string_view(bytes, entry.high >> 56), entry.times);
    }
    for (const Long& entry : longs_) {
      if (!entry.times) continue;
      const auto* bytes = reinterpret_cast<const char*>(bytes_.data());
      f(std::string_view(bytes + entry.start, entry.length), entry.times);
    }
  }

  size_t size() const { return shorts_used_ + longs_used_; }

 private:
  static constexpr size_t longest_short = 15;
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

  // The bytes of a chunk, zeros behind them, and in the last byte its length.
  struct ShortKey {
    uint64_t low, high;
  };
  struct Short {
    uint64_t low = 0, high = 0, times = 0;  // times 0: an empty place
  };
  struct Long {
    uint64_t hash = 0, start = 0, length = 0, times = 0;
  };

  static ShortKey short_key(const uint8_t* chunk, size_t length) {
    ShortKey key;
    std::memcpy(&key, chunk, 16);
    if (length < 8) return {key.low & ((uint64_t{1} << 8 * length) - 1), uint64_t{length} << 56};
    key.high &= (uint64_t{1} << 8 * (length - 8)) - 1;
    return {key.low, key.high | uint64_t{length} << 56};
  }

  // The product of 128 bits folded to 64, as in wyhash (Wang Yi, public domain).
  static uint64_t mix(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }
  static uint64_t hash(ShortKey key) {
    return mix(key.low ^ 0x2d358dccaa6c78a5, key.high ^ 0x8bb84b93962eacc9);
  }
  static uint64_t hash(const uint8_t* chunk, size_t length) {
    uint64_t state = length;
    for (size_t i = 0; i < length; i += 15) {
      const ShortKey part = short_key(chunk + i, std::min(length - i, longest_short));
      state = mix(state ^ 0x4b33a62ed433d4a3, hash(part));
    }
    return state;
  }

  void add_short(ShortKey key, uint64_t times) {
    for (size_t at = hash(key) & short_mask_;; at = (at + 1) & short_mask_) {
      Short& entry = shorts_[at];
      if (entry.low == key.low && entry.high == key.high) {
        entry.times += times;
        return;
      }
      if (!entry.times) {
        entry = {key.low, key.high, times};
        break;
      }
    }
    if (++shorts_used_ * 2 > short_mask_) grow_shorts();
  }

  void add_long(const uint8_t* chunk, size_t length, uint64_t times) {
    const uint64_t own = hash(chunk, length);
    for (size_t at = own & long_mask_;; at = (at + 1) & long_mask_) {
      Long& entry = longs_[at];
      if (!entry.times) {
        entry = {own, bytes_.size() - chunk_padding, length, times};
        // The padding stays behind the last one: what is read as 16 bytes of a chunk may be merged.
        bytes_.resize(bytes_.size() + length);
        std::memcpy(bytes_.data() + entry.start, chunk, length);
        break;
      }
      if (entry.hash == own && entry.length == length &&
          std::memcmp(bytes_.data() + entry.start, chunk, length) == 0) {
        entry.times += times;
        return;
      }
    }
    if (++longs_used_ * 2 > long_mask_) grow_longs();
  }

  void grow_shorts() {
    std::vector<Short> old(2 * shorts_.size());
    old.swap(shorts_);
    short_mask_ = shorts_.size() - 1;
    for (const Short& entry : old) {
      if (!entry.times) continue;
      size_t at = hash(ShortKey{entry.low, entry.high}) & short_mask_;
      while (shorts_[at].times) at = (at + 1) & short_mask_;
      shorts_[at] = entry;
    }
  }

  void grow_longs() {
    std::vector<Long> old(2 * longs_.size());
    old.swap(longs_);
    long_mask_ = longs_.size() - 1;
    for (const Long& entry : old) {
      if (!entry.times) continue;
      size_t at = entry.hash & long_mask_;
      while (longs_[at].times) at = (at + 1) & long_mask_;
      longs_[at] = entry;
    }
  }

  static constexpr size_t first_size = 1024;  // a power of 2, as every size that follows
  std::vector<Short> shorts_ = std::vector<Short>(first_size);
  std::vector<Long> longs_ = std::vector<Long>(first_size);
  std::vector<uint8_t> bytes_ = std::vector<uint8_t>(chunk_padding);
  size_t short_mask_ = first_size - 1, long_mask_ = first_size - 1;
  size_t shorts_used_ = 0, longs_used_ = 0;
};

}  // namespace almostgpt::bpe
