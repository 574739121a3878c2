// The forward for up to 16 rows, whose time is the time to read the weights.
//
// The weights are the tensor cores' first operand, 16 of their rows a tile; x is the second. Each
// thread of four reads eight neighbouring k (16 bytes) of a weight's row and of x. A product may
// pair the k in any order that both operands share, so weights go straight from memory into
// registers. The warps of a block share the contraction. The queue is that of layer.h.
#pragma once
#include "layer.h"

namespace hylora::cuda {

using DecodeShape = Shape<kDecode, false, false, 1>;

struct DecodeShared {
  float sums[DecodeShape::WARPS][DecodeShape::ROWS][DecodeShape::COLUMNS];  // one tile per warp
  int32_t ticket;
};

// The contraction of up to 16 rows of x or h with 16 rows of a weight. A thread holds its lane's
// two rows of each; null past the last row.
template <class T>
struct Lines {
  const T *row[2], *weight[2];
  bool aligned;  // 16-byte loads reach every row of both
  int begin, end, depth;
};

// Numbers k to k + 7 of a row that has them all, 16-byte aligned; zeros for a null row.
template <class T, bool FRESH>
DEVICE Chunk eight(const T* row, int k) {
  if (!row) return {};
  const Chunk* at = reinterpret_cast<const Chunk*>(row + k);
  return FRESH ? read_fresh(at) : read_once(at);
}

// Numbers k to k + 3, zeros past the row's end.
template <class T, bool FRESH>
DEVICE void read_four(uint32_t (&words)[2], const T* row, int k, int depth) {
  const int count = row ? depth - k : 0;
  words[0] = words[1] = 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (i < count)
      words[i / 2] |= uint32_t((FRESH ? read_fresh(row + k + i) : row[k + i]).bits) << i % 2 * 16;
}

// sums += the product over 16 k. A thread brings four numbers (two words) of each of its rows.
template <class T>
DEVICE void add_four(float (&sums)[2][4], const uint32_t* low, const uint32_t* high,
                     const uint32_t* row, const uint32_t* row_high, bool has_many_rows) {
  const uint32_t a[4] = {low[0], high[0], low[1], high[1]};
  mma<T>(sums[0], a, row[0], row[1]);
  if (has_many_rows) mma<T>(sums[1], a, row_high[0], row_high[1]);
}

// sums += the product over BATCH times 32 k. All loads are issued before the first product.
template <class T, bool FRESH, int BATCH>
DEVICE void add_batch(float (&sums)[2][4], const Lines<T>& l, int k, int step, bool has_many_rows) {
  Chunk weight[BATCH][2], row[BATCH][2];
#pragma unroll
  for (int i = 0; i < BATCH; i++)
#pragma unroll
    for (int high = 0; high < 2; high++) {
      weight[i][high] = eight<T, false>(l.weight[high], k + i * step);
      row[i][high] = eight<T, FRESH>(l.row[high], k + i * step);
    }
#pragma unroll
  for (int i = 0; i < BATCH; i++)
#pragma unroll
    for (int w = 0; w < 4; w += 2)
      add_four<T>(sums, weight[i][0].word + w, weight[i][1].word + w, row[i][0].word + w,
                  row[i][1].word + w, has_many_rows);
}

// sums += the product over this warp's share of k: every eighth run of 32. FRESH: the rows are of
// h, which other blocks have just written.
template <class T, bool FRESH>
DEVICE void add_lines(float (&sums)[2][4], const Lines<T>& l, bool has_many_rows) {
  constexpr int STEP = 32 * DecodeShape::WARPS;
  const int lane_k = thread_index() % 4 * 8;
  const int last_whole = l.aligned ? at_most(l.end, l.depth) - 32 : l.begin - 1;
  int k = l.begin + thread_index() / 32 * 32;
#pragma unroll 1
  for (; k + STEP <= last_whole; k += 2 * STEP)
    add_batch<T, FRESH, 2>(sums, l, k + lane_k, STEP, has_many_rows);
  if (k <= last_whole) {
    add_batch<T, FRESH, 1>(sums, l, k + lane_k, STEP, has_many_rows);
    k += STEP;
  }
#pragma unroll 1
  for (; k < l.end; k += STEP)
#pragma unroll 1
    for (int half = lane_k; half < lane_k + 8; half += 4) {
      uint32_t low[2], high[2], row[2], row_high[2];
      read_four<T, false>(low, l.weight[0], k + half, l.depth);
      read_four<T, false>(high, l.weight[1], k + half, l.depth);
      read_four<T, FRESH>(row, l.row[0], k + half, l.depth);
      read_four<T, FRESH>(row_high, l.row[1], k + half, l.depth);
      add_four<T>(sums, low, high, row, row_high, has_many_rows);
    }
}

// One number of the tile, summed over the warps: column thread % 16, row thread / 16.
DEVICE float sum_of_warps(const float (&sums)[2][4], DecodeShared& shared) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
#pragma unroll
  for (int i = 0; i < 8; i++)
    shared.sums[warp][lane % 4 * 2 + i % 2 + i / 4 * 8][lane / 4 + i / 2 % 2 * 8] =
        sums[i / 4][i % 4];
  synchronize();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < DecodeShape::WARPS; w++)
    sum += shared.sums[w][thread_index() / 16][thread_index() % 16];
  return sum;
}

// Sets this lane's two rows of a matrix, counted from row0.
template <class T>
DEVICE void set_rows(const T* (&rows)[2], const void* at, int64_t stride, int row0, int64_t limit) {
#pragma unroll
  for (int high = 0; high < 2; high++) {
    const int row = row0 + thread_index() % 32 / 4 + 8 * high;
    rows[high] = row < limit ? as<T>(at) + row * stride : nullptr;
  }
}

