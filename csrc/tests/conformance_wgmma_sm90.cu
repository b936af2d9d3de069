// Cases of Hopper: wgmma from every layout of its operands, for every width. Linking this file adds them
// to conformance.cu.
#include "tests/conformance.h"

namespace almostgpt::conformance {
namespace {

constexpr int kM = 64, kK = 64, kSteps = kK / 16;

// A tile in shared memory as wgmma takes it: its bytes, and where its descriptors point.
struct Operand {
  Global<const u32x4> image;
  uint32_t bytes, leading, stride;
  uint32_t start[kSteps];  // of each 16 elements of k
  SwizzleSpan span;
};

DEVICE uint64_t descriptor(shared_addr tile, const Operand& operand, int step) {
  return matrix_descriptor(tile + operand.start[step], operand.leading, operand.stride, operand.span);
}

DEVICE void copy_to_shared(shared_addr to, const Operand& operand) {
  for (uint32_t i = thread_id(); i < operand.bytes / 16; i += block_size())
    store_shared(to + 16 * i, load_global(operand.image + i));
}

template <int N> DEVICE void begin(float (&d)[N / 2]) {
  UNROLL for (int i = 0; i < N / 2; ++i) d[i] = static_cast<float>((thread_id() + i) % 32);
}

template <int N> DEVICE void finish(float (&d)[N / 2], Global<float> out) {
  wgmma_commit();
  wgmma_wait<0>();
  keep_registers(d);
  UNROLL for (int i = 0; i < N / 2; ++i) store_global(out + thread_id() * (N / 2) + i, d[i]);
}

template <class T, int N, bool a_mn_major, bool b_mn_major>
KERNEL LAUNCH_BOUNDS(128, 1) wgmma_ss_kernel(GRID_CONSTANT const Operand a, GRID_CONSTANT const Operand b,
                                             const bool accumulate, const Global<float> out) {
  const shared_addr tile_a = shared_base(), tile_b = tile_a + kM * kK * 2;
  copy_to_shared(tile_a, a);
  copy_to_shared(tile_b, b);
  fence_proxy_async();
  cta_sync();
  float d[N / 2];
  begin<N>(d);
  keep_registers(d);
  wgmma_fence();
  UNROLL for (int step = 0; step < kSteps; ++step)
    wgmma_ss<T, N, a_mn_major, b_mn_major>(d, advanced(descriptor(tile_a, a, 0), a.start[step]),
                                           advanced(descriptor(tile_b, b, 0), b.start[step]), accumulate || step > 0);
  finish<N>(d, out);
}

// A, [64][64] in global memory, goes into registers.
template <class T, int N, bool b_mn_major>
KERNEL LAUNCH_BOUNDS(128, 1) wgmma_rs_kernel(const Global<const T> a, GRID_CONSTANT const Operand b,
                                             const bool accumulate, const Global<float> out) {
  const shared_addr tile_b = shared_base();
  copy_to_shared(tile_b, b);
  fence_proxy_async();
  cta_sync();
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t fragments[kSteps][4];
  UNROLL for (int step = 0; step < kSteps; ++step)
    UNROLL for (int i = 0; i < 4; ++i)
      fragments[step][i] =
          load_global_as<uint32_t>(a + (16 * warp_id() + g + 8 * (i % 2)) * kK + 16 * step + 2 * t + 8 * (i / 2));
  float d[N / 2];
  begin<N>(d);
  keep_registers(d);
  UNROLL for (int step = 0; step < kSteps; ++step) keep_registers(fragments[step]);
  wgmma_fence();
  UNROLL for (int step = 0; step < kSteps; ++step)
    wgmma_rs<T, N, b_mn_major>(d, fragments[step], descriptor(tile_b, b, step), accumulate || step > 0);
  finish<N>(d, out);
}

// --- operands, on the host ----------------------------------------------------------------------------

int a_value(int m, int k) { return small(m * kK + k, 9); }
int b_value(int k, int n) { return small(99991 + n * kK + k, 9); }

struct Layout {
  SwizzleSpan span;
  bool mn_major;
};

// The tile of `extent` times 64 (of k) as panels one span wide, each with all of its rows one below
// the other: rows along k where K-major, along m or n where MN-major. Unswizzled panels are 16 bytes wide.
// Source: PTX ISA, "Strides" and "Canonical Layouts" of wgmma's shared memory layout.
// value(mn, k), or value(k, mn) where `k_first`.
template <class T>
std::vector<uint32_t> tile_of(int extent, Layout layout, int (*value)(int, int), bool k_first, Operand& operand) {
  const uint32_t span = layout.span == SwizzleSpan::none ? 16 : static_cast<uint32_t>(layout.span);
  const int width = static_cast<int>(span) / 2;  // elements
  const int across = layout.mn_major ? extent : kK, rows = layout.mn_major ? kK : extent;
  const uint32_t panel = rows * span;
  operand.bytes = (across + width - 1) / width * panel;
  operand.span = layout.span;
  std::vector<uint16_t> image(operand.bytes / 2);
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < across; ++column) {
      const int mn = layout.mn_major ? column : row, k = layout.mn_major ? row : column;
      const uint32_t at = column / width * panel + row * span + column % width * 2;
      image[swizzled(at, layout.span) / 2] = kFormat<T>.of(k_first ? value(k, mn) : value(mn, k));
    }
  const bool swizzle = layout.span != SwizzleSpan::none;
  if (layout.mn_major) {
    // From panel to panel, and from 8 rows of k to the next; unswizzled the two change places.
    operand.leading = swizzle ? panel : 8 * span;
    operand.stride = swizzle ? 8 * span : panel;
  } else {
    operand.leading = swizzle ? 16 : panel;  // ignored where swizzled
    operand.stride = 8 * span;
  }
  for (uint32_t step = 0; step < kSteps; ++step)
    operand.start[step] = layout.mn_major ? step * 16 * span : step * 32 / span * panel + step * 32 % span;
  std::vector<uint32_t> words(operand.bytes / 4);
  memcpy(words.data(), image.data(), operand.bytes);
  return words;
}

// As the registers hold it: d[4 j + i] of thread t is
// D[16 (t / 32) + t % 32 / 4 + 8 (i / 2)][8 j + 2 (t % 4) + i % 2].
template <int N> std::vector<float> product(bool accumulate) {
  std::vector<float> registers;
  for (int t = 0; t < 128; ++t)
    for (int r = 0; r < N / 2; ++r) {
      const int i = r % 4, m = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2), n = 8 * (r / 4) + 2 * (t % 4) + i % 2;
      int sum = accumulate ? (t + r) % 32 : 0;
      for (int k = 0; k < kK; ++k) sum += a_value(m, k) * b_value(k, n);
      registers.push_back(static_cast<float>(sum));
    }
  return registers;
}

