// Cases: approximate maths, 16-bit conversions, and what vector.cuh and collectives.cuh make of them.
#pragma once

#include "tests/conformance.h"

namespace almostgpt::conformance {
namespace {

constexpr int kThreads = 256;

LaunchShape shape_for(size_t elements) {
  return {{static_cast<unsigned>((elements + kThreads - 1) / kThreads)}, kThreads};
}

// --- approximate maths: against double, within the bounds that PTX ISA states -------------------------

enum class Function { exp2, log2, rcp, rsqrt, tanh };

template <Function f> DEVICE float apply(float x) {
  if constexpr (f == Function::exp2) return exp2_approx(x);
  else if constexpr (f == Function::log2) return log2_approx(x);
  else if constexpr (f == Function::rcp) return rcp_approx(x);
  else if constexpr (f == Function::rsqrt) return rsqrt_approx(x);
  else return tanh_approx(x);
}

template <Function f> KERNEL apply_kernel(const Global<const float> in, const Global<float> out, const int count) {
  const int i = block_x() * block_size() + thread_id();
  if (i < count) store_global(out + i, apply<f>(load_global(in + i)));
}

// Every upper half of a float, so all exponents, signs, infinities and NaN, with two lower halves.
std::vector<float> floats_of_all_kinds() {
  return generate<float>(2 << 16, [](size_t i) {
    const uint32_t upper = static_cast<uint32_t>(i >> 1);
    return float_of(upper << 16 | (i & 1 ? mix(upper) & 0xffff : 0));
  });
}

constexpr double kLeastNormal = 0x1p-126;
double flushed(double x) { return std::fabs(x) < kLeastNormal ? std::copysign(0.0, x) : x; }

template <Function f>
void check_function(Run& run, double (*exact)(double), bool flushes, const std::function<Bound(double)>& bound_at) {
  const std::vector<float> x = floats_of_all_kinds();
  const auto in = run.input(x);
  const auto out = run.output<float>(x.size());
  run.launch<apply_kernel<f>>(shape_for(x.size()), in, out, static_cast<int>(x.size()));
  const std::vector<float> got = out.read();
  Bound widest{0, kLeastNormal};  // of two results at its edge, one may be flushed
  for (size_t i = 0; i < x.size(); ++i) {
    const double want = exact(flushes ? flushed(x[i]) : x[i]);
    const Bound bound = bound_at(x[i]);
    widest = {std::fmax(widest.relative, bound.relative), std::fmax(widest.absolute, bound.absolute)};
    const double slack = bound.relative * std::fabs(want) + bound.absolute;
    bool right;
    if (std::isnan(want)) right = std::isnan(got[i]);
    else if (std::isinf(want) || want == 0) right = got[i] == want;
    else if (flushes && std::fabs(want) < kLeastNormal * (1 + bound.relative))
      right = got[i] == 0 || std::fabs(got[i] - want) <= slack;  // at the edge, either
    else if (std::fabs(want) > 0x1.ffffffp127)  // rounds beyond the largest float
      right = std::isinf(got[i]) || std::fabs(got[i] - want) <= slack;
    else right = std::fabs(got[i] - want) <= slack;
    char line[120];
    snprintf(line, sizeof line, "of %a: %a, not within %g of %a", x[i], got[i], slack, want);
    require(right, line);
  }
  run.record(got, widest);
}

Bound relative(double bound) { return {bound, 0}; }

// "Maximum ulp error 2" of the correctly rounded result.
CASE(exp2_approx, "exp2_approx") {
  check_function<Function::exp2>(run, std::exp2, true, [](double) { return relative(2.5 * 0x1p-23); });
}
// "Maximum absolute error 2^-22 in (0.5, 2), relative 2^-22 outside."
CASE(log2_approx, "log2_approx") {
  check_function<Function::log2>(run, std::log2, true, [](double x) {
    return x > 0.5 && x < 2 ? Bound{0, 0x1p-22} : relative(0x1p-22);
  });
}
// "Maximum ulp error 1", to which the rounding of what it is compared with adds half of one.
CASE(rcp_approx, "rcp_approx") {
  check_function<Function::rcp>(run, [](double x) { return 1 / x; }, true,
                                [](double) { return relative(1.5 * 0x1p-23); });
}
// "Maximum relative error 2^-22.9."
CASE(rsqrt_approx, "rsqrt_approx") {
  check_function<Function::rsqrt>(run, [](double x) { return x == 0 ? 1 / x : 1 / std::sqrt(x); }, true,
                                  [](double) { return relative(std::exp2(-22.9)); });
}
// Relative error 2^-10.987 (CUDA C++ Programming Guide, __tanhf); subnormals are not flushed.
CASE(tanh_approx, "tanh_approx") {
  check_function<Function::tanh>(run, std::tanh, false,
                                 [](double) { return Bound{std::exp2(-10.987), 0x1p-149}; });
}

// --- minimum and maximum ------------------------------------------------------------------------------

KERNEL min_max_kernel(const Global<const float> in, const Global<float> out, const Global<int> integers,
                      const int count) {
  const int i = thread_id() / count, j = thread_id() % count;
  if (i >= count) return;
  const float a = load_global(in + i), b = load_global(in + j);
  store_global(out + 2 * thread_id(), min(a, b));
  store_global(out + 2 * thread_id() + 1, max(a, b));
  store_global(integers + 2 * thread_id(), min(i, j));
  store_global(integers + 2 * thread_id() + 1, max(i, j));
}

CASE(min_max, "min max") {
  const std::vector<float> x = {NAN, -INFINITY, -1.5f, -1e-40f, 0.0f, 1e-40f, 2.0f, INFINITY};
  const int n = static_cast<int>(x.size());
  std::vector<int> integers;
  const auto in = run.input(x);
  const auto out = run.output<float>(2 * n * n);
  const auto out_integers = run.output<int>(2 * n * n);
  run.launch<min_max_kernel>({{1}, n * n}, in, out, out_integers, n);
  const std::vector<float> got = out.read();
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) {
      const float least = got[2 * (i * n + j)], most = got[2 * (i * n + j) + 1];
      const bool nan_i = std::isnan(x[i]), nan_j = std::isnan(x[j]);
      // Of a number and NaN, the number.
      const float want_least = nan_i ? x[j] : nan_j ? x[i] : std::fmin(x[i], x[j]);
      const float want_most = nan_i ? x[j] : nan_j ? x[i] : std::fmax(x[i], x[j]);
      const auto same = [](float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); };
      require(same(least, want_least) && same(most, want_most), "of floats");
      integers.insert(integers.end(), {i < j ? i : j, i > j ? i : j});
    }
  run.record(got, {});
  run.expect(out_integers, integers, "of integers");
  static_assert(max(2, 3) == 3 && min(2, 3) == 2, "on the host, too");
}