template <class T>
DEVICE void shrink(const LayerLaunch& f, const Queue& q, const Shrink& s, DecodeShared& shared) {
  const LayerCall& d = f.d;
  const int rank0 = s.rank_block * DecodeShape::COLUMNS;
  const int first = s.is_adapter ? q.base_blocks * DecodeShape::COLUMNS : 0;
  const int steps = cover(d.K, DecodeShape::DEPTH);
  Lines<T> l;
  set_rows(l.row, d.x, d.x_stride, 0, d.M);
  if (s.is_adapter)
    set_rows(l.weight, d.W1a, d.w1a_stride, rank0 - first, d.lora_rank);
  else
    set_rows(l.weight, d.W1, d.w1_stride, rank0, d.rank);
  l.aligned = f.x_aligned && (s.is_adapter ? f.w1a_aligned : f.w1_aligned);
  l.begin = share(steps, s.part, f.split) * DecodeShape::DEPTH;
  l.end = share(steps, s.part + 1, f.split) * DecodeShape::DEPTH, l.depth = int(d.K);
  float sums[2][4] = {};
  add_lines<T, false>(sums, l, d.M > 8);
  float sum = sum_of_warps(sums, shared);
  if (f.split > 1 &&
      !sum_of_parts<1, DecodeShape::THREADS>(&sum, d.partial, q.arrivals(s.place), s.place, s.part,
                                             f.split, &shared.ticket))
    return;
  const int column = rank0 + thread_index() % 16;
  const int64_t row = thread_index() / 16;
  if (row < d.M) {
    if (s.is_adapter) {
      if (d.h_a && column - first < d.lora_rank)
        static_cast<T*>(d.h_a)[row * d.lora_rank + column - first] = rounded<T>(sum);
      sum *= d.alpha;
    }
    static_cast<T*>(d.h)[row * q.rank_blocks * DecodeShape::COLUMNS + column] = rounded<T>(sum);
  }
  q.say_ready(0);
}

// Starts bringing 16 rows of a weight into L2, while other blocks still compute h.
template <class T>
DEVICE void prefetch_rows(const void* at, int64_t stride, int row0, int64_t limit, int64_t depth) {
  constexpr int LINE = 128 / sizeof(T);
  const int lines = cover(depth, LINE);
  for (int i = thread_index(); i < DecodeShape::COLUMNS * lines; i += DecodeShape::THREADS)
    if (row0 + i / lines < limit)
      prefetch(as<T>(at) + (row0 + i / lines) * stride + i % lines * LINE);
}

template <class T>
DEVICE void expand(const LayerLaunch& f, const Queue& q, const Expand& e, DecodeShared& shared) {
  const LayerCall& d = f.d;
  if (!e.is_pivots) prefetch_rows<T>(d.W2, d.w2_stride, e.begin, e.limit, d.rank);
  // The place in y of a column of the tile below the limit.
  auto place = [&](int column) -> int64_t {
    return e.is_pivots ? d.pivots[column] : d.pivots ? d.others[column] : column;
  };
  q.wait_until_ready(0);
  const int64_t h_stride = q.rank_blocks * DecodeShape::COLUMNS;
  float sums[2][4] = {};
  Lines<T> l;
  l.begin = 0;
  if (!e.is_pivots) {  // a pivot is h itself
    set_rows(l.row, d.h, h_stride, 0, d.M);
    set_rows(l.weight, d.W2, d.w2_stride, e.begin, e.limit);
    l.aligned = f.w2_aligned, l.end = l.depth = int(d.rank);
    add_lines<T, true>(sums, l, d.M > 8);
  }
  if (d.lora_rank) {
    set_rows(l.row, as<T>(d.h) + q.base_blocks * DecodeShape::COLUMNS, h_stride, 0, d.M);
#pragma unroll
    for (int high = 0; high < 2; high++) {
      const int column = e.begin + thread_index() % 32 / 4 + 8 * high;
      l.weight[high] = column < e.limit ? as<T>(d.W2a) + place(column) * d.w2a_stride : nullptr;
    }
    l.aligned = f.w2a_aligned, l.end = l.depth = int(d.lora_rank);
    add_lines<T, true>(sums, l, d.M > 8);
  }
  float sum = sum_of_warps(sums, shared);
  const int column = e.begin + thread_index() % 16;
  const int64_t row = thread_index() / 16;
  if (row >= d.M || column >= e.limit) return;
  if (e.is_pivots) sum += widened(read_fresh(as<T>(d.h) + row * h_stride + column));
  if (d.bias) sum += widened(as<T>(d.bias)[place(column)]);
  static_cast<T*>(d.y)[row * d.y_stride + place(column)] = rounded<T>(sum);
}

template <class T>
KERNEL(DecodeShape::THREADS, kTiles[kDecode].blocks_per_sm)
decode(ARGUMENT LayerLaunch f) {
  auto& shared = *reinterpret_cast<DecodeShared*>(shared_memory());
  Queue q = Queue::of<DecodeShape>(f);
  q.row_blocks = 1;  // a constant, which saves dividing by a runtime number
  int ticket = q.draw(&shared.ticket);
  for (; ticket < q.tiles; ticket = q.draw(&shared.ticket))
    if (ticket < q.shrink_tiles)
      shrink<T>(f, q, Shrink::of(q, ticket, f.split), shared);
    else
      expand<T>(f, q, Expand::of(q, f.d, ticket - q.shrink_tiles, DecodeShape::COLUMNS), shared);
  q.reset(ticket, DecodeShape::THREADS);
}

}  // namespace hylora::cuda
