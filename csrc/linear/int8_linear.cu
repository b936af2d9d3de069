// A product with a weight of int8, which tensor cores compute in x's type: every int8 is one of bf16 and of
// fp16 exactly, and what takes time is reading the weight. So each of its bytes is read once, in 16 at a
// time, straight into the registers of the lane that needs them.
//
// A warp multiplies 16 rows of the weight with 8 rows of x by one instruction, 16 columns deep. In which order
// columns are added is free. So with g = lane / 4 and t = lane % 4 a lane loads the 16 columns from 16 t on, of
// 64, of row g and of row g + 8; that is its part of four instructions: of number j columns 4 j to 4 j + 3,
// where the hardware says 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. The same columns of row g of x go along.

#include "device/device.cuh"
#include "linear/int8_linear.h"
#include "linear/int8_plan.h"

namespace almostgpt {

using namespace device;

namespace {

struct alignas(8) Pair { float x, y; };

template <class T>
struct Int8LinearArgs {
  Global<const T> x;
  int64_t x_stride;
  Global<const int8_t> weight;
  Global<const float> scales;
  Global<const T> bias;  // at most one of the two is there
  Global<const float> wide_bias;
  Global<T> y;
  int64_t outputs;
  int rows, columns, warp_columns;
};

// Where a warp's sums lie until all warps have theirs: of each 8 rows of x, rows of the weight with a sum for
// each. Within such a row the sums change places with n, so that neither the lanes that store the pairs of a
// fragment nor those that read one m of neighbouring n meet in a bank.
template <class Tile>
struct WarpSums {
  shared_addr base;

