// Attention of few queries over a cache (AttentionCall in row_calls.h).
//
// The queries of the heads that share a KV head are rows. Keys come in chunks that stay in L1: the
// chunk's scores of a few rows at a time, their weights e^(score - greatest score so far), and the
// weighted sum of the chunk's values, scaled down when a greater score comes (the online softmax).
// Everything is float32; keys and values are read once from memory.
#pragma once
#include "activation.h"

namespace hylora {
namespace {

constexpr int kAttentionRows = W == 16 ? 4 : 3;  // times 4 sums in registers, beside 4 keys
constexpr int64_t kChunkKeys = 64;               // at most
constexpr int64_t kChunkBytes = 16 << 10;        // of keys, and as many of values
constexpr float kLeastScore = -3.402823466e38f;  // -inf would make NaNs

// Lane sums of four vectors.
HYLORA_INLINE void store_sums(float* to, V a, V b, V c, V d) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto fold = [](V v) HYLORA_LAMBDA {
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  };
#else
  const auto fold = [](V v) HYLORA_LAMBDA { return __m256(v); };
#endif
  const __m256 pairs =
      _mm256_hadd_ps(_mm256_hadd_ps(fold(a), fold(b)), _mm256_hadd_ps(fold(c), fold(d)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  to[0] = sum_of_lanes(a), to[1] = sum_of_lanes(b);
  to[2] = sum_of_lanes(c), to[3] = sum_of_lanes(d);
#endif
}

// Scores of R rows with `keys` keys, `stride` apart, four at a time: q k^T. q's rows of floats are
// ldq apart, in load_half's order and zero from `size` on; those of `scores` are kChunkKeys apart.
template <int R, class T>
HYLORA_APART void score_rows(const float* q, int64_t ldq, const T* k, int64_t stride, int64_t size,
                             int64_t keys, float* scores) {
  for (int64_t key = 0; key < keys; key += 4) {
    const T* k4[4];
    for (int i = 0; i < 4; i++)  // behind the last key the last one again
      k4[i] = k + smaller(key + i, keys - 1) * stride;
    V sums[R][4] = {};
    const auto add = [&](int64_t d, int64_t left) HYLORA_LAMBDA {
      for (int half = 0; half < 2; half++) {
        V column[4];
        for (int i = 0; i < 4; i++)
          column[i] = load_half(k4[i] + d, half, left);
        for (int r = 0; r < R; r++) {
          const V factor = load(q + r * ldq + d + half * W);
          for (int i = 0; i < 4; i++)
            sums[r][i] = fma(column[i], factor, sums[r][i]);
        }
      }
    };
    int64_t d = 0;
    for (; d + 2 * W <= size; d += 2 * W)
      add(d, 2 * W);
    if (d < size) add(d, size - d);
    for (int r = 0; r < R; r++)
      store_sums(scores + r * kChunkKeys + key, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  }
}

// to = decay to + weights v, for C vectors of columns of `keys` values; `to` is in load_half's
// order. One row alone keeps two sums, so that an addition needn't wait for the one before.
template <int R, int C, class T>
HYLORA_INLINE void add_columns_of_values(const float* weights, const float* decay, const T* v,
                                         int64_t stride, int64_t keys, int64_t left, float* to,
                                         int64_t ldto) {
  constexpr int U = R == 1 ? 2 : 1;
  V sums[U][R][C] = {};
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++)
      sums[0][r][c] = splat(decay[r]) * load(to + r * ldto + c * W);
  const auto add = [&](int u, int64_t key) HYLORA_LAMBDA {
    for (int c = 0; c < C; c++) {
      const V value = load_half(v + key * stride + c / 2 * 2 * W, c % 2, left - c / 2 * 2 * W);
      for (int r = 0; r < R; r++)
        sums[u][r][c] = fma(splat(weights[r * kChunkKeys + key]), value, sums[u][r][c]);
    }
  };
  int64_t key = 0;
  for (; key + U <= keys; key += U)
    for (int u = 0; u < U; u++)
      add(u, key + u);
  for (; key < keys; key++)
    add(0, key);
  for (int r = 0; r < R; r++)
    for (int c = 0; c < C; c++)
      store(to + r * ldto + c * W, U == 1 ? sums[0][r][c] : sums[0][r][c] + sums[U - 1][r][c]);
}

template <int R, class T>
HYLORA_APART void add_values(const float* weights, const float* decay, const T* v, int64_t stride,
                             int64_t size, int64_t keys, float* to, int64_t ldto) {
  int64_t d = 0;
  for (; d + 4 * W <= size; d += 4 * W)
    add_columns_of_values<R, 4>(weights, decay, v + d, stride, keys, 4 * W, to + d, ldto);
  for (; d + 2 * W <= size; d += 2 * W)
    add_columns_of_values<R, 2>(weights, decay, v + d, stride, keys, 2 * W, to + d, ldto);
  if (d < size)
    add_columns_of_values<R, 2>(weights, decay, v + d, stride, keys, size - d, to + d, ldto);
}

// The rows of one KV head and one piece of the keys: what is kept from chunk to chunk.
template <class T>
struct AttentionRows {
  const AttentionCall& call;
  int64_t sequence, kv_head, piece;
  int64_t group, rows;      // group: heads of this KV head; row = query * group + head
  int64_t ldq, ldsum;       // whole pairs of vectors
  int64_t first, last;      // keys of this piece
  float *q, *sums;          // [rows][ldq], scaled; [rows][ldsum], weighted sums of values
  float *greatest, *total;  // [rows]: the greatest score so far, the sum of weights

  AttentionRows(const AttentionCall& call, int64_t part) : call(call) {
    piece = part % call.pieces, part /= call.pieces;
    sequence = part / call.kv_heads, kv_head = part % call.kv_heads;
    group = call.heads / call.kv_heads, rows = call.queries * group;
    ldq = round_up(call.head_size, 2 * W), ldsum = round_up(call.value_size, 2 * W);
    const int64_t begin = first_seen(0), keys = larger(0, call.keys - begin);
    first = begin + keys * piece / call.pieces, last = begin + keys * (piece + 1) / call.pieces;
    q = static_cast<float*>(
        scratch(Scratch::own_work, size_t(rows * (ldq + ldsum + 2)) * sizeof(float)));
    sums = q + rows * ldq, greatest = sums + rows * ldsum, total = greatest + rows;
    for (int64_t row = 0; row < rows; row++)
      start_row(row);
  }

  int64_t slot(int64_t query) const { return call.keys - call.queries + query; }
  // A query sees keys [first_seen(query), slot(query)].
  int64_t first_seen(int64_t query) const {
    const int64_t begin = call.first_key ? call.first_key[sequence] : 0;
    return call.window ? larger(begin, slot(query) - call.window + 1) : begin;
  }

  void start_row(int64_t row) {
    const T* from = head_at<const T>(call.q, call.q_strides, sequence, row / group,
                                     kv_head * group + row % group);
    for (int64_t d = 0; d < ldq; d += 2 * W)
      for (int half = 0; half < 2; half++)
        store(q + row * ldq + d + half * W,
              load_half(from + d, half, call.head_size - d) * splat(call.scale));
    for (int64_t d = 0; d < ldsum; d += W)
      store(sums + row * ldsum + d, V{});
    greatest[row] = kLeastScore, total[row] = 0;
  }

  // Scores of a row with keys [key0, key0 + keys) become weights, 0 for keys that it doesn't see.
  // Returns the factor that what was summed so far is to be scaled by.
  float weigh(int64_t row, int64_t key0, int64_t keys, float* scores) {
    const int64_t query = row / group, begin = first_seen(query) - key0;
    const int64_t end = smaller(keys, slot(query) + 1 - key0);
    V most = splat(greatest[row]);
    for (int64_t i = 0; i < keys; i += W) {
      V score = load(scores + i);
      if (call.softcap) score = softcap(score, call.softcap);
      score = select(lanes_in(i, begin, end), score, splat(kLeastScore));
      store(scores + i, score);
      most = greater_of(most, score);
    }
    float now = most[0];
    for (int lane = 1; lane < W; lane++)
      now = most[lane] > now ? most[lane] : now;
    V sum = {};
    for (int64_t i = 0; i < keys; i += W) {
      const V weight = exp(load(scores + i) - splat(now));
      const V seen = bits_as_float(float_as_bits(weight) & lanes_in(i, begin, end));
      store(scores + i, seen);
      sum += seen;
    }
    const float decay = exp(splat(greatest[row] - now))[0];
    greatest[row] = now, total[row] = total[row] * decay + sum_of_lanes(sum);
    return decay;
  }

  template <int R>
  void add_chunk(int64_t row, int64_t key0, int64_t keys) {
    float scores[R * kChunkKeys], decay[R];
    const T* k = head_at<const T>(call.k, call.k_strides, sequence, key0, kv_head);
    const T* v = head_at<const T>(call.v, call.v_strides, sequence, key0, kv_head);
    score_rows<R>(q + row * ldq, ldq, k, call.k_strides.row, call.head_size, keys, scores);
    for (int r = 0; r < R; r++)
      decay[r] = weigh(row + r, key0, keys, scores + r * kChunkKeys);
    add_values<R>(scores, decay, v, call.v_strides.row, call.value_size, keys, sums + row * ldsum,
                  ldsum);
  }

  // Rows [row, row + count) and the keys of a chunk that at least one of them sees.
  void add_chunk(int64_t row, int64_t count, int64_t key0, int64_t key1) {
    key0 = larger(key0, first_seen(row / group));
    key1 = smaller(key1, slot((row + count - 1) / group) + 1);
    if (key0 >= key1) return;
    switch (count) {
    case 1:
      return add_chunk<1>(row, key0, key1 - key0);
    case 2:
      return add_chunk<2>(row, key0, key1 - key0);
    case 3:
      return add_chunk<3>(row, key0, key1 - key0);
    default:
      return add_chunk<kAttentionRows>(row, key0, key1 - key0);
    }
  }

  void run() {
    const int64_t bytes = larger(call.head_size, call.value_size) * int64_t(sizeof(T));
    const int64_t chunk = smaller(kChunkKeys, larger(16, kChunkBytes / bytes / 16 * 16));
    for (int64_t key = first; key < last; key += chunk)
      for (int64_t row = 0; row < rows; row += kAttentionRows)
        add_chunk(row, smaller(kAttentionRows, rows - row), key, smaller(last, key + chunk));
  }

  // The row's weighted mean, or zeros if it sees no key; with several pieces its partial.
  void finish_row(int64_t row) const {
    const int64_t query = row / group, head = kv_head * group + row % group;
    if (call.pieces == 1) {
      T* out = head_at<T>(call.out, call.out_strides, sequence, query, head);
      return store_mean(out, sums + row * ldsum, total[row], call.value_size);
    }
    const int64_t at = ((sequence * call.queries + query) * call.heads + head) * call.pieces;
    float* partial = call.partials + (at + piece) * numbers_of_partial(call);
    partial[0] = greatest[row], partial[1] = total[row];
    for (int64_t d = 0; d < ldsum; d += W)
      store(partial + 2 + d, load(sums + row * ldsum + d));
  }

  static void store_mean(T* out, const float* sums, float total, int64_t size) {
    const V factor = splat(total > 0 ? 1 / total : 0);
    for (int64_t d = 0; d < size; d += 2 * W)
      store_halves(out + d, load(sums + d) * factor, load(sums + d + W) * factor, size - d);
  }
};

template <class T>
void attention_by(const AttentionCall& call, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; part++) {
    AttentionRows<T> rows(call, part);
    rows.run();
    for (int64_t row = 0; row < rows.rows; row++)
      rows.finish_row(row);
  }
}

// Joins the partials of each head of each query into the first of them, and stores its mean.
template <class T>
void join_attention_by(const AttentionCall& call, int64_t begin, int64_t end) {
  const int64_t size = call.value_size, stride = numbers_of_partial(call);
  for (int64_t part = begin; part < end; part++) {
    float* partials = call.partials + part * call.pieces * stride;
    float greatest = partials[0], total = 0;
    for (int64_t i = 1; i < call.pieces; i++)
      greatest = partials[i * stride] > greatest ? partials[i * stride] : greatest;
    for (int64_t i = 0; i < call.pieces; i++) {
      const float* partial = partials + i * stride;
      const float factor = exp(splat(partial[0] - greatest))[0];
      total += partial[1] * factor;
      for (int64_t d = 0; d < round_up(size, 2 * W); d += W) {
        const V sum = load(partial + 2 + d) * splat(factor);
        store(partials + 2 + d, i ? load(partials + 2 + d) + sum : sum);
      }
    }
    const int64_t head = part % call.heads, query = part / call.heads;
    T* out =
        head_at<T>(call.out, call.out_strides, query / call.queries, query % call.queries, head);
    AttentionRows<T>::store_mean(out, partials + 2, total, size);
  }
}

}  // namespace
}  // namespace hylora
