// How it works. The distinct chunks lie end to end in one array of places, a place for each byte. A
// token is at the place of its first byte, and is also written at its last, so that from any token both
// neighbours are one step away. Each place knows the pair that begins there, and each pair knows
// its places and how often it occurs.
//
// A merge of (a, b) into c goes through the places of (a, b) alone. In "x a b y" it takes one (x, a) and
// one (b, y) away, and brings (x, c) and (c, y). All pairs with c come to be in this one step, and from
// then on they can only become fewer. So the places of a pair are written once, in order; one that no
// longer holds is known by the pair that the place itself names. And so the heap may be lazy: what it
// knows of a pair is never less than the truth, and the pair on top is put back if it is more.
//
// Each merge at a place makes one token of two, so all merges together visit fewer places than the
// chunks have bytes.

#include "merge.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <utility>

namespace almostgpt::bpe {
namespace {

constexpr uint32_t none = 0xFFFFFFFF;

struct Place {
  uint32_t token;  // that begins or ends here; `none` between two chunks
  uint32_t pair;   // of the token that begins here and the next; `none` for no pair
  uint32_t chunk;  // the number of the chunk
};

struct Pair {
  uint64_t times;  // how often it occurs in the text
  uint32_t left, right;
  uint32_t places;
  const uint32_t* listed;  // its places
};

// A pair in the heap, with as many `times` as when it was put there.
struct Candidate {
  uint64_t times;
  uint64_t tokens;  // left and right, in the order in which ties are broken
  uint32_t pair;

  bool operator<(const Candidate& other) const {
    return times != other.times ? times < other.times : tokens > other.tokens;
  }
};

class Merger {
 public:
  explicit Merger(ChunkMap&& chunks) {
    lay_out(std::exchange(chunks, ChunkMap()));
    list_byte_pairs();
  }

  // Carries out the next merge; false where there is none.
  bool merge_next() {
    while (!heap_.empty()) {
      const Candidate top = heap_.front();
      std::pop_heap(heap_.begin(), heap_.end());
      heap_.pop_back();
      if (pairs_[top.pair].times == top.times) {
        merge(top.pair);
        return true;
      }
      push(top.pair);
    }
    return false;
  }

  std::vector<Merge> merges;

 private:
  void lay_out(ChunkMap chunks) {
    size_t size = 1;
    chunks.for_each([&](std::string_view chunk, uint64_t) { size += chunk.size() + 1; });
    if (size >= none) throw std::length_error("the distinct chunks together have 4 GiB or more");
    places_.reserve(size);
    times_of_.reserve(chunks.size());
    add_place(none);
    chunks.for_each([&](std::string_view chunk, uint64_t times) {
      for (const char byte : chunk) add_place(static_cast<uint8_t>(byte));
      add_place(none);
      times_of_.push_back(times);
    });
  }

  void add_place(uint32_t token) {
    places_.push_back({token, none, static_cast<uint32_t>(times_of_.size())});
  }

  void list_byte_pairs() {
    length_.assign(256, 1);
    std::vector<uint32_t> pair_of(256 * 256, none);
    for (size_t at = 1; at + 1 < places_.size(); ++at) {
      const uint32_t left = places_[at].token, right = places_[at + 1].token;
      if (left == none || right == none) continue;
      uint32_t& pair = pair_of[256 * left + right];
      if (pair == none) pair = new_pair(left, right);
      found_at(pair, static_cast<uint32_t>(at));
    }
    list_places(0, [this](auto&& list) {
      for (size_t at = 1; at < places_.size(); ++at) {
        if (places_[at].pair != none) list(places_[at].pair, static_cast<uint32_t>(at));
      }
    });
  }

  // One more occurrence of a new pair, which begins at a place.
  void found_at(uint32_t pair, uint32_t at) {
    pairs_[pair].times += times_of_[places_[at].chunk];
    ++pairs_[pair].places;
    places_[at].pair = pair;
  }

  uint32_t new_pair(uint32_t left, uint32_t right) {
    if (pairs_.size() == none) throw std::length_error("there are 2^32 distinct pairs or more");
    pairs_.push_back({0, left, right, 0, nullptr});
    return static_cast<uint32_t>(pairs_.size() - 1);
  }