  DEVICE shared_addr at(int warp, int n, int m) const {
    constexpr int turn = Tile::groups == 1 ? 4 : 2;
    return base + warp * Tile::sum_bytes + ((m / 8 * Tile::rows + n) * 8 + (m % 8 ^ (n / 4 * turn & 6))) * 4;
  }
};

// Word j of 16 bytes.
DEVICE uint32_t word(const u32x4& vector, int j) {
  return j == 0 ? vector.x : j == 1 ? vector.y : j == 2 ? vector.z : vector.w;
}

// 1. Read the columns of this warp and multiply; 2. add what the warps have; 3. scale, add the bias, write.
template <class T, class Tile>
KERNEL LAUNCH_BOUNDS(32 * Tile::most_warps, Tile::blocks) int8_linear_kernel(GRID_CONSTANT const Int8LinearArgs<T> a) {
  constexpr int groups = Tile::groups, x_tiles = Tile::x_tiles;
  constexpr int tiles = (groups + 1) / 2;  // of 16 rows; of a group alone the upper half is zeros
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t first_row = static_cast<int64_t>(block_x()) * Tile::rows;

  const int height = static_cast<int>(a.outputs - first_row);  // rows from here on, of which the block has some

  // Used last, and asked for first: the sums must not wait for them.
  Pair scale_bias{};
  if (const int64_t n = first_row + thread_id(); thread_id() < min(height, Tile::rows)) {
    scale_bias.x = load_global<Cache::read_only>(a.scales + n);
    if (a.bias) scale_bias.y = to_float(load_global<Cache::read_only>(a.bias + n));
    if (a.wide_bias) scale_bias.y = load_global<Cache::read_only>(a.wide_bias + n);
  }

  // Where this lane's columns begin, in each row. These go on by a round at a time: the compiler would compute
  // an address from its row anew for each load, which was up to a third of the instructions of a round.
  const int first = warp_id() * a.warp_columns, end = min(first + a.warp_columns, a.columns);
  Global<const int8_t> weight[groups];
  Global<const T> x[x_tiles];
  UNROLL for (int i = 0; i < groups; ++i)
    weight[i] = a.weight + (first_row + i * kGroupRows + g) * a.columns + first + 16 * t;
  UNROLL for (int i = 0; i < x_tiles; ++i) x[i] = a.x + (8 * i + g) * a.x_stride + first + 16 * t;

  // An instruction waits for the one that it adds to: so even and odd j have sums of their own, unless there
  // are four others to go on with (whose registers sm_100 would have spilled).
  constexpr int chains = tiles * x_tiles < 4 ? 2 : 1;
  float sums[chains][tiles][x_tiles][4] = {};
  constexpr int round = Tile::steps * kStepColumns;
  UNROLL_BY(1)
  for (int start = first; start < end; start += round) {
    const int ahead = end - start - 16 * t;  // columns from this lane's first on
    u32x4 codes[Tile::steps][groups] = {}, values[Tile::steps][x_tiles][2] = {};
    UNROLL for (int s = 0; s < Tile::steps; ++s) {
      const int k = s * kStepColumns;
      UNROLL for (int i = 0; i < groups; ++i)
        if (i * kGroupRows + g < height && k < ahead)
          codes[s][i] = load_global_as<u32x4, Cache::streaming>(weight[i] + k);
      UNROLL for (int i = 0; i < x_tiles; ++i)
        if (8 * i + g < a.rows && k < ahead) {
          values[s][i][0] = load_global_as<u32x4, Cache::read_only>(x[i] + k);
          values[s][i][1] = load_global_as<u32x4, Cache::read_only>(x[i] + k + 8);
        }
    }
    UNROLL for (int i = 0; i < groups; ++i) weight[i] = weight[i] + round;
    UNROLL for (int i = 0; i < x_tiles; ++i) x[i] = x[i] + round;
    UNROLL for (int s = 0; s < Tile::steps; ++s)
      UNROLL for (int j = 0; j < 4; ++j)
        UNROLL for (int r = 0; r < tiles; ++r) {
          const uint32_t low = word(codes[s][2 * r], j);
          uint32_t left[4] = {pair_of_int8<T, 0, 1>(low), 0, pair_of_int8<T, 2, 3>(low), 0};
          if constexpr (groups > 1) {
            const uint32_t high = word(codes[s][2 * r + 1], j);
            left[1] = pair_of_int8<T, 0, 1>(high), left[3] = pair_of_int8<T, 2, 3>(high);
          }
          UNROLL for (int i = 0; i < x_tiles; ++i) {
            const u32x4& part = values[s][i][j / 2];
            mma_m16n8k16<T>(sums[j % chains][r][i], left, word(part, 2 * (j % 2)), word(part, 2 * (j % 2) + 1));
          }
        }
  }

  const WarpSums<Tile> sums_of{shared_base()};
  const int warps = block_size() / 32;
  const shared_addr scales = shared_base() + warps * Tile::sum_bytes;
  UNROLL for (int i = 0; i < groups; ++i)
    UNROLL for (int m = 0; m < x_tiles; ++m) {
      Pair pair{};
      UNROLL for (int c = 0; c < chains; ++c)
        pair.x += sums[c][i / 2][m][i % 2 * 2], pair.y += sums[c][i / 2][m][i % 2 * 2 + 1];
      store_shared(sums_of.at(warp_id(), i * kGroupRows + g, 8 * m + 2 * t), pair);
    }
  if (thread_id() < Tile::rows) store_shared<Pair>(scales + thread_id() * sizeof(Pair), scale_bias);
  cta_sync();

  constexpr int width = min(Tile::rows, 16);  // neighbouring lanes write so many neighbouring n
  for (int i = thread_id(); i < Tile::rows * Tile::x_rows; i += block_size()) {
    const int m = i / width % Tile::x_rows, n = i / (width * Tile::x_rows) * width + i % width;
    if (m >= a.rows || n >= height) continue;
    float sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp) sum += load_shared<float>(sums_of.at(warp, n, m));
    const Pair pair = load_shared<Pair>(scales + n * sizeof(Pair));
    store_global(a.y + m * a.outputs + first_row + n, round_to<T>(sum * pair.x + pair.y));
  }
}

template <class Tile, class T>
int launch_tile(Int8LinearArgs<T> args, void* stream) {
  const WarpShare share = share_columns<Tile>(args.columns);
  args.warp_columns = share.columns;
  const int64_t blocks = (args.outputs + Tile::rows - 1) / Tile::rows;
  const LaunchShape shape{{static_cast<unsigned>(blocks)}, 32 * share.warps, Tile::shared_bytes(share.warps)};
  return launch<int8_linear_kernel<T, Tile>>(shape, stream, args);
}

template <int groups, class T>
int launch_groups(const Int8LinearArgs<T>& args, void* stream) {
  return args.rows <= 8 ? launch_tile<Int8LinearTile<groups, 1>>(args, stream)
                        : launch_tile<Int8LinearTile<groups, 2>>(args, stream);
}

}  // namespace

int int8_linear(const Int8LinearShape& shape, const void* x, int64_t x_stride, const int8_t* weight,
                const float* scales, const void* bias, void* y, void* stream) {
  if (shape.rows == 0 || shape.outputs == 0) return 0;
  Card card;
  if (const int error = current_card(card)) return error;
  const auto typed = [&](auto t) {
    using T = decltype(t);
    Int8LinearArgs<T> args{};
    args.x = Global(static_cast<const T*>(x)), args.x_stride = x_stride;
    args.weight = Global(weight), args.scales = Global(scales);
    if (shape.bias_dtype == DType::float32) args.wide_bias = Global(static_cast<const float*>(bias));
    else args.bias = Global(static_cast<const T*>(bias));
    args.y = Global(static_cast<T*>(y));
    args.outputs = shape.outputs, args.rows = shape.rows, args.columns = shape.columns;
    switch (choose_groups(shape.outputs, shape.rows, card.multiprocessors)) {
      case 1: return launch_groups<1>(args, stream);
      case 2: return launch_groups<2>(args, stream);
      default: return launch_groups<4>(args, stream);
    }
  };
  return shape.dtype == DType::bfloat16 ? typed(bf16()) : typed(fp16());
}

}  // namespace almostgpt
