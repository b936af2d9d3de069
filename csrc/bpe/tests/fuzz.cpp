// Checks the trainer on texts drawn at random, well-formed and not, against definitions written plainly.
// To be built with sanitizers (tests/data/test_bpe_core.py does):
//   g++ -std=c++20 -g -O1 -fsanitize=address,undefined csrc/bpe/count.cpp csrc/bpe/merge.cpp
//       csrc/bpe/tests/fuzz.cpp -o fuzz -pthread && ./fuzz 1000

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../count.h"
#include "../merge.h"

namespace {

using namespace almostgpt::bpe;
using Counts = std::map<std::string, uint64_t>;

void require(bool holds, const char* what, unsigned seed) {
  if (holds) return;
  std::fprintf(stderr, "seed %u: %s\n", seed, what);
  std::exit(1);
}

std::string random_text(std::mt19937& random) {
  static const std::vector<std::string> parts = {
      " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'\u017f", "'re", "a", "aa", "ab", "the", "12345",
      "\u0661", "\u00e9", "\u4e16\u754c", "\U0001f642", "\u00a0", "\u2028", "\u3000", "!", "--", "=",
      "'", "\xff", "\xe4\xb8", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\x80",
      std::string("\0", 1), std::string(40, 'x')};
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  std::string text;
  const size_t kinds = 1 + below(parts.size());  // few kinds: much that repeats
  for (size_t left = below(200); left > 0; --left) {
    if (below(20) == 0) {
      text += static_cast<char>(below(256));
    } else {
      text += parts[below(kinds) * 7 % parts.size()];
    }
  }
  return text;
}

template <Pattern pattern>
void count_plainly(const std::string& text, Counts& counts, unsigned seed) {
  // A block of exactly that size, so that the sanitizer sees a step over its end.
  const std::vector<uint8_t> held(text.begin(), text.end());
  for (const uint8_t *at = held.data(), *end = at + held.size(); at < end;) {
    const uint8_t* next = chunk_end<pattern>(at, end);
    require(next > at && next <= end, "a chunk that is empty or goes over the end", seed);
    ++counts[std::string(at, next)];
    at = next;
  }
}

Counts as_map(const ChunkMap& chunks) {
  Counts counts;
  chunks.for_each([&](std::string_view chunk, uint64_t times) { counts[std::string(chunk)] += times; });
  return counts;
}

// Byte-pair encoding as it is defined, with a pass over all chunks for each merge.
std::vector<Merge> merge_plainly(const Counts& counts, size_t wanted) {
  std::vector<std::pair<std::vector<uint32_t>, uint64_t>> words;
  for (const auto& [chunk, times] : counts) {
    words.emplace_back(std::vector<uint32_t>(), times);
    for (const char byte : chunk) words.back().first.push_back(static_cast<uint8_t>(byte));
  }
  std::vector<Merge> merges;
  while (merges.size() < wanted) {
    std::map<std::pair<uint32_t, uint32_t>, uint64_t> pairs;
    for (const auto& [word, times] : words) {
      for (size_t i = 0; i + 1 < word.size(); ++i) pairs[{word[i], word[i + 1]}] += times;
    }
    if (pairs.empty()) break;
    auto best = pairs.begin();
    for (auto it = pairs.begin(); it != pairs.end(); ++it) {
      if (it->second > best->second) best = it;  // the smaller of equals comes first
    }
    const auto [left, right] = best->first;
    const auto token = static_cast<uint32_t>(256 + merges.size());
    merges.push_back({left, right});
    for (auto& [word, times] : words) {
      std::vector<uint32_t> merged;
      for (size_t i = 0; i < word.size(); ++i) {
        const bool here = i + 1 < word.size() && word[i] == left && word[i + 1] == right;
        merged.push_back(here ? token : word[i]);
        i += here;
      }
      word = merged;
    }
  }
  return merges;
}

template <Pattern pattern>
void check(unsigned seed) {
  std::mt19937 random(seed);
  const auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  Counts expected;
  ChunkCounter counter(pattern, 1 + static_cast<int>(below(4)), 1 + below(300));
  for (size_t documents = below(5); documents > 0; --documents) {
    const std::string text = random_text(random);
    count_plainly<pattern>(text, expected, seed);
    for (size_t at = 0; at < text.size();) {
      const size_t size = std::min(text.size() - at, 1 + below(100));
      counter.add(std::string_view(text).substr(at, size));
      at += size;
    }
    counter.end_document();
  }
  ChunkMap chunks = counter.finish();
  require(as_map(chunks) == expected, "counts by threads differ from plain ones", seed);
  const size_t wanted = below(300);
  const std::vector<Merge> plain = merge_plainly(expected, wanted);
  const std::vector<Merge> merges = find_merges(std::move(chunks), wanted, [](size_t) {});
  require(merges.size() == plain.size(), "another number of merges", seed);
  for (size_t i = 0; i < merges.size(); ++i) {
    require(merges[i].left == plain[i].left && merges[i].right == plain[i].right, "another merge", seed);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const unsigned rounds = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 1000;
  for (unsigned seed = 0; seed < rounds; ++seed) {
    check<Pattern::gpt2>(seed);
    check<Pattern::gpt4>(seed);
  }
  std::printf("%u rounds\n", rounds);
}
