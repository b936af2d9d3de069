// The next tokens: a block takes a row. Greedy, or with a temperature alone, it reads the row once. With
// filters it keeps the row in shared memory, where it fits, and reads it again for each pass of a search.

#include "sampling/sample.h"

#include "sampling/merge.cuh"
#include "sampling/noise.cuh"
#include "sampling/row.cuh"
#include "sampling/threshold.cuh"

namespace almostgpt {
namespace {

constexpr int kMaxThreads = 32 * kMaxWarps;

template <class T>
struct SampleArgs {
  Global<const T> logits;
  int64_t stride;
  int misaligned;  // bytes from a multiple of 16 to the first row
  int length;
  Global<const int64_t> positions, seeds, sequences;
  Global<uint8_t> seen;        // or absent
  int64_t seen_stride;         // 0 then
  Global<int64_t> ids;
  Global<float> logprobs;  // or absent
  float temperature, penalty;
  int top_k;               // 0: all
  float top_p, log_min_p;  // 1: all; -inf: all

  DEVICE Row<T> row() const {
    const int64_t first = block_x() * stride;
    const int bytes = static_cast<int>((misaligned + first * static_cast<int64_t>(sizeof(T))) & 15);
    return Row<T>(logits + first, bytes, seen + block_x() * seen_stride, length, penalty);
  }
  DEVICE Stream stream() const {
    const auto at = [](Global<const int64_t> of) { return load_global<Cache::read_only>(of + block_x()); };
    return Stream{halves(at(seeds)), halves(at(sequences)), halves(at(positions)).x};
  }
};

// l / T + g, or T times that, whichever is smaller: neither overflows.
struct Scaling {
  float logit, noise;

  DEVICE explicit Scaling(float temperature)
      : logit(temperature > 1.0f ? 1.0f / temperature : 1.0f), noise(min(temperature, 1.0f)) {}
};

// One thread writes what the block found.
template <class T>
DEVICE void finish(const SampleArgs<T>& a, const Row<T>& row, const Choice& best, const LogSum& total) {
  if (thread_id() > 0) return;
  store_global(a.ids + block_x(), int64_t{best.id});
  if (a.logprobs) {
    const float logit = to_float(load_global<Cache::read_only>(row.logits + best.id));
    store_global(a.logprobs + block_x(), total.log_probability(logit));
  }
  if (row.seen) store_global(row.seen + best.id, uint8_t{1});
}

// --- one pass ------------------------------------------------------------------------------------------

// The draw needs no sum over the row, and the log-probability's is taken on the way.
struct Found {
  Choice best;
  LogSum total;