constexpr SwizzleSpan kSpans[] = {SwizzleSpan::none, SwizzleSpan::bytes32, SwizzleSpan::bytes64,
                                  SwizzleSpan::bytes128};

template <class T, int N, bool a_mn_major, bool b_mn_major>
void check_ss(Run& run, SwizzleSpan span, bool accumulate, const std::vector<float>& want) {
  Operand a, b;
  const auto image_a = run.input(tile_of<T>(kM, {span, a_mn_major}, a_value, false, a));
  const auto image_b = run.input(tile_of<T>(N, {span, b_mn_major}, b_value, true, b));
  a.image = image_a.template as<const u32x4>();
  b.image = image_b.template as<const u32x4>();
  const auto out = run.output<float>(want.size());
  const LaunchShape shape{{1}, 128, kM * kK * 2 + b.bytes};
  run.launch<wgmma_ss_kernel<T, N, a_mn_major, b_mn_major>>(shape, a, b, accumulate, out);
  run.expect(out, want,
             "span " + std::to_string(static_cast<int>(span)) + (a_mn_major ? ", A M-major" : ", A K-major") +
                 (b_mn_major ? ", B N-major" : ", B K-major"));
}

template <class T, int N, bool b_mn_major>
void check_rs(Run& run, SwizzleSpan span, bool accumulate, const std::vector<float>& want) {
  Operand b;
  const auto in = run.input(generate<uint16_t>(kM * kK, [](size_t i) {
    return kFormat<T>.of(a_value(static_cast<int>(i) / kK, static_cast<int>(i) % kK));
  }));
  const auto image_b = run.input(tile_of<T>(N, {span, b_mn_major}, b_value, true, b));
  b.image = image_b.template as<const u32x4>();
  const auto out = run.output<float>(want.size());
  run.launch<wgmma_rs_kernel<T, N, b_mn_major>>({{1}, 128, b.bytes}, in.template as<const T>(), b, accumulate, out);
  run.expect(out, want,
             "span " + std::to_string(static_cast<int>(span)) + (b_mn_major ? ", B N-major" : ", B K-major"));
}

