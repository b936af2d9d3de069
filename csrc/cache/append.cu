// New tokens into the cache: one launch rotates queries and keys, narrows keys and values where slots are
// int8, and writes them to each sequence's own place. Every byte is read once and written once.

#include "attention/heads.cuh"
#include "cache/ring.cuh"
#include "cache/rotation.cuh"

namespace almostgpt {
namespace {

constexpr int kAppendThreads = 128;

template <class T, class Stored>
struct AppendArgs {
  HeadsOf<const T> q, k, v;
  HeadsOf<T> q_out, q_sink;  // of no data where nobody asks for them
  Global<Stored> keys, values;
  Global<float> key_scales, value_scales;
  Global<const int32_t> before, added;
  Global<const uint64_t> turns;
  Ring ring;
  int pairs, sink_position;
  int kv_heads, tokens, head_dim;
  int rows_per_token;  // one row is one head of k, v or q
  int64_t rows;
  int lanes;  // of a row: a power of two
};

// Two runs of V elements, which are what pairs of dimensions are made of: elements i and i + pairs where
// i < pairs, and beyond those 2 pairs, which do not turn, any two runs that follow each other.
template <int V>
struct Runs {
  int first, second;
  bool turn;

  DEVICE Runs(int unit, int pairs) : turn(unit * V < pairs) {
    first = turn ? unit * V : 2 * pairs + 2 * (unit * V - pairs);
    second = first + (turn ? pairs : V);
  }
};

template <int V, class T> DEVICE void load_run(Global<const T> from, float (&values)[V]) {
  if constexpr (V == 1) values[0] = to_float(load_global<Cache::read_only>(from));
  else unpack<T>(load_global_as<u32x4, Cache::read_only>(from), values);
}
template <int V, class T> DEVICE void store_run(Global<T> to, const float (&values)[V]) {
  if constexpr (V == 1) store_global(to, round_to<T>(values[0]));
  else store_global_as<u32x4>(to, pack<T>(values));
}

// To the nearest whole number in the lowest bits: those of a float whose last bit is 1.
DEVICE uint32_t nearest_int8(float x) {
  const float shifted = max(-127.0f, min(127.0f, x)) + 12582912.0f;  // 1.5 x 2^23
  uint32_t bits;
  memcpy(&bits, &shifted, 4);
  return bits & 0xff;
}
template <int V> DEVICE void store_run_int8(Global<int8_t> to, const float (&values)[V], float scale) {
  uint32_t codes[V];
  UNROLL for (int i = 0; i < V; ++i) codes[i] = scale > 0.0f ? nearest_int8(values[i] / scale) : 0;
  if constexpr (V == 1) {
    store_global(to, static_cast<int8_t>(codes[0]));
  } else {
    u32x2 words{};
    UNROLL for (int i = 0; i < 4; ++i) words.x |= codes[i] << 8 * i, words.y |= codes[4 + i] << 8 * i;
    store_global_as<u32x2>(to, words);
  }
}

template <int V> DEVICE void load_turns(Global<const uint64_t> from, uint64_t (&turns)[V]) {
  if constexpr (V == 1) {
    turns[0] = load_global<Cache::read_only>(from);
  } else {
    UNROLL for (int i = 0; i < V; i += 2) {
      const u32x4 two = load_global_as<u32x4, Cache::read_only>(from + i);
      turns[i] = two.x | uint64_t{two.y} << 32, turns[i + 1] = two.z | uint64_t{two.w} << 32;
    }
  }
}
template <int V> DEVICE void turn_runs(float (&a)[V], float (&b)[V], const uint64_t (&turns)[V], int position) {
  UNROLL for (int i = 0; i < V; ++i) {
    const Rotation by(static_cast<uint64_t>(position) * turns[i]);
    const float x = a[i], y = b[i];
    a[i] = x * by.cosine - y * by.sine;
    b[i] = y * by.cosine + x * by.sine;
  }
}

// The bits of the largest |x|: as whole numbers they are in the same order, and NaN is above all.
template <int V> DEVICE int largest_bits(const float (&values)[V], int so_far) {
  UNROLL for (int i = 0; i < V; ++i) {
    int bits;
    memcpy(&bits, &values[i], 4);
    so_far = max(so_far, bits & 0x7fffffff);
  }
  return so_far;
}

// A thread has `units` pairs of runs of V elements of one row.
template <class T, class Stored, int V, int units>
KERNEL LAUNCH_BOUNDS(kAppendThreads, 4) append_kernel(GRID_CONSTANT const AppendArgs<T, Stored> a) {
  constexpr bool narrow = std::is_same_v<Stored, int8_t>;
  const int lane = thread_id() & (a.lanes - 1);
  const int64_t row = (int64_t{block_x()} * kAppendThreads + thread_id()) / a.lanes;
  const bool there = row < a.rows;

  const int64_t token_row = there ? row / a.rows_per_token : 0;
  const int batch = static_cast<int>(token_row / a.tokens), token = static_cast<int>(token_row % a.tokens);
  int head = static_cast<int>(row % a.rows_per_token);
  const bool is_key = head < a.kv_heads, is_query = head >= 2 * a.kv_heads;
  head -= is_key ? 0 : is_query ? 2 * a.kv_heads : a.kv_heads;
  const HeadsOf<const T>& from = is_key ? a.k : is_query ? a.q : a.v;
  const int position = there ? tokens_before(a.before, batch) + token : 0;
  const int added = there && a.added ? load_global<Cache::read_only>(a.added + batch) : a.tokens;

  float first[units][V], second[units][V];
  UNROLL for (int u = 0; u < units; ++u) {
    const int unit = lane + u * a.lanes;
    const Runs<V> runs(unit, a.pairs);
    UNROLL for (int i = 0; i < V; ++i) first[u][i] = second[u][i] = 0.0f;
    if (!there || 2 * V * unit >= a.head_dim) continue;
    const Global<const T> data = from.head(batch, head) + token * from.strides.row;
    load_run<V>(data + runs.first, first[u]);
    load_run<V>(data + runs.second, second[u]);
    if (!runs.turn || !(is_key || is_query)) continue;
    uint64_t turns[V];
    load_turns<V>(a.turns + runs.first, turns);
    if (is_query && a.q_sink.data) {
      float a_sink[V], b_sink[V];
      UNROLL for (int i = 0; i < V; ++i) a_sink[i] = first[u][i], b_sink[i] = second[u][i];
      turn_runs<V>(a_sink, b_sink, turns, min(position, a.sink_position));
      const Global<T> to = a.q_sink.head(batch, head) + token * a.q_sink.strides.row;
      store_run<V>(to + runs.first, a_sink);
      store_run<V>(to + runs.second, b_sink);
    }
    turn_runs<V>(first[u], second[u], turns, position);
  }

  float scale = 0.0f;
  if constexpr (narrow) {
    int largest = 0;
    UNROLL for (int u = 0; u < units; ++u) largest = largest_bits<V>(second[u], largest_bits<V>(first[u], largest));
    for (int bits = 1; bits < a.lanes; bits *= 2) largest = max(largest, shfl_xor(largest, bits));
    float most;
    memcpy(&most, &largest, 4);
    scale = most / 127.0f;
  }
  if (!there) return;

  const int64_t slot = (int64_t{batch} * a.kv_heads + head) * a.ring.capacity + a.ring.slot(position);
  const bool stores = !is_query && token < added;
  if constexpr (narrow) {
    if (stores && lane == 0) store_global((is_key ? a.key_scales : a.value_scales) + slot, scale);
  }
  UNROLL for (int u = 0; u < units; ++u) {
    const int unit = lane + u * a.lanes;
    const Runs<V> runs(unit, a.pairs);
    if (2 * V * unit >= a.head_dim) continue;
    if (is_query) {
      const Global<T> to = a.q_out.head(batch, head) + token * a.q_out.strides.row;
      store_run<V>(to + runs.first, first[u]);
      store_run<V>(to + runs.second, second[u]);
      if (a.q_sink.data && !runs.turn) {
        const Global<T> to_sink = a.q_sink.head(batch, head) + token * a.q_sink.strides.row;
        store_run<V>(to_sink + runs.first, first[u]);
        store_run<V>(to_sink + runs.second, second[u]);
      }
    } else if (stores) {
      const Global<Stored> to = (is_key ? a.keys : a.values) + slot * a.head_dim;
      if constexpr (narrow) {
        // Of a row that is not finite the scale tells.
        const float divisor = scale < INFINITY ? scale : 0.0f;
        store_run_int8<V>(to + runs.first, first[u], divisor);
        store_run_int8<V>(to + runs.second, second[u], divisor);
      } else {
        store_run<V>(to + runs.first, first[u]);
        store_run<V>(to + runs.second, second[u]);
      }
    }
  }
}

template <class T, class Stored>
int append(const AppendInputs& inputs, CacheSlots<void> slots, CacheScales<float> scales, Heads q_out, Heads q_sink,
           void* stream) {
  const CacheShape& shape = inputs.shape;
  AppendArgs<T, Stored> args{};
  args.q = heads_of<T>(inputs.q), args.k = heads_of<T>(inputs.k), args.v = heads_of<T>(inputs.v);
  args.q_out = heads_of<T>(q_out), args.q_sink = heads_of<T>(q_sink);
  args.keys = Global<Stored>(static_cast<Stored*>(slots.keys));
  args.values = Global<Stored>(static_cast<Stored*>(slots.values));
  args.key_scales = Global<float>(scales.keys), args.value_scales = Global<float>(scales.values);
  args.before = Global<const int32_t>(inputs.lengths.before), args.added = Global<const int32_t>(inputs.lengths.added);
  args.turns = Global<const uint64_t>(inputs.turns);
  args.ring = {shape.capacity, shape.sink_tokens};
  args.pairs = inputs.turns ? inputs.pairs : 0, args.sink_position = inputs.sink_position;
  args.kv_heads = shape.kv_heads, args.tokens = shape.tokens, args.head_dim = shape.head_dim;
  args.rows_per_token = 2 * shape.kv_heads + (inputs.turns ? shape.heads : 0);
  args.rows = int64_t{shape.batch} * shape.tokens * args.rows_per_token;
  const auto start = [&](auto v, auto units) {
    const int64_t blocks = (args.rows * args.lanes + kAppendThreads - 1) / kAppendThreads;
    const LaunchShape launch_shape{{static_cast<unsigned>(blocks)}, kAppendThreads};
    return launch<append_kernel<T, Stored, v(), units()>>(launch_shape, stream, args);
  };
  if (args.pairs % 8 == 0) {  // in vectors of 16 bytes
    for (args.lanes = 1; args.lanes * 16 < shape.head_dim;) args.lanes *= 2;
    return start(std::integral_constant<int, 8>(), std::integral_constant<int, 1>());
  }
  args.lanes = 32;  // by elements, up to 4 x 2 x 32 of them
  return start(std::integral_constant<int, 1>(), std::integral_constant<int, 4>());
}

}  // namespace

int cache_append(const AppendInputs& inputs, CacheSlots<void> slots, CacheScales<float> scales, Heads q_out, Heads q_sink,
                 void* stream) {
  const auto typed = [&](auto t) {
    using T = decltype(t);
    return inputs.shape.int8 ? append<T, int8_t>(inputs, slots, scales, q_out, q_sink, stream)
                             : append<T, T>(inputs, slots, scales, q_out, q_sink, stream);
  };
  return inputs.shape.dtype == DType::bfloat16 ? typed(bf16()) : typed(fp16());
}

}  // namespace almostgpt