// --- 16-bit floats ------------------------------------------------------------------------------------

template <class T> KERNEL widen_kernel(const Global<const T> in, const Global<float> out) {
  const int i = block_x() * block_size() + thread_id();
  store_global(out + i, to_float(load_global(in + i)));
}

template <class T> KERNEL narrow_kernel(const Global<const float> in, const Global<T> out) {
  const int i = block_x() * block_size() + thread_id();
  const float x = load_global(in + i);
  if constexpr (std::is_same_v<T, bf16>) store_global(out + i, to_bf16(x));
  else store_global(out + i, to_fp16(x));
}

// All 65,536 values to float, exactly.
template <class T> void check_widening(Run& run) {
  const auto all = generate<uint16_t>(1 << 16, [](size_t i) { return static_cast<uint16_t>(i); });
  const auto in = run.input(all);
  const auto out = run.output<float>(all.size());
  run.launch<widen_kernel<T>>(shape_for(all.size()), in.template as<const T>(), out);
  std::vector<float> got = out.read(), want(all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    want[i] = static_cast<float>(kFormat<T>.value(all[i]));
    // What a NaN becomes is recorded, not checked: any NaN will do.
    if (std::isnan(want[i]) && std::isnan(got[i])) want[i] = got[i];
  }
  run.expect(got, want, "to_float");
}

CASE(bf16_to_float, "to_float bf16") { check_widening<bf16>(run); }
CASE(fp16_to_float, "to_float fp16") { check_widening<fp16>(run); }

// Floats whose rounding is known: every value, every midpoint of two neighbours (a tie goes to the even
// one), and the floats right below and above the midpoint. The bits of the neighbour away from zero are
// one more, which after the largest number is infinity.
struct Roundings { std::vector<float> x; std::vector<uint16_t> rounded; };

template <class T> Roundings roundings() {
  Roundings all;
  const auto add = [&](double x, uint32_t rounded) {
    all.x.push_back(static_cast<float>(x));
    all.rounded.push_back(static_cast<uint16_t>(rounded));
  };
  const Format format = kFormat<T>;
  const uint16_t infinity = ((1 << format.exponent_bits) - 1) << format.mantissa_bits;
  const double beyond = std::ldexp(1.0, 1 << (format.exponent_bits - 1));  // after the largest, were there no infinity
  for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000)
    for (uint32_t bits = 0; bits < infinity; ++bits) {
      const double factor = sign ? -1 : 1, value = format.value(bits);
      const double next = bits + 1u == infinity ? beyond : format.value(bits + 1);
      const auto middle = static_cast<float>((value + next) / 2);
      add(factor * value, sign | bits);
      add(factor * std::nextafter(middle, 0.0f), sign | bits);
      add(factor * middle, sign | (bits + (bits & 1)));
      add(factor * std::nextafter(middle, INFINITY), sign | (bits + 1));
    }
  for (const double x : {static_cast<double>(INFINITY), 3e38, 0x1.fffffep127}) {
    const bool overflows = !std::is_same_v<T, bf16> || x > 3.3e38;
    const uint16_t rounded = overflows ? infinity : 0x7f62;  // 3e38 in bf16
    add(x, rounded);
    add(-x, 0x8000 | rounded);
  }
  while (all.x.size() % kThreads != 0) add(0, 0);
  return all;
}

