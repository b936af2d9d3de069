#include "count.h"

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace almostgpt::bpe {
namespace {

// Distinct chunks that a thread keeps to itself before it adds them to what is common: what occurs once
// is then not held by each.
constexpr size_t own_chunks = 1 << 17;

template <Pattern pattern>
void count_document(const uint8_t* text, const uint8_t* end, ChunkMap& counts) {
  while (text < end) {
    const uint8_t* next = chunk_end<pattern>(text, end);
    counts.add(text, next - text);
    text = next;
  }
}

}  // namespace

// Whole documents, and of one that is longer than a piece, parts.
struct ChunkCounter::Piece {
  std::vector<uint8_t> text;
  std::vector<size_t> ends;  // of each document that ends here

  size_t open() const { return ends.empty() ? 0 : ends.back(); }  // where the last document begins
};

class ChunkCounter::Threads {
 public:
  Threads(Pattern pattern, size_t count) : pattern_(pattern), count_(count) {}

  ~Threads() {
    {
      const std::lock_guard lock(mutex_);
      waiting_.clear();
    }
    stop();
  }

  void take(std::unique_ptr<Piece> piece) {
    std::unique_lock lock(mutex_);
    ended_ = false;
    while (threads_.size() < count_) threads_.emplace_back([this] { work(); });
    room_.wait(lock, [this] { return waiting_.size() < count_ || failure_; });
    if (failure_) std::rethrow_exception(failure_);
    waiting_.push_back(std::move(piece));
    more_.notify_one();
  }

  ChunkMap finish() {
    stop();
    if (failure_) std::rethrow_exception(failure_);
    return std::exchange(common_, ChunkMap());
  }

 private:
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      ended_ = true;
    }
    more_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

  void work() {
    try {
      ChunkMap own;
      while (const std::unique_ptr<Piece> piece = next()) {
        count(*piece, own);
        if (own.size() > own_chunks) hand_in(std::exchange(own, ChunkMap()));
      }
      hand_in(std::move(own));
    } catch (...) {
      const std::lock_guard lock(mutex_);
      failure_ = std::current_exception();
      room_.notify_all();
    }
  }

  std::unique_ptr<Piece> next() {
    std::unique_lock lock(mutex_);
    more_.wait(lock, [this] { return !waiting_.empty() || ended_; });
    if (waiting_.empty()) return nullptr;
    std::unique_ptr<Piece> piece = std::move(waiting_.front());
    waiting_.pop_front();
    room_.notify_one();
    return piece;
  }

  void count(const Piece& piece, ChunkMap& counts) const {
    const uint8_t* text = piece.text.data();
    size_t start = 0;
    for (const size_t end : piece.ends) {
      if (pattern_ == Pattern::gpt2) {
        count_document<Pattern::gpt2>(text + start, text + end, counts);
      } else {
        count_document<Pattern::gpt4>(text + start, text + end, counts);
      }
      start = end;
    }
  }

  void hand_in(ChunkMap own) {
    const std::lock_guard lock(common_mutex_);
    if (common_.size() < own.size()) std::swap(common_, own);
    common_.add(own);
  }

  const Pattern pattern_;
  const size_t count_;
  std::mutex mutex_;  // of all down to failure_
  std::condition_variable more_, room_;
  std::deque<std::unique_ptr<Piece>> waiting_;
  bool ended_ = false;
  std::exception_ptr failure_;
  std::mutex common_mutex_;
  ChunkMap common_;
  std::vector<std::thread> threads_;
};

ChunkCounter::ChunkCounter(Pattern pattern, int threads, size_t piece_size)
    : piece_size_(piece_size),
      piece_(std::make_unique<Piece>()),
      full_(piece_size),
      threads_(std::make_unique<Threads>(pattern, threads)) {}

ChunkCounter::~ChunkCounter() = default;

void ChunkCounter::add(std::string_view text) {
  while (!text.empty()) {
    std::vector<uint8_t>& held = piece_->text;
    if (held.capacity() < full_ + chunk_padding) held.reserve(full_ + chunk_padding);
    const size_t size = std::min(text.size(), full_ - held.size());
    held.insert(held.end(), text.begin(), text.begin() + size);
    text.remove_prefix(size);
    if (held.size() == full_) hand_over();
  }
}

void ChunkCounter::end_document() {
  if (piece_->text.size() > piece_->open()) piece_->ends.push_back(piece_->text.size());
}

// Hands over what is in the piece up to the last place where it can be cut; the rest begins the next one.
void ChunkCounter::hand_over() {
  Piece& piece = *piece_;
  std::vector<uint8_t>& text = piece.text;
  const uint8_t* open = text.data() + piece.open();
  const size_t cut = last_safe_cut(open, text.data() + text.size()) - text.data();
  if (cut > piece.open()) piece.ends.push_back(cut);
  if (cut == 0) {  // no place: wait for twice as much, so that looking for one stays cheap
    full_ *= 2;
    return;
  }
  auto rest = std::make_unique<Piece>();
  full_ = std::max(piece_size_, 2 * (text.size() - cut));
  rest->text.reserve(full_ + chunk_padding);
  rest->text.assign(text.begin() + cut, text.end());
  text.resize(cut);
  text.resize(cut + chunk_padding);
  threads_->take(std::exchange(piece_, std::move(rest)));
}

ChunkMap ChunkCounter::finish() {
  end_document();
  piece_->text.resize(piece_->text.size() + chunk_padding);
  threads_->take(std::exchange(piece_, std::make_unique<Piece>()));
  return threads_->finish();
}

}  // namespace almostgpt::bpe
