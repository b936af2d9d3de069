// Characters of UTF-8 and their classes. A byte that is no part of a well-formed character counts as
// a character of its own, of class `other`: no text is refused, and none is lost.
#pragma once

#include <cstddef>
#include <cstdint>

namespace almostgpt::bpe {

enum class Class : uint8_t {
  other,   // [^\s\p{L}\p{N}]
  letter,  // \p{L}
  number,  // \p{N}
  space,   // \s but for the next
  newline, // [\r\n]
  many,    // the first byte of a character of several bytes, or of none: decode it
};

constexpr bool is_space(Class kind) { return kind == Class::space || kind == Class::newline; }

struct Character {
  Class kind;
  uint32_t bytes;
};

namespace unicode {

#include "unicode_tables.inc"

struct ByteClasses {
  Class of[256];
};

constexpr ByteClasses byte_classes = [] {
  ByteClasses classes{};
  for (int byte = 0; byte < 256; ++byte) {
    const int folded = byte | 0x20;
    classes.of[byte] = byte >= 0x80                         ? Class::many
                       : folded >= 'a' && folded <= 'z'     ? Class::letter
                       : byte >= '0' && byte <= '9'         ? Class::number
                       : byte == '\r' || byte == '\n'       ? Class::newline
                       : byte == ' ' || (byte >= 9 && byte <= 12) ? Class::space
                                                            : Class::other;
  }
  return classes;
}();

}  // namespace unicode

// The class that a first byte tells.
inline Class byte_class(uint8_t byte) { return unicode::byte_classes.of[byte]; }

// The class of a character by its code point, which is not a newline.
inline Class class_of(uint32_t code) {
  if (code >= unicode::table_end) return Class::other;
  const uint8_t* block = unicode::blocks[unicode::block_of[code / 128]];
  return Class((block[code % 128 / 4] >> (2 * (code % 4))) & 3);
}

// The character at p, whose first byte is 0x80 or above. Well-formed is what table 3-7 of the Unicode
// standard lists: no overlong forms, no surrogates, nothing above U+10FFFF.
inline Character decode(const uint8_t* p, const uint8_t* end) {
  const auto continues = [&](int i) { return (p[i] & 0xC0) == 0x80; };
  constexpr Character alone = {Class::other, 1};
  const uint32_t first = p[0];
  const ptrdiff_t left = end - p;
  if (first < 0xC2 || first > 0xF4 || left < 2 || !continues(1)) return alone;
  if (first < 0xE0) return {class_of((first & 0x1F) << 6 | (p[1] & 0x3Fu)), 2};
  if (left < 3 || !continues(2)) return alone;
  if (first < 0xF0) {
    const uint32_t code = (first & 0x0F) << 12 | (p[1] & 0x3Fu) << 6 | (p[2] & 0x3Fu);
    if (code < 0x800 || (code >= 0xD800 && code < 0xE000)) return alone;
    return {class_of(code), 3};
  }
  if (left < 4 || !continues(3)) return alone;
  const uint32_t code =
      (first & 0x07) << 18 | (p[1] & 0x3Fu) << 12 | (p[2] & 0x3Fu) << 6 | (p[3] & 0x3Fu);
  if (code < 0x10000 || code > 0x10FFFF) return alone;
  return {class_of(code), 4};
}

// The character at p < end.
inline Character character_at(const uint8_t* p, const uint8_t* end) {
  const Class kind = byte_class(*p);
  return kind == Class::many ? decode(p, end) : Character{kind, 1};
}

// The class of the character that ends before p > begin, where p is between two characters.
inline Class class_before(const uint8_t* begin, const uint8_t* p) {
  const uint8_t* start = p - 1;
  while (start > begin && p - start < 4 && (*start & 0xC0) == 0x80) --start;
  const Character last = character_at(start, p);
  // A longer or shorter one: the last byte is malformed, and alone.
  return start + last.bytes == p ? last.kind : Class::other;
}

}  // namespace almostgpt::bpe
