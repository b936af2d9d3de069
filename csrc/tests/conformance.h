// What the conformance program is made of: cases that register themselves, device memory on either
// side of device.cuh, and the record of all that a case read back.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device/device.cuh"
#if defined(ALMOSTGPT_EMULATOR)
#include "device/emulator/emulator.h"
#endif

namespace almostgpt::conformance {

using namespace device;

// --- cases: a static Registration each, so that linking a file adds its cases -------------------------

class Run;

struct Case {
  std::string name;
  std::string primitives;  // that it covers, separated by blanks
  int major;               // the least compute capability that has them; 9: 9.0 alone
  void (*body)(Run&);
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const std::string& name, const std::string& primitives, int major, void (*body)(Run&)) {
    cases().push_back({name, primitives, major, body});
  }
};

#define CONFORMANCE_CASE(name, primitives, major)                                         \
  static void name##_case(Run& run);                                                      \
  static const Registration name##_registration(#name, primitives, major, name##_case); \
  static void name##_case(Run& run)
#define CASE(name, primitives) CONFORMANCE_CASE(name, primitives, 8)
#define CASE_SM90(name, primitives) CONFORMANCE_CASE(name, primitives, 9)

// What ends a case; the message is its line of the report.
struct Failure : std::runtime_error { using runtime_error::runtime_error; };

inline void require(bool condition, const std::string& what) {
  if (!condition) throw Failure(what);
}
inline void require_success(int error, const char* what) {
  if (error != 0) throw Failure(std::string(what) + ": " + error_string(error));
}

// --- device memory ------------------------------------------------------------------------------------

enum class Use { input, output, input_output };

#if defined(ALMOSTGPT_EMULATOR)