template <class T> void check_narrowing(Run& run) {
  const Roundings all = roundings<T>();
  const auto in = run.input(all.x);
  const auto out = run.output<uint16_t>(all.x.size());
  run.launch<narrow_kernel<T>>(shape_for(all.x.size()), in, out.template as<T>());
  run.expect(out, all.rounded, "rounding");

  // Every NaN of 16 bits, widened, and a signalling one: what it becomes is a NaN.
  const auto nans = generate<float>(kThreads, [](size_t i) {
    return float_of((i & 1 ? 0xff800001u : 0x7f800001u) + (mix(static_cast<uint32_t>(i)) & 0x7ffffe));
  });
  const auto in_nans = run.input(nans);
  const auto out_nans = run.output<uint16_t>(nans.size());
  run.launch<narrow_kernel<T>>({{1}, kThreads}, in_nans, out_nans.template as<T>());
  for (const uint16_t bits : out_nans.read()) require(std::isnan(kFormat<T>.value(bits)), "a NaN became a number");
  run.record(out_nans.read());
}

CASE(float_to_bf16, "to_bf16") { check_narrowing<bf16>(run); }
CASE(float_to_fp16, "to_fp16") { check_narrowing<fp16>(run); }

template <class T> KERNEL pack_kernel(const Global<const float> in, const Global<uint32_t> out) {
  const int i = block_x() * block_size() + thread_id();
  const float lo = load_global(in + 2 * i), hi = load_global(in + 2 * i + 1);
  if constexpr (std::is_same_v<T, bf16>) store_global(out + i, pack_bf16(lo, hi));
  else store_global(out + i, pack_fp16(lo, hi));
}

template <class T> KERNEL unpack_kernel(const Global<const uint32_t> in, const Global<float> out) {
  const int i = block_x() * block_size() + thread_id();
  const uint32_t pair = load_global(in + i);
  if constexpr (std::is_same_v<T, bf16>) {
    store_global(out + 2 * i, unpack_bf16_lo(pair));
    store_global(out + 2 * i + 1, unpack_bf16_hi(pair));
  } else {
    store_global(out + 2 * i, unpack_fp16_lo(pair));
    store_global(out + 2 * i + 1, unpack_fp16_hi(pair));
  }
}

template <class T> void check_pairs(Run& run) {
  // Each rounding in the lower half, beside another in the upper one.
  const Roundings all = roundings<T>();
  const size_t n = all.x.size();
  std::vector<float> x;
  std::vector<uint32_t> pairs;
  for (size_t i = 0; i < n; ++i) {
    const size_t j = (i + 12345) % n;
    x.insert(x.end(), {all.x[i], all.x[j]});
    pairs.push_back(all.rounded[i] | static_cast<uint32_t>(all.rounded[j]) << 16);
  }
  const auto in = run.input(x);
  const auto packed = run.output<uint32_t>(n);
  run.launch<pack_kernel<T>>(shape_for(n), in, packed);
  run.expect(packed, pairs, "pack");

  std::vector<uint32_t> values(1 << 16);
  std::vector<float> want;
  for (uint32_t i = 0; i < values.size(); ++i) {
    values[i] = i | (i ^ 0x5555) << 16;
    for (const uint32_t half : {i, i ^ 0x5555})
      want.push_back(static_cast<float>(kFormat<T>.value(static_cast<uint16_t>(half))));
  }
  const auto in_pairs = run.input(values);
  const auto unpacked = run.output<float>(want.size());
  run.launch<unpack_kernel<T>>(shape_for(values.size()), in_pairs, unpacked);
  const std::vector<float> got = unpacked.read();
  for (size_t i = 0; i < got.size(); ++i)
    if (std::isnan(want[i]) && std::isnan(got[i])) want[i] = got[i];
  run.expect(got, want, "unpack");
}

CASE(bf16_pairs, "pack_bf16 unpack_bf16_lo unpack_bf16_hi") { check_pairs<bf16>(run); }
CASE(fp16_pairs, "pack_fp16 unpack_fp16_lo unpack_fp16_hi") { check_pairs<fp16>(run); }