  DEVICE void merge(const Found& other) {
    best.merge(other.best);
    total.merge(other.total);
  }
};

// Offers a vector's logits with their noise. A block of random words is for four tokens from a multiple of
// four on, and the vector may begin between two: then its values are moved up to where their words are.
template <int width>
DEVICE void offer_with_noise(Choice& best, const float (&values)[width], int first, const Stream& stream,
                             const Scaling& scaling) {
  float moved[width + 4];
  UNROLL for (int i = 0; i < width + 4; ++i) moved[i] = i < width ? values[i] : -INFINITY;
  UNROLL for (int by = 1; by < 4; by *= 2) {
    if ((first & by) == 0) continue;  // the same for all of the row's vectors
    UNROLL for (int i = width + 3; i >= 0; --i) moved[i] = i >= by ? moved[i - by] : -INFINITY;
  }
  const int id = first - (first & 3);
  UNROLL for (int i = 0; i < width + 4; i += 4) {
    if (i == width && id == first) break;
    const u32x4 words = stream.words((id + i) >> 2);
    best.offer(moved[i] * scaling.logit, gumbel(words.x) * scaling.noise, id + i);
    best.offer(moved[i + 1] * scaling.logit, gumbel(words.y) * scaling.noise, id + i + 1);
    best.offer(moved[i + 2] * scaling.logit, gumbel(words.z) * scaling.noise, id + i + 2);
    best.offer(moved[i + 3] * scaling.logit, gumbel(words.w) * scaling.noise, id + i + 3);
  }
}

template <class T, bool draws>
KERNEL LAUNCH_BOUNDS(kMaxThreads, 1) sample_kernel(GRID_CONSTANT const SampleArgs<T> a) {
  constexpr int width = Row<T>::width;
  const Row<T> row = a.row();
  const Scaling scaling(a.temperature);
  Stream stream{};
  if constexpr (draws) stream = a.stream();
  Found found;
  const int vectors = row.vectors();
  u32x4 next{};
  if (thread_id() < vectors) next = row.template load<Cache::streaming>(thread_id());
  for (int v = thread_id(); v < vectors; v += block_size()) {
    float values[width];
    unpack<T>(next, values);
    // On its way while this one is worked on.
    if (v + block_size() < vectors) next = row.template load<Cache::streaming>(v + block_size());
    if (a.logprobs) found.total.add(values);
    row.penalise(v, values);
    const int first = row.first_id(v);
    if constexpr (draws) {
      offer_with_noise(found.best, values, first, stream, scaling);
    } else {
      UNROLL for (int i = 0; i < width; ++i) found.best.offer(values[i], 0.0f, first + i);
    }
  }
  found = block_merge(found);
  finish(a, row, found.best, found.total);
}

// --- with filters --------------------------------------------------------------------------------------

// What the first pass over a row finds.
struct Survey {
  float largest = -INFINITY, least = INFINITY;  // after the penalty; of those above -inf
  int first_nan = 0x7fffffff;
  LogSum total;