// The card that the cases see, with nothing registered from the case before.
class Machine {
 public:
  Machine(int major, int minor) : session_(major, minor) {}
  void* allocate(size_t bytes, Use use) {
    void* address = std::aligned_alloc(256, (bytes + 255) / 256 * 256);  // as aligned as by cudaMalloc
    memory_.emplace_back(address, std::free);
    const auto use_ = use == Use::input    ? emulator::Use::input
                      : use == Use::output ? emulator::Use::output
                                           : emulator::Use::input_output;
    session_.buffer(("buffer " + std::to_string(memory_.size())).c_str(), address, bytes, use_);
    return address;
  }
  void to_device(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
  void to_host(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
  void synchronize() {}

 private:
  emulator::Session session_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
};

#else

class Machine {
 public:
  Machine(int, int) {}
  void* allocate(size_t bytes, Use) {
    void* address = nullptr;
    require_success(cudaMalloc(&address, bytes), "cudaMalloc");
    memory_.emplace_back(address, [](void* p) { cudaFree(p); });
    return address;
  }
  void to_device(void* to, const void* from, size_t bytes) {
    require_success(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copy to the device");
  }
  void to_host(void* to, const void* from, size_t bytes) {
    require_success(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copy from the device");
  }
  void synchronize() { require_success(cudaDeviceSynchronize(), "kernel"); }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
};

#endif

// `size` elements that kernels see; passes as a Global<T> or Global<const T>.
template <class T> class Buffer {
 public:
  Buffer(Machine& machine, const std::vector<T>& values, Use use)
      : machine_(&machine), size_(values.size()) {
    address_ = static_cast<T*>(machine.allocate(size_ * sizeof(T), use));
    machine.to_device(address_, values.data(), size_ * sizeof(T));
  }
  operator Global<T>() const { return Global<T>(address_); }
  operator Global<const T>() const { return Global<const T>(address_); }
  // The same memory as elements of another type of the same size: device types have no arithmetic.
  template <class U> Global<U> as() const { return Global<T>(address_).template as<U>(); }
  T* address() const { return address_; }
  size_t size() const { return size_; }
  std::vector<T> read() const {
    std::vector<T> values(size_);
    machine_->to_host(values.data(), address_, size_ * sizeof(T));
    return values;
  }

 private:
  Machine* machine_;
  T* address_;
  size_t size_;
};

// --- the run of a case --------------------------------------------------------------------------------

// How far an approximate result may be from the exact one: relative · |exact| + absolute.
struct Bound { double relative = 0, absolute = 0; };

// A part of what a case read back: to the bit, or floats within a bound.
struct Record {
  std::vector<unsigned char> bytes;
  bool approximate = false;
  Bound bound;
};

class Run {
 public:
  Run(int major, int minor) : machine_(major, minor) { require_success(current_card(card_), "current_card"); }

  const Card& card() const { return card_; }

  template <class T> Buffer<T> input(const std::vector<T>& values) { return {machine_, values, Use::input}; }
  template <class T> Buffer<T> input_output(const std::vector<T>& values) {
    return {machine_, values, Use::input_output};
  }
  // Poisoned, so that what no kernel wrote is seen.
  template <class T> Buffer<T> output(size_t size) {
    std::vector<T> poison(size);
    memset(static_cast<void*>(poison.data()), kPoison, size * sizeof(T));
    return {machine_, poison, Use::output};
  }

  template <auto kernel, class... Arguments> void launch(const LaunchShape& shape, const Arguments&... arguments) {
    require_success(device::launch<kernel>(shape, nullptr, arguments...), "launch");
    machine_.synchronize();
  }
  // Whether `call`, which returns an error as launches do, is refused with a message. (The emulator says
  // what is wrong in an exception.)
  template <class Call> bool refuses(Call call) {
#if defined(ALMOSTGPT_EMULATOR)
    try {
      return call() != 0;
    } catch (const emulator::Error& error) {
      return *error.what() != '\0';
    }
#else
    const int error = call();
    cudaGetLastError();  // forgets it
    return error != 0 && *error_string(error) != '\0';
#endif
  }

  // Every element, to the bit. A case goes on after a wrong result, so that the report tells which of its
  // parts are right.
  template <class T> void expect(const std::vector<T>& got, const std::vector<T>& want, const std::string& what) {
    record(got);
    size_t wrong = 0, first = 0;
    require(got.size() == want.size(), what + ": the sizes differ");
    for (size_t i = got.size(); i-- > 0;)
      if (memcmp(&got[i], &want[i], sizeof(T)) != 0) first = i, ++wrong;
    if (wrong != 0)
      fail(what + ": " + std::to_string(wrong) + " of " + std::to_string(got.size()) + " wrong, first [" +
           std::to_string(first) + "]: " + text(got[first]) + ", not " + text(want[first]));
  }
  template <class T> void expect(const Buffer<T>& got, const std::vector<T>& want, const std::string& what) {
    expect(got.read(), want, what);
  }
  // For what is checked otherwise.
  template <class T> void record(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    records_.push_back({{bytes, bytes + values.size() * sizeof(T)}, false, {}});
  }
  void record(const std::vector<float>& values, Bound bound) {
    record(values);
    records_.back().approximate = true;
    records_.back().bound = bound;
  }
  const std::vector<Record>& records() const { return records_; }

  void fail(const std::string& what) { failures_.push_back(what); }
  const std::vector<std::string>& failures() const { return failures_; }

  static constexpr int kPoison = 0xab;

 private:
  template <class T> static std::string text(const T& value) {
    char line[64];
    if constexpr (std::is_same_v<T, float>) snprintf(line, sizeof line, "%.9g", value);
    else snprintf(line, sizeof line, "0x%llx", static_cast<unsigned long long>(value));
    return line;
  }

  Machine machine_;
  Card card_;
  std::vector<Record> records_;
  std::vector<std::string> failures_;
};

// --- data ---------------------------------------------------------------------------------------------

// 32 well-mixed bits of a number: test data that is the same everywhere.
inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
// A whole number from -limit to limit.
inline int small(uint32_t seed, int limit = 3) { return static_cast<int>(mix(seed) % (2 * limit + 1)) - limit; }

template <class T> std::vector<T> generate(size_t size, const std::function<T(size_t)>& value) {
  std::vector<T> values(size);
  for (size_t i = 0; i < size; ++i) values[i] = value(i);
  return values;
}

// 16-bit floats of the host, apart from what is tested: exact in double, from the definition of the formats.
struct Format {
  int exponent_bits, mantissa_bits;
  double value(uint16_t bits) const {
    const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
    const int exponent = bits >> mantissa_bits & top, mantissa = bits & ((1 << mantissa_bits) - 1);
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == top) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  }
  // Of a whole number that the format holds exactly.
  uint16_t of(int number) const {
    for (int exponent = 0; number != 0 && exponent < 16; ++exponent) {
      const int mantissa = std::abs(number) << mantissa_bits >> exponent;
      if (mantissa >> mantissa_bits == 1)
        return (number < 0 ? 0x8000 : 0) |
               ((exponent + (1 << (exponent_bits - 1)) - 1) << mantissa_bits) | (mantissa & ((1 << mantissa_bits) - 1));
    }
    return 0;
  }
};
template <class T> constexpr Format kFormat = std::is_same_v<T, bf16> ? Format{8, 7} : Format{5, 10};
template <class T> constexpr const char* kName = std::is_same_v<T, bf16>   ? "bf16"
                                                 : std::is_same_v<T, fp16> ? "fp16"
                                                                           : "float";

inline uint32_t bits_of(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
inline float float_of(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }

}  // namespace almostgpt::conformance