template <class T, int N> void wgmma_ss_case(Run& run) {
  const std::vector<float> sum = product<N>(true), fresh = product<N>(false);
  for (const SwizzleSpan span : kSpans) {
    check_ss<T, N, false, false>(run, span, true, sum);
    check_ss<T, N, false, true>(run, span, false, fresh);
    check_ss<T, N, true, false>(run, span, false, fresh);
    check_ss<T, N, true, true>(run, span, true, sum);
  }
}

template <class T, int N> void wgmma_rs_case(Run& run) {
  const std::vector<float> sum = product<N>(true), fresh = product<N>(false);
  for (const SwizzleSpan span : kSpans) {
    check_rs<T, N, false>(run, span, true, sum);
    check_rs<T, N, true>(run, span, false, fresh);
  }
}

template <class T, int... widths> struct Widths {
  static std::string name(const char* kind, int n) {
    return std::string("wgmma_") + kind + "_" + kName<T> + "_n" + std::to_string(n);
  }
  const Registration ss[sizeof...(widths)] = {
      {name("ss", widths), "wgmma_ss wgmma_fence wgmma_commit wgmma_wait keep_registers matrix_descriptor advanced", 9,
       wgmma_ss_case<T, widths>}...};
  const Registration rs[sizeof...(widths)] = {
      {name("rs", widths), "wgmma_rs wgmma_fence wgmma_commit wgmma_wait keep_registers matrix_descriptor", 9,
       wgmma_rs_case<T, widths>}...};
};
// Those of device/cuda/wgmma.inc.
const Widths<bf16, 16, 32, 64, 80, 96, 128, 160, 176, 192, 256> bf16_widths;
const Widths<fp16, 16, 32, 64, 80, 96, 128, 160, 176, 192, 256> fp16_widths;

// --- groups -------------------------------------------------------------------------------------------

// Two warpgroups, each with two products under way; the first is used while the second still runs.
KERNEL LAUNCH_BOUNDS(256, 1) wgmma_groups_kernel(GRID_CONSTANT const Operand a, GRID_CONSTANT const Operand b,
                                                 const Global<float> out) {
  const shared_addr tile_a = shared_base(), tile_b = tile_a + kM * kK * 2;
  copy_to_shared(tile_a, a);
  copy_to_shared(tile_b, b);
  fence_proxy_async();
  cta_sync();
  float first[16], second[16];
  UNROLL for (int i = 0; i < 16; ++i) first[i] = second[i] = 0;
  keep_registers(first);
  keep_registers(second);
  wgmma_fence();
  wgmma_ss<bf16, 32>(first, descriptor(tile_a, a, 0), descriptor(tile_b, b, 0), true);
  wgmma_commit();
  wgmma_ss<bf16, 32>(second, descriptor(tile_a, a, 1), descriptor(tile_b, b, 1), true);
  wgmma_ss<bf16, 32>(second, descriptor(tile_a, a, 2), descriptor(tile_b, b, 2), true);
  wgmma_commit();
  wgmma_wait<1>();
  keep_registers(first);
  UNROLL for (int i = 0; i < 16; ++i) store_global(out + 32 * thread_id() + i, first[i]);
  wgmma_wait<0>();
  keep_registers(second);
  UNROLL for (int i = 0; i < 16; ++i) store_global(out + 32 * thread_id() + 16 + i, second[i]);
}

CASE_SM90(wgmma_groups, "wgmma_commit wgmma_wait wgmma_fence wgmma_ss keep_registers") {
  Operand a, b;
  const auto image_a = run.input(tile_of<bf16>(kM, {SwizzleSpan::bytes128, false}, a_value, false, a));
  const auto image_b = run.input(tile_of<bf16>(32, {SwizzleSpan::bytes128, false}, b_value, true, b));
  a.image = image_a.as<const u32x4>();
  b.image = image_b.as<const u32x4>();
  std::vector<float> want;
  for (int thread = 0; thread < 256; ++thread)
    for (int r = 0; r < 32; ++r) {
      const int t = thread % 128, i = r % 4, m = 16 * (t / 32) + t % 32 / 4 + 8 * (i / 2);
      const int n = 8 * (r % 16 / 4) + 2 * (t % 4) + i % 2;
      int sum = 0;
      for (int k = r < 16 ? 0 : 16; k < (r < 16 ? 16 : 48); ++k) sum += a_value(m, k) * b_value(k, n);
      want.push_back(static_cast<float>(sum));
    }
  const auto out = run.output<float>(want.size());
  run.launch<wgmma_groups_kernel>({{1}, 256, kM * kK * 2 + b.bytes}, a, b, out);
  run.expect(out, want, "products");
}

}  // namespace
}  // namespace almostgpt::conformance