  DEVICE void merge(const Survey& other) {
    largest = max(largest, other.largest), least = min(least, other.least);
    first_nan = min(first_nan, other.first_nan);
    total.merge(other.total);
  }
};

// in_shared: the row fits into shared memory as float32. There a thread reads what it wrote itself, and
// nobody else, so no barrier is needed.
template <class T, bool in_shared>
KERNEL LAUNCH_BOUNDS(kMaxThreads, 1) sample_filtered_kernel(GRID_CONSTANT const SampleArgs<T> a) {
  constexpr int width = Row<T>::width;
  const Row<T> row = a.row();
  const int vectors = row.vectors();
  // Quarter q of vector v: side by side with its neighbours', so that no banks conflict.
  const auto quarter = [&](int v, int q) { return shared_base() + kMergeBytes + 16 * (q * vectors + v); };

  Survey survey;
  for (int v = thread_id(); v < vectors; v += block_size()) {
    float values[width];
    unpack<T>(row.template load<in_shared ? Cache::streaming : Cache::read_only>(v), values);
    if (a.logprobs) survey.total.add(values);
    row.penalise(v, values);
    UNROLL for (int i = 0; i < width; ++i) {
      survey.largest = max(survey.largest, values[i]);
      if (values[i] > -INFINITY) survey.least = min(survey.least, values[i]);
      if (values[i] != values[i]) survey.first_nan = min(survey.first_nan, row.first_id(v) + i);
    }
    if constexpr (in_shared) {
      UNROLL for (int q = 0; q < width / 4; ++q)
        store_shared(quarter(v, q), f32x4{values[4 * q], values[4 * q + 1], values[4 * q + 2], values[4 * q + 3]});
    }
  }
  survey = block_merge(survey);
  const float largest = survey.largest;
  Choice best;
  if (survey.first_nan < a.length) {
    best.id = survey.first_nan;
    finish(a, row, best, survey.total);
    return;
  }

  // Calls f(id, value) for this thread's part of the row.
  const auto each = [&](auto f) {
    for (int v = thread_id(); v < vectors; v += block_size()) {
      float values[width];
      if constexpr (in_shared) {
        UNROLL for (int q = 0; q < width / 4; ++q) {
          const f32x4 four = load_shared<f32x4>(quarter(v, q));
          values[4 * q] = four.x, values[4 * q + 1] = four.y, values[4 * q + 2] = four.z, values[4 * q + 3] = four.w;
        }
      } else {
        unpack<T>(row.template load<Cache::read_only>(v), values);
        row.penalise(v, values);
      }
      UNROLL for (int i = 0; i < width; ++i) f(row.first_id(v) + i, values[i]);
    }
  };

  float lowest = survey.least;
  const uint32_t end = key_of(largest) + 1;
  if (a.top_k > 0) {
    const auto one = [](float) { return 1u; };
    const auto k = [&](uint32_t) { return static_cast<uint32_t>(a.top_k); };
    lowest = threshold<uint32_t>(each, one, k, key_of(lowest), end);
  }
  if (a.top_p < 1.0f) {
    // In units of 2^-39 of the largest one's, so that 2^24 of them fit into 64 bits.
    const float scale = kLog2e / a.temperature;
    const auto mass = [&](float value) {
      return static_cast<uint64_t>(549755813888.0f * (value == largest ? 1.0f : exp2_approx((value - largest) * scale)));
    };
    const auto share = [&](uint64_t all) { return static_cast<uint64_t>(static_cast<double>(all) * a.top_p); };
    lowest = threshold<uint64_t>(each, mass, share, key_of(lowest), end);
  }

  const Scaling scaling(a.temperature);
  const Stream stream = a.stream();
  each([&](int id, float value) {
    if (value < lowest) return;
    if (value != largest && (value - largest) / a.temperature < a.log_min_p) return;
    best.offer(value * scaling.logit, stream.noise(id) * scaling.noise, id);
  });
  finish(a, row, block_merge(best), survey.total);
}

template <class T> int sample(const SampleInputs& in, const SampleOptions& options, const SampleOutputs& out, void* stream) {
  constexpr int width = kVectorWidth<T>;
  SampleArgs<T> args{};
  args.logits = Global<const T>(static_cast<const T*>(in.logits));
  args.stride = in.stride, args.length = in.length;
  args.misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(in.logits) & 15);
  args.positions = Global<const int64_t>(in.positions), args.seeds = Global<const int64_t>(in.seeds);
  args.sequences = Global<const int64_t>(in.sequences);
  args.seen = Global<uint8_t>(out.seen), args.seen_stride = out.seen_stride;
  args.ids = Global<int64_t>(out.ids), args.logprobs = Global<float>(out.logprobs);
  args.temperature = options.temperature, args.penalty = options.repetition_penalty;
  args.top_k = options.top_k < in.length ? options.top_k : 0;
  args.top_p = options.top_p;
  args.log_min_p = options.min_p > 0.0f ? std::log(options.min_p) : -INFINITY;

  const int vectors = (in.length + width - 1) / width + 1;  // one more where a row begins within one
  const int threads = vectors < kMaxThreads ? (vectors + 31) / 32 * 32 : kMaxThreads;
  LaunchShape shape{{static_cast<unsigned>(in.rows)}, threads, kMergeBytes};
  if (options.temperature == 0.0f) return launch<sample_kernel<T, false>>(shape, stream, args);
  if (args.top_k == 0 && args.top_p >= 1.0f && options.min_p <= 0.0f)
    return launch<sample_kernel<T, true>>(shape, stream, args);
  Card card;
  if (const int error = current_card(card)) return error;
  const int64_t whole = kMergeBytes + int64_t{vectors} * width * 4;
  if (whole > card.shared_bytes_per_block) return launch<sample_filtered_kernel<T, false>>(shape, stream, args);
  shape.shared_bytes = static_cast<uint32_t>(whole);
  return launch<sample_filtered_kernel<T, true>>(shape, stream, args);
}

}  // namespace

int sample(const SampleInputs& inputs, const SampleOptions& options, const SampleOutputs& outputs, void* stream) {
  switch (inputs.dtype) {
    case DType::float32: return sample<float>(inputs, options, outputs, stream);
    case DType::bfloat16: return sample<bf16>(inputs, options, outputs, stream);
    case DType::float16: return sample<fp16>(inputs, options, outputs, stream);
  }
  return 0;
}

}  // namespace almostgpt