// --- vector.cuh and collectives.cuh -------------------------------------------------------------------

template <class T> KERNEL double_vector_kernel(const Global<const T> in, const Global<T> out) {
  const int i = thread_id() * kVectorWidth<T>;
  float values[kVectorWidth<T>];
  unpack<T>(load_global_as<u32x4>(in + i), values);
  UNROLL for (int j = 0; j < kVectorWidth<T>; ++j) values[j] = to_float(round_to<T>(2 * values[j] + j));
  store_global_as<u32x4>(out + i, pack<T>(values));
}

template <class T, class Bits> void check_vector(Run& run, Bits (*bits)(int)) {
  constexpr int width = kVectorWidth<T>, n = 32 * width;
  const auto in = run.input(generate<Bits>(n, [&](size_t i) { return bits(small(i, 50)); }));
  const auto out = run.output<Bits>(n);
  run.launch<double_vector_kernel<T>>({{1}, 32}, in.template as<const T>(), out.template as<T>());
  run.expect(out, generate<Bits>(n, [&](size_t i) { return bits(2 * small(i, 50) + static_cast<int>(i) % width); }),
             kName<T>);
}

// --- int8 to 16 bits: every value in every byte ------------------------------------------------------

template <class T> KERNEL int8_kernel(const Global<const uint32_t> in, const Global<uint32_t> out) {
  const int t = thread_id();
  const uint32_t bytes = load_global(in + t);
  store_global(out + 4 * t, pair_of_int8<T, 0, 1>(bytes));
  store_global(out + 4 * t + 1, pair_of_int8<T, 2, 3>(bytes));
  store_global(out + 4 * t + 2, pair_of_int8<T, 0, 2>(bytes));
  store_global(out + 4 * t + 3, pair_of_int8<T, 1, 3>(bytes));
}

template <class T> void check_int8(Run& run) {
  const auto byte = [](uint32_t t, int i) { return (t + 77 * i) & 0xff; };
  const auto words = generate<uint32_t>(256, [&](size_t t) {
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= byte(static_cast<uint32_t>(t), i) << 8 * i;
    return word;
  });
  const auto bits = [&](uint32_t t, int i) {
    return static_cast<uint32_t>(kFormat<T>.of(static_cast<int8_t>(byte(t, i))));
  };
  std::vector<uint32_t> want;
  for (uint32_t t = 0; t < 256; ++t)
    for (const auto& [i, j] : {std::pair(0, 1), {2, 3}, {0, 2}, {1, 3}}) want.push_back(bits(t, i) | bits(t, j) << 16);
  const auto in = run.input(words);
  const auto out = run.output<uint32_t>(want.size());
  run.launch<int8_kernel<T>>({{1}, 256}, in, out);
  run.expect(out, want, "pairs");
}

CASE(int8_to_bf16, "pair_of_int8") { check_int8<bf16>(run); }
CASE(int8_to_fp16, "pair_of_int8") { check_int8<fp16>(run); }

CASE(vectors, "pack unpack round_to to_float") {
  check_vector<bf16, uint16_t>(run, [](int i) { return kFormat<bf16>.of(i); });
  check_vector<fp16, uint16_t>(run, [](int i) { return kFormat<fp16>.of(i); });
  check_vector<float, float>(run, [](int i) { return static_cast<float>(i); });
}

KERNEL collectives_kernel(const Global<const float> in, const Global<float> out) {
  const float value = load_global(in + thread_id());
  store_global(out + 4 * thread_id(), warp_sum(value));
  store_global(out + 4 * thread_id() + 1, warp_sum<8>(value));
  store_global(out + 4 * thread_id() + 2, warp_max(value));
  store_global(out + 4 * thread_id() + 3, warp_max<4>(value));
}

CASE(collectives, "warp_sum warp_max") {
  const auto x = generate<float>(64, [](size_t i) { return static_cast<float>(small(i, 1000)); });
  const auto in = run.input(x);
  const auto out = run.output<float>(4 * x.size());
  run.launch<collectives_kernel>({{1}, 64}, in, out);
  std::vector<float> want;
  for (size_t i = 0; i < x.size(); ++i)
    for (const auto& [width, largest] : {std::pair<size_t, bool>{32, false}, {8, false}, {32, true}, {4, true}}) {
      float result = largest ? -INFINITY : 0;
      for (size_t j = i / width * width; j < (i / width + 1) * width; ++j)
        result = largest ? std::fmax(result, x[j]) : result + x[j];
      want.push_back(result);
    }
  run.expect(out, want, "over groups of lanes");
}

}  // namespace
}  // namespace almostgpt::conformance
