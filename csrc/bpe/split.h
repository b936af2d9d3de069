// Splitting text into chunks, over whose borders no token goes: the patterns of GPT-2 and GPT-4 by hand.
//
//   gpt2  '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//   gpt4  '(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*
//         |\s*[\r\n]|\s+(?!\S)|\s+
//
// A regular expression tries its alternatives in order; here one look at the first characters says
// which it will be. Every byte of a text belongs to a chunk.
#pragma once

#include <cstdint>

#include "unicode.h"

namespace almostgpt::bpe {

enum class Pattern { gpt2, gpt4 };

namespace split {

// The end of the run of one class that starts at p.
template <Class kind>
const uint8_t* run_end(const uint8_t* p, const uint8_t* end) {
  while (p < end) {
    const Class found = byte_class(*p);
    if (found == kind) {
      ++p;
    } else if (found == Class::many) {
      const Character next = decode(p, end);
      if (next.kind != kind) break;
      p += next.bytes;
    } else {
      break;
    }
  }
  return p;
}

// \s+(?!\S)|\s+ at p, and for gpt4 before it \s*[\r\n]: a run of spaces leaves its last one to the word
// that follows, or ends with its last line break.
template <Pattern pattern>
const uint8_t* spaces_end(const uint8_t* p, const uint8_t* end) {
  const uint8_t *run = p, *last = p, *after_newline = nullptr;
  while (run < end) {
    const Character next = character_at(run, end);
    if (!is_space(next.kind)) break;
    last = run;
    run += next.bytes;
    if (next.kind == Class::newline) after_newline = run;
  }
  if (pattern == Pattern::gpt4 && after_newline) return after_newline;
  return run == end || last == p ? run : last;
}

// The contraction at p, which is an apostrophe; p where there is none. Without regard to case, ſ
// (U+017F) is an s.
template <Pattern pattern>
const uint8_t* contraction_end(const uint8_t* p, const uint8_t* end) {
  constexpr uint8_t fold = pattern == Pattern::gpt4 ? 0x20 : 0;  // of letters, the bit of the case
  if (end - p < 2) return p;
  const uint8_t first = p[1] | fold;
  if (first == 's' || first == 'd' || first == 'm' || first == 't') return p + 2;
  if (end - p < 3) return p;
  const uint8_t second = p[2] | fold;
  if ((first == 'l' && second == 'l') || (first == 'v' && second == 'e') ||
      (first == 'r' && second == 'e')) {
    return p + 3;
  }
  return pattern == Pattern::gpt4 && p[1] == 0xC5 && p[2] == 0xBF ? p + 3 : p;
}

inline const uint8_t* gpt2_end(const uint8_t* p, const uint8_t* end) {
  if (*p == '\'') {
    if (const uint8_t* found = contraction_end<Pattern::gpt2>(p, end); found != p) return found;
  }
  const uint8_t* word = p + (*p == ' ');
  if (word == end) return end;
  const Character first = character_at(word, end);
  const uint8_t* rest = word + first.bytes;
  switch (first.kind) {
    case Class::letter: return run_end<Class::letter>(rest, end);
    case Class::number: return run_end<Class::number>(rest, end);
    case Class::other: return run_end<Class::other>(rest, end);
    default: return spaces_end<Pattern::gpt2>(p, end);
  }
}

inline const uint8_t* gpt4_end(const uint8_t* p, const uint8_t* end) {
  const Character first = character_at(p, end);
  const uint8_t* rest = p + first.bytes;
  if (first.kind == Class::letter) return run_end<Class::letter>(rest, end);
  if (first.kind == Class::number) {
    for (int digits = 1; digits < 3 && rest < end; ++digits) {
      const Character next = character_at(rest, end);
      if (next.kind != Class::number) break;
      rest += next.bytes;
    }
    return rest;
  }
  if (*p == '\'') {
    if (const uint8_t* found = contraction_end<Pattern::gpt4>(p, end); found != p) return found;
  }
  if (rest == end) return end;
  const Character second = character_at(rest, end);
  if (second.kind == Class::letter && first.kind != Class::newline) {
    return run_end<Class::letter>(rest + second.bytes, end);
  }
  if (first.kind == Class::other || (*p == ' ' && second.kind == Class::other)) {
    return run_end<Class::newline>(run_end<Class::other>(rest, end), end);
  }
  return spaces_end<Pattern::gpt4>(p, end);
}

}  // namespace split

// The end of the chunk that begins at p < end, where `end` is the end of the text.
template <Pattern pattern>
const uint8_t* chunk_end(const uint8_t* p, const uint8_t* end) {
  return pattern == Pattern::gpt2 ? split::gpt2_end(p, end) : split::gpt4_end(p, end);
}

// The last place in [begin, end) where both patterns end a chunk, whatever the text before `begin` and
// from `end` on; `begin` where there is none. After a run of letters, and after one of numbers, a
// chunk always ends, and what follows does not depend on what came before.
inline const uint8_t* last_safe_cut(const uint8_t* begin, const uint8_t* end) {
  // The character after the cut must be whole.
  for (const uint8_t* cut = end - begin > 4 ? end - 4 : begin; cut > begin; --cut) {
    if ((*cut & 0xC0) == 0x80) continue;  // inside a character, or malformed
    const Class before = class_before(begin, cut);
    if ((before == Class::letter || before == Class::number) &&
        character_at(cut, end).kind != before) {
      return cut;
    }
  }
  return begin;
}

}  // namespace almostgpt::bpe
