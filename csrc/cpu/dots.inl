// The source of dots.h, for the lanes of one instruction set. Each kernels_*.cpp includes the lanes it is
// compiled for and then this; all names are in anonymous namespaces, so that no function compiled for one
// instruction set can take the place of another's.
//
// The lanes are a `Lanes` with
//   Floats, Integers                    vectors of kFloats float32 and of kIntegers / 2 int32
//   kRows                               rows of x at once, as many as the registers hold
//   Floats zero(), repeat(float), load(p) of float, bf16 or int8_t, multiply_add(a, b, sum)
//   store(float*, Floats), float total(Floats)
//   Integers zero_integers(), widen(const int8_t*), load(const int16_t*)   kIntegers of 16 bits each
//   Integers multiply_add_pairs(a, b, sum)   a[2i] b[2i] + a[2i+1] b[2i+1] added to 32-bit sum[i]
//   int64_t total(Integers)             of 32-bit numbers
//   add(a, b)                           of both kinds
//
// One row of the weight is read at a time, with four sums beside each other: a single stream, which the
// processor's own prefetching follows best. On 2 cores of an AMD EPYC (Zen 4, AVX-512) that reads float32
// at 35 to 39 GB/s; two rows at once read 22 to 30, and software prefetch gains nothing (2026-11-21).

#include <cstring>

#include "cpu/dots.h"

namespace almostgpt::cpu {
namespace {

constexpr int kSums = 4;  // of one row: enough to hide the latency of a multiply-add

struct FloatTraits {
  using X = float;
  using Sum = float;
  using Vector = Lanes::Floats;
  static constexpr int64_t kStep = kSums * Lanes::kFloats;  // columns
  static constexpr int64_t kPart = INT64_MAX;               // columns that one set of sums can take

  template <class Weight> static Vector weights(const Weight* p) { return Lanes::load(p); }
  static Vector zero() { return Lanes::zero(); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return Lanes::multiply_add(a, b, sum); }
};

struct IntegerTraits {
  using X = int16_t;
  using Sum = int64_t;
  using Vector = Lanes::Integers;
  static constexpr int64_t kStep = kSums * Lanes::kIntegers;
  // A pair of products is at most 2 * 32767 * 128, and 256 of those fit into 32 bits: 64 for each of the
  // four sums, which are added before they are widened.
  static constexpr int64_t kPart = 64 * kStep;

  static Vector weights(const int8_t* p) { return Lanes::widen(p); }
  static Vector zero() { return Lanes::zero_integers(); }
  static Vector multiply_add(Vector a, Vector b, Vector sum) { return Lanes::multiply_add_pairs(a, b, sum); }
};

template <class Traits, int ROWS, class Weight>
inline void add_step(const Weight* weight, const typename Traits::X* const (&x)[ROWS],
                     typename Traits::Vector (&sums)[ROWS][kSums]) {
  constexpr int64_t lanes = Traits::kStep / kSums;
  for (int s = 0; s < kSums; ++s) {
    const auto w = Traits::weights(weight + s * lanes);
    for (int r = 0; r < ROWS; ++r)
      sums[r][s] = Traits::multiply_add(w, Lanes::load(x[r] + s * lanes), sums[r][s]);
  }
}

// One row of the weight with ROWS rows of x.
template <class Traits, int ROWS, class Weight>
inline void dot(const Weight* weight, int64_t columns, const typename Traits::X* x, int64_t x_stride,
                typename Traits::Sum* out, int64_t out_stride) {
  using X = typename Traits::X;
  for (int r = 0; r < ROWS; ++r) out[r * out_stride] = 0;
  for (int64_t begin = 0; begin < columns;) {
    const int64_t end = columns - begin > Traits::kPart ? begin + Traits::kPart : columns;
    typename Traits::Vector sums[ROWS][kSums];
    for (auto& row : sums)
      for (auto& sum : row) sum = Traits::zero();
    int64_t k = begin;
    for (; k + Traits::kStep <= end; k += Traits::kStep) {
      const X* rows[ROWS];
      for (int r = 0; r < ROWS; ++r) rows[r] = x + r * x_stride + k;
      add_step<Traits, ROWS>(weight + k, rows, sums);
    }
    if (k < end) {  // what is left, with zeros after it
      Weight w[Traits::kStep] = {};
      X rest[ROWS][Traits::kStep] = {};
      const X* rows[ROWS];
      std::memcpy(w, weight + k, (end - k) * sizeof(Weight));
      for (int r = 0; r < ROWS; ++r) {
        std::memcpy(rest[r], x + r * x_stride + k, (end - k) * sizeof(X));
        rows[r] = rest[r];
      }
      add_step<Traits, ROWS>(w, rows, sums);
    }
    for (int r = 0; r < ROWS; ++r)
      out[r * out_stride] +=
          Lanes::total(Lanes::add(Lanes::add(sums[r][0], sums[r][1]), Lanes::add(sums[r][2], sums[r][3])));
    begin = end;
  }
}

template <class Traits, class Weight>
void dots(const Weight* weight, int64_t weight_rows, int64_t columns, const typename Traits::X* x,
          int64_t x_stride, int64_t rows, typename Traits::Sum* sums, int64_t sums_stride) {
  for (int64_t n = 0; n < weight_rows; ++n, weight += columns, ++sums) {
    int64_t r = 0;
    for (; r + Lanes::kRows <= rows; r += Lanes::kRows)
      dot<Traits, Lanes::kRows>(weight, columns, x + r * x_stride, x_stride, sums + r * sums_stride, sums_stride);
    for (; r < rows; ++r)
      dot<Traits, 1>(weight, columns, x + r * x_stride, x_stride, sums + r * sums_stride, sums_stride);
  }
}

constexpr DotKernels kDots{dots<FloatTraits, float>, dots<FloatTraits, bf16>, dots<FloatTraits, int8_t>,
                           dots<IntegerTraits, int8_t>};

}  // namespace
}  // namespace almostgpt::cpu
