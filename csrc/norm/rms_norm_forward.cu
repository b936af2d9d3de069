// RMSNorm forward: a row lives in the registers of its threads, from its one read to its one write.

#include "norm/rms_norm.cuh"

namespace almostgpt {
namespace {

template <class T, class W>
struct ForwardArgs {
  RowsOf<T> x, residual;  // residual may be absent
  Global<const W> weight;
  Global<T> y, sum;  // dense; sum is there where residual is
  Global<float> rstd;
  int64_t rows;
  int columns;
  RowThreads threads;
  float eps;
};

// 1. Read the row (and add the residual's); 2. sum its squares over all its threads; 3. write.
template <class T, class W, int V>
KERNEL LAUNCH_BOUNDS(kMaxRowThreads, V <= 4 ? 2 : 1) forward_kernel(GRID_CONSTANT const ForwardArgs<T, W> a) {
  constexpr int width = kVectorWidth<T>;
  const int thread = a.threads.thread(), first = first_vector<V>(thread);
  const int64_t row = static_cast<int64_t>(block_x()) * a.threads.rows_per_block + a.threads.place();
  const int row_vectors = row < a.rows ? a.columns / width : 0;  // none: only waits with the others

  u32x4 vectors[V];
  const auto load = [&](const RowsOf<T>& from, u32x4 (&to)[V]) {
    const Global<const T> data = from.row(row);
    UNROLL for (int j = 0; j < V; ++j) {
      const int v = first + 32 * j;
      if (v < row_vectors) to[j] = load_global_as<u32x4, Cache::streaming>(data + v * width);
    }
  };
  load(a.x, vectors);
  if (a.residual.data) {
    u32x4 added[V];
    load(a.residual, added);  // all of them before the first is used
    UNROLL for (int j = 0; j < V; ++j) {
      const int v = first + 32 * j;
      if (v >= row_vectors) continue;
      float values[width], more[width];
      unpack<T>(vectors[j], values);
      unpack<T>(added[j], more);
      UNROLL for (int i = 0; i < width; ++i) values[i] += more[i];
      vectors[j] = pack<T>(values);
      store_global_as<u32x4>(a.sum + row * a.columns + v * width, vectors[j]);
    }
  }

  float squares = 0.0f;
  UNROLL for (int j = 0; j < V; ++j) {
    if (first + 32 * j >= row_vectors) continue;
    float values[width];
    unpack<T>(vectors[j], values);
    UNROLL for (int i = 0; i < width; ++i) squares += values[i] * values[i];
  }
  const float total = row_sum(squares, a.threads.threads_per_row, thread, shared_base());
  const float rstd = rsqrt_approx(total * a.threads.inverse_columns + a.eps);
  if (thread == 0 && row < a.rows) store_global(a.rstd + row, rstd);

  UNROLL for (int j = 0; j < V; ++j) {
    const int v = first + 32 * j;
    if (v >= row_vectors) continue;
    float values[width], weights[width];
    unpack<T>(vectors[j], values);
    WeightVector<T, W> weight;
    weight.load(a.weight + v * width);
    weight.unpack_to(weights);
    UNROLL for (int i = 0; i < width; ++i) values[i] *= rstd * weights[i];
    store_global_as<u32x4>(a.y + row * a.columns + v * width, pack<T>(values));
  }
}

// Any row: element by element, read twice (sum, where there is a residual, is read back).
template <class T, class W>
KERNEL LAUNCH_BOUNDS(kMaxRowThreads, 2) forward_any_kernel(GRID_CONSTANT const ForwardArgs<T, W> a) {
  const int64_t row = block_x();
  const Global<const T> x = a.x.row(row), residual = a.residual.row(row);
  const Global<T> y = a.y + row * a.columns, sum = a.sum + row * a.columns;
  float squares = 0.0f;
  for (int c = thread_id(); c < a.columns; c += block_size()) {
    float value = to_float(load_global<Cache::read_only>(x + c));
    if (a.residual.data) {
      const T rounded = round_to<T>(value + to_float(load_global<Cache::read_only>(residual + c)));
      store_global(sum + c, rounded);
      value = to_float(rounded);
    }
    squares += value * value;
  }
  const float total = row_sum(squares, a.threads.threads_per_row, thread_id(), shared_base());
  const float rstd = rsqrt_approx(total * a.threads.inverse_columns + a.eps);
  if (thread_id() == 0) store_global(a.rstd + row, rstd);
  for (int c = thread_id(); c < a.columns; c += block_size()) {
    const float value =
        to_float(a.residual.data ? load_global(sum + c) : load_global<Cache::read_only>(x + c));
    const float weight = to_float(load_global<Cache::read_only>(a.weight + c));
    store_global(y + c, round_to<T>(value * (rstd * weight)));
  }
}

}  // namespace

int rms_norm_forward(const RmsNormShape& shape, ConstRows x, ConstRows residual, const void* weight, float eps,
                     void* y, void* sum, float* rstd, void* stream) {
  if (shape.rows == 0) return 0;
  return with_types(shape, [&](auto t, auto w) -> int {
    using T = decltype(t);
    using W = decltype(w);
    ForwardArgs<T, W> args{rows_of<T>(x), rows_of<T>(residual), Global(static_cast<const W*>(weight)),
                           Global(static_cast<T*>(y)), Global(static_cast<T*>(sum)), Global(rstd),
                           shape.rows, static_cast<int>(shape.columns), block_threads(shape.columns), eps};
    const auto aligned = [&](const void* data, int64_t stride) {
      return in_vectors(data, stride, shape.columns, sizeof(T));
    };
    const bool vectors = aligned(x.data, x.stride) && aligned(residual.data, residual.stride) &&
                         aligned(y, shape.columns) && aligned(sum, shape.columns) && aligned(weight, 0);
    const RowPlan plan = vectors ? plan_forward(shape.columns / kVectorWidth<T>) : RowPlan{};
    if (plan.vectors == 0) {
      const LaunchShape launch_shape{{ceil_div(shape.rows, 1)}, args.threads.threads_per_row, kSumsBytes};
      return launch<forward_any_kernel<T, W>>(launch_shape, stream, args);
    }
    args.threads = row_threads(plan, shape.columns);
    const LaunchShape launch_shape{{ceil_div(shape.rows, plan.rows_per_block)}, plan.threads(), kSumsBytes};
    return with_vectors<1, 2, 3, 4, 8>(plan.vectors, [&](auto v) {
      return launch<forward_kernel<T, W, decltype(v)::value>>(launch_shape, stream, args);
    });
  });
}

}  // namespace almostgpt