  // Gives the pairs from number `first` on their lists, and puts them into the heap. `each(list)` calls
  // list(pair, place) for all places of theirs in order.
  template <typename Each>
  void list_places(size_t first, Each&& each) {
    size_t size = 0;
    for (size_t pair = first; pair < pairs_.size(); ++pair) size += pairs_[pair].places;
    lists_.push_back(std::make_unique_for_overwrite<uint32_t[]>(size));
    std::vector<uint32_t*> ends;
    uint32_t* start = lists_.back().get();
    for (size_t pair = first; pair < pairs_.size(); ++pair) {
      ends.push_back(start);
      pairs_[pair].listed = start;
      start += pairs_[pair].places;
    }
    each([&](uint32_t pair, uint32_t at) { *ends[pair - first]++ = at; });
    for (size_t pair = first; pair < pairs_.size(); ++pair) push(static_cast<uint32_t>(pair));
  }

  void push(uint32_t pair) {
    const auto& [times, left, right, places, listed] = pairs_[pair];
    if (!times) return;
    heap_.push_back({times, uint64_t{left} << 32 | right, pair});
    std::push_heap(heap_.begin(), heap_.end());
  }

  void merge(uint32_t pair) {
    const Pair merged = pairs_[pair];
    const uint32_t left_length = length_[merged.left];
    const uint32_t length = left_length + length_[merged.right];
    const auto token = static_cast<uint32_t>(length_.size());
    merges.push_back({merged.left, merged.right});
    length_.push_back(length);
    with_left_.resize(token + 1, none);
    with_right_.resize(token + 1, none);

    const size_t first_new = pairs_.size();
    for (uint32_t i = 0; i < merged.places; ++i) {
      const uint32_t at = merged.listed[i];
      if (places_[at].pair != pair) continue;
      const uint32_t right_at = at + left_length, next_at = at + length;
      const uint64_t times = times_of_[places_[at].chunk];
      const uint32_t before = places_[at - 1].token, next = places_[next_at].token;

      if (next != none) pairs_[places_[right_at].pair].times -= times;
      places_[right_at].pair = places_[at].pair = none;
      places_[at].token = token;
      places_[next_at - 1].token = token;
      if (before != none) {
        const uint32_t before_at = at - length_[before];
        pairs_[places_[before_at].pair].times -= times;
        uint32_t& brought = with_left_[before];
        if (brought == none) brought = new_pair(before, token);
        found_at(brought, before_at);
        found_.push_back({brought, before_at});
      }
      if (next != none) {
        uint32_t& brought = with_right_[next];
        if (brought == none) brought = new_pair(token, next);
        found_at(brought, at);
        found_.push_back({brought, at});
      }
    }
    pairs_[pair].times = 0;
    for (size_t brought = first_new; brought < pairs_.size(); ++brought) {
      with_left_[pairs_[brought].left] = none;
      with_right_[pairs_[brought].right] = none;
    }
    list_places(first_new, [this](auto&& list) {
      for (const auto& [brought, at] : found_) list(brought, at);
    });
    found_.clear();
  }

  std::vector<Place> places_;
  std::vector<uint64_t> times_of_;  // of each chunk, how often it occurs
  std::vector<uint32_t> length_;    // of each token, its bytes
  std::vector<Pair> pairs_;
  std::vector<std::unique_ptr<uint32_t[]>> lists_;  // the places of the pairs that a step brought
  std::vector<Candidate> heap_;
  std::vector<std::pair<uint32_t, uint32_t>> found_;  // within a step: (new pair, place)
  std::vector<uint32_t> with_left_, with_right_;      // within a step: the new pair with a token
};

}  // namespace

std::vector<Merge> find_merges(ChunkMap&& chunks, size_t count,
                               const std::function<void(size_t)>& progress) {
  Merger merger(std::move(chunks));
  while (merger.merges.size() < count && merger.merge_next()) progress(merger.merges.size());
  return std::move(merger.merges);
}

}  // namespace almostgpt::bpe
