// Counts the chunks of documents by several threads, while the text streams by.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "chunk_map.h"
#include "split.h"

namespace almostgpt::bpe {

// The text is cut into pieces, at places where a chunk ends in any case, and each piece is split and
// counted by one of the threads. No more than a few pieces are held at a time.
class ChunkCounter {
 public:
  // piece_size: bytes of a piece; one is larger where it has no place to be cut.
  ChunkCounter(Pattern pattern, int threads, size_t piece_size = 1 << 20);
  ~ChunkCounter();

  // More text of the present document. It may wait for the threads to catch up.
  void add(std::string_view text);

  // What comes next is another document: no chunk goes over its border.
  void end_document();

  // The counts of all text so far; the counter is then as new. What a thread threw (no memory) is thrown
  // here or by add().
  ChunkMap finish();

 private:
  class Threads;
  struct Piece;
  void hand_over();

  const size_t piece_size_;
  std::unique_ptr<Piece> piece_;  // what is being filled
  size_t full_;                   // bytes at which it is handed over
  std::unique_ptr<Threads> threads_;
};

}  // namespace almostgpt::bpe
