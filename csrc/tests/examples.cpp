// The two example kernels in the emulator, as whole kernels: right for odd shapes, the same to the bit
// whatever the schedule, without bank conflicts, reading and writing no byte too many.
//
//   g++ -std=c++17 -O2 -DALMOSTGPT_EMULATOR -I csrc csrc/tests/examples.cpp csrc/device/emulator/*.cpp
//
// With --faults it plants every fault in turn that the emulator knows for them (a barrier dropped, one
// copy too many under way …): each has to be noticed, by a check or by a wrong result. One that is not
// stands for a call that the kernel does not need.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device/emulator/emulator.h"
#include "tests/conformance.h"
#include "tests/gemm_sm80.cuh"
#include "tests/gemm_sm90.cuh"

namespace almostgpt::examples {
namespace {

using conformance::kFormat;
using conformance::kName;
using conformance::mix;
using emulator::Asynchrony;

// --- kernels and problems -----------------------------------------------------------------------------

struct Shape {
  int m, n, k;
  std::string text() const { return std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k); }
};

// One of the kernels, for any type.
struct Sm80 {
  static constexpr const char* name = "gemm_sm80";
  static constexpr int major = 8, tile_m = 64, tile_n = 64;
  template <class T> static int run(const T* a, const T* b, T* c, Shape s) {
    return gemm_sm80(a, b, c, s.m, s.n, s.k, nullptr);
  }
};
struct Sm90 {
  static constexpr const char* name = "gemm_sm90";
  static constexpr int major = 9, tile_m = GemmSm90::kTileM, tile_n = GemmSm90::kTileN;
  template <class T> static int run(const T* a, const T* b, T* c, Shape s) {
    return gemm_sm90(a, b, c, s.m, s.n, s.k, nullptr);
  }
};

// Aligned as cudaMalloc does, so that a kernel may take 16 bytes at once.
template <class T> struct Array {
  std::unique_ptr<T, void (*)(void*)> data;
  size_t size;
  explicit Array(size_t size)
      : data(static_cast<T*>(std::aligned_alloc(256, (size * sizeof(T) + 255) / 256 * 256)), std::free), size(size) {}
  size_t bytes() const { return size * sizeof(T); }
};

template <class Kernel, class T> struct Problem {
  Shape shape;
  Array<T> a, b;

  explicit Problem(Shape shape)
      : shape(shape), a(static_cast<size_t>(shape.m) * shape.k), b(static_cast<size_t>(shape.n) * shape.k) {
    // Signs and magnitudes from 1/4 to 1, of every mantissa.
    const auto value = [](uint32_t i) {
      const uint32_t random = mix(i), one = std::is_same_v<T, bf16> ? 0x3e80 : 0x3400;
      return T{static_cast<uint16_t>((random & 0x8000) | (one + random % (2 << kFormat<T>.mantissa_bits)))};
    };
    for (size_t i = 0; i < a.size; ++i) a.data.get()[i] = value(static_cast<uint32_t>(i));
    for (size_t i = 0; i < b.size; ++i) b.data.get()[i] = value(static_cast<uint32_t>(i + 777777));
  }

  // C as the emulator computes it now; throws what the emulator finds.
  std::vector<uint16_t> run() const {
    Array<T> c(static_cast<size_t>(shape.m) * shape.n);
    memset(static_cast<void*>(c.data.get()), 0xab, c.bytes());
    emulator::Session session(Kernel::major, 0);
    session.buffer("a", a.data.get(), a.bytes(), emulator::Use::input);
    session.buffer("b", b.data.get(), b.bytes(), emulator::Use::input);
    session.buffer("c", c.data.get(), c.bytes(), emulator::Use::output);
    if (const int error = Kernel::run(a.data.get(), b.data.get(), c.data.get(), shape))
      throw std::runtime_error(error_string(error));
    std::vector<uint16_t> bits(c.size);
    memcpy(bits.data(), c.data.get(), c.bytes());
    return bits;
  }

  // The first element that is further from the product in double than rounding can take it; "" for none.
  std::string wrong(const std::vector<uint16_t>& c) const {
    const auto value = [](T x) { return kFormat<T>.value(x.bits); };
    const double half_ulp = std::ldexp(1.0, -kFormat<T>.mantissa_bits - 1);
    for (int row = 0; row < shape.m; ++row)
      for (int column = 0; column < shape.n; ++column) {
        double sum = 0, magnitude = 0;
        for (int k = 0; k < shape.k; ++k) {
          const double term = value(a.data.get()[row * shape.k + k]) * value(b.data.get()[column * shape.k + k]);
          sum += term;
          magnitude += std::fabs(term);
        }
        const double got = kFormat<T>.value(c[static_cast<size_t>(row) * shape.n + column]);
        const double bound = half_ulp * std::fabs(sum) + shape.k * 0x1p-24 * magnitude;
        if (!(std::fabs(got - sum) <= bound))
          return "C[" + std::to_string(row) + "][" + std::to_string(column) + "] is " + std::to_string(got) + ", not " +
                 std::to_string(sum);
      }
    return "";
  }
};

// --- what the emulator says, in JSON of known form ----------------------------------------------------

// The number after "key": at or after that place.
uint64_t number(const std::string& json, const std::string& key, size_t from = 0) {
  const size_t at = json.find('"' + key + "\":", from);
  if (at == std::string::npos) throw std::runtime_error("no \"" + key + "\" in " + json);
  return std::strtoull(json.c_str() + at + key.size() + 3, nullptr, 10);
}

struct Fault { std::string site, mutation; };

// What may be done to the calls in that file. All strings of the JSON in order are: the "site" key, its
// name, the "mutations" key, their names, the next "site" key …
std::vector<Fault> faults_in(const std::string& file) {
  std::vector<Fault> all;
  const std::string json = emulator::sites();
  std::string site, previous;
  for (size_t begin = json.find('"'); begin != std::string::npos;) {
    const size_t end = json.find('"', begin + 1);
    const std::string text = json.substr(begin + 1, end - begin - 1);
    if (previous == "site") site = text;
    else if (text != "site" && text != "mutations" && site.compare(0, file.size(), file) == 0)
      all.push_back({site, text});
    previous = text;
    begin = json.find('"', end + 1);
  }
  return all;
}

// --- right, the same, and no byte too many ------------------------------------------------------------

bool report(bool good, const std::string& what, const std::string& problem) {
  if (good) printf("ok %s\n", what.c_str());
  else printf("FAIL %s: %s\n", what.c_str(), problem.c_str());
  fflush(stdout);
  return good;
}

void schedule(uint64_t seed, Asynchrony asynchrony) {
  emulator::Options options = emulator::options();
  options.seed = seed;
  options.asynchrony = asynchrony;
  emulator::set_options(options);
}

constexpr Asynchrony kAsynchronies[] = {Asynchrony::late, Asynchrony::early, Asynchrony::random};

// What the last run moved, against what it had to: a tile of C needs its rows of A and of B once.
template <class Kernel> std::string traffic(Shape s) {
  const std::string json = emulator::statistics();
  const auto tiles = [](int extent, int tile) { return static_cast<uint64_t>((extent + tile - 1) / tile); };
  const auto bytes = [](int rows, int columns) { return static_cast<uint64_t>(rows) * columns * 2; };
  const size_t buffers = json.find("\"buffers\"");
  const auto of_buffer = [&](const char* name, const char* key) {
    return number(json, key, json.find('"' + std::string(name) + "\":", buffers));
  };
  const struct { const char* what; uint64_t got, want; } counts[] = {
      {"bank conflicts", number(json, "shared_conflicts"), 0},
      {"bytes of A read", of_buffer("a", "read"), tiles(s.n, Kernel::tile_n) * bytes(s.m, s.k)},
      {"bytes of B read", of_buffer("b", "read"), tiles(s.m, Kernel::tile_m) * bytes(s.n, s.k)},
      {"bytes of C written", of_buffer("c", "written"), bytes(s.m, s.n)},
      {"bytes written", number(json, "global_written_bytes"), bytes(s.m, s.n)},
  };
  std::string problem;
  for (const auto& [what, got, want] : counts)
    if (got != want) problem += std::to_string(got) + " " + what + ", not " + std::to_string(want) + "; ";
  return problem;
}

template <class Kernel, class T> bool check(Shape shape) {
  const std::string what = std::string(Kernel::name) + " " + kName<T> + " " + shape.text();
  try {
    const Problem<Kernel, T> problem(shape);
    std::vector<uint16_t> first;
    for (const Asynchrony asynchrony : kAsynchronies)
      for (uint64_t seed = 0; seed < 4; ++seed) {
        schedule(seed, asynchrony);
        emulator::reset_statistics();
        const std::vector<uint16_t> c = problem.run();
        if (first.empty()) {
          first = c;
          if (const std::string wrong = problem.wrong(c); !wrong.empty()) return report(false, what, wrong);
        }
        if (c != first) return report(false, what, "another result with seed " + std::to_string(seed));
        if (const std::string excess = traffic<Kernel>(shape); !excess.empty()) return report(false, what, excess);
      }
    return report(true, what, "");
  } catch (const std::exception& error) {
    return report(false, what, error.what());
  }
}

// --- every fault is noticed ---------------------------------------------------------------------------

// How it was noticed, or nothing.
template <class Kernel, class T>
std::optional<std::string> notice(const Problem<Kernel, T>& problem, const std::vector<uint16_t>& right) {
  const struct { uint64_t seed; Asynchrony asynchrony; } schedules[] = {{0, Asynchrony::late},
                                                                         {1, Asynchrony::late},
                                                                         {2, Asynchrony::early},
                                                                         {3, Asynchrony::random},
                                                                         {4, Asynchrony::random}};
  for (const auto& [seed, asynchrony] : schedules) {
    schedule(seed, asynchrony);
    try {
      if (problem.run() != right) return "a wrong result";
    } catch (const emulator::Error& error) {
      return error.kind;
    }
  }
  return std::nullopt;
}

// Several blocks, and slices enough for every stage to be used again.
template <class Kernel> bool check_faults(Shape shape) {
  const Problem<Kernel, bf16> problem(shape);
  schedule(0, Asynchrony::late);
  const std::vector<uint16_t> right = problem.run();
  const std::vector<Fault> faults = faults_in(std::string(Kernel::name) + ".cuh");
  const std::string count = std::string(Kernel::name) + ": " + std::to_string(faults.size()) + " faults";
  bool good = report(!faults.empty(), count, "no call to plant one at");
  for (const Fault& fault : faults) {
    emulator::inject(fault.site, fault.mutation);
    const auto noticed = notice(problem, right);
    emulator::inject("", "");
    const std::string what = std::string(Kernel::name) + ": " + fault.site + ", " + fault.mutation;
    good &= report(noticed.has_value(), what + (noticed ? ": " + *noticed : ""), "not noticed");
  }
  return good;
}

int examples(int count, char** values) {
  const std::string option = count > 1 ? values[1] : "";
  if (count > 2 || (!option.empty() && option != "--faults")) {
    fprintf(stderr, "usage: examples [--faults]\n");
    return 2;
  }
  bool good = true;
  if (option == "--faults") {
    good &= check_faults<Sm80>({70, 72, 200});
    good &= check_faults<Sm90>({136, 72, 448});
  } else {
    for (const Shape shape : {Shape{1, 1, 8}, {64, 64, 32}, {65, 63, 40}, {130, 101, 104}, {37, 129, 200}}) {
      good &= check<Sm80, bf16>(shape);
      good &= check<Sm80, fp16>(shape);
    }
    for (const Shape shape : {Shape{1, 8, 8}, {128, 128, 64}, {130, 136, 72}, {200, 120, 328}}) {
      good &= check<Sm90, bf16>(shape);
      good &= check<Sm90, fp16>(shape);
    }
  }
  return good ? 0 : 1;
}

}  // namespace
}  // namespace almostgpt::examples

int main(int count, char** values) { return almostgpt::examples::examples(count, values); }
