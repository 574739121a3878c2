// Both products of a layer in one launch, for any number of rows.
//
// Blocks draw tickets for tiles from one ordered queue. The shrink tiles come first; each writes a
// block of h = x [W1; W1a]^T to a workspace that stays in L2. The expand tiles follow; each waits
// until the h of its rows is complete and writes a block of y = h [W2, W2a]^T + bias. The weights
// are read once, and expand tiles fill the multiprocessors that the last shrink tiles leave idle.
//
// A tile waits only for tiles before it in the queue, and running blocks have drawn all of those.
// So nothing deadlocks, with any number of blocks.
//
// The block that draws the last ticket resets the counters to zero, so nothing is cleared between
// launches and a CUDA graph can replay one. Parts of a sum are added in one order, whichever block
// comes last: the bits repeat.
#pragma once
#include "tile.h"

namespace hylora::cuda {

// A call, and whether 16-byte loads reach every row of each operand.
struct LayerLaunch {
  LayerCall d;
  int split;
  bool x_aligned, w1_aligned, w1a_aligned, w2_aligned, w2a_aligned;
};

// The pivoted form scatters y's columns (forward), or gathers x's (backward), by the lists of
// pivots and others.
DEVICE bool scatters(const LayerCall& d) { return d.pivots && !d.transposed; }
DEVICE bool gathers(const LayerCall& d) { return d.pivots && d.transposed; }

// The queue of a launch. `counters` holds the next ticket, then for each block of rows the number
// of its blocks of h that are ready, then for each block of h the number of parts that have
// arrived.
struct Queue {
  int32_t* counters;
  int row_blocks, rank_blocks, base_blocks, column_blocks, other_blocks, shrink_tiles, tiles;

  template <class Shape>
  static DEVICE Queue of(const LayerLaunch& f) {
    const LayerCall& d = f.d;
    Queue q;
    q.counters = d.counters;
    q.row_blocks = cover(d.M, Shape::ROWS);
    q.base_blocks = cover(d.rank, Shape::COLUMNS);
    q.rank_blocks = q.base_blocks + cover(d.lora_rank, Shape::COLUMNS);
    q.other_blocks = cover(scatters(d) ? d.others_count : d.N, Shape::COLUMNS);
    q.column_blocks = q.other_blocks + (scatters(d) ? cover(d.rank, Shape::COLUMNS) : 0);
    q.shrink_tiles = q.row_blocks * q.rank_blocks * f.split;
    q.tiles = q.shrink_tiles + q.row_blocks * q.column_blocks;
    return q;
  }

  DEVICE int32_t* ready(int row_block) const { return counters + 1 + row_block; }
  DEVICE int32_t* arrivals(int place) const { return counters + 1 + row_blocks + place; }

  // The tiles of one block of rows come before those of the next.
  DEVICE int row_block(int tile, int each) const { return row_blocks == 1 ? 0 : tile / each; }

  // The next ticket, the same for all threads, drawn when all have finished with the last one.
  DEVICE int draw(int32_t* ticket) const {
    synchronize();
    if (thread_index() == 0) *ticket = add_relaxed(counters, 1);
    synchronize();
    return *ticket;
  }

  // Counts one more block of h as complete, after every thread has written its part.
  DEVICE void say_ready(int row_block) const {
    synchronize();
    if (thread_index() == 0) add_release(ready(row_block), 1);
  }

  DEVICE void wait_until_ready(int row_block) const {
    if (thread_index() == 0)
      while (load_acquire(ready(row_block)) < rank_blocks) {
      }
    synchronize();
  }

  // Every block ends on a ticket past the last tile, drawn after its own last tile was done. The
  // block with the last ticket resets all counters; adding needs no result to wait for.
  DEVICE void reset(int last_ticket, int threads) const {
    if (last_ticket != tiles + block_count() - 1) return;
    if (thread_index() == 0) add_relaxed(counters, -tiles - block_count());
    for (int block = thread_index(); block < row_blocks; block += threads)
      add_relaxed(ready(block), -rank_blocks);
  }
};

// A shrink tile: one part of a block of h.
struct Shrink {
  int part, place, row_block, rank_block;
  bool is_adapter;

  static DEVICE Shrink of(const Queue& q, int tile, int split) {
    const int place = tile / split, row_block = q.row_block(place, q.rank_blocks);
    const int rank_block = place - row_block * q.rank_blocks;
    return {tile - place * split, place, row_block, rank_block, rank_block >= q.base_blocks};
  }
};

// An expand tile: one block of y. Its columns, or others, or pivots run from `begin` to `limit`.
// The others' blocks come before the pivots'.
struct Expand {
  int row_block, begin, limit;
  bool is_pivots;

  static DEVICE Expand of(const Queue& q, const LayerCall& d, int tile, int columns) {
    const int row_block = q.row_block(tile, q.column_blocks);
    const int column_block = tile - row_block * q.column_blocks;
    const bool is_pivots = column_block >= q.other_blocks;
    const int begin = (column_block - (is_pivots ? q.other_blocks : 0)) * columns;
    return {row_block, begin,
            int(is_pivots     ? d.rank
                : scatters(d) ? d.others_count
                              : d.N),
            is_pivots};
  }
};

template <class T>
DEVICE const T* as(const void* at) {
  return static_cast<const T*>(at);
}

template <class Shape, class T>
DEVICE Range<T> shrink_range(const LayerLaunch& f, const Queue& q, const Shrink& s) {
  const LayerCall& d = f.d;
  const bool by_list = gathers(d) && !s.is_adapter;
  const int depth = int(by_list ? d.others_count : d.K);
  const int steps = cover(depth, Shape::DEPTH);
  Range<T> r;
  r.left = as<T>(d.x), r.left_stride = d.x_stride, r.left_aligned = f.x_aligned;
  r.left_at = by_list ? d.others : nullptr;
  r.right = as<T>(s.is_adapter ? d.W1a : d.W1);
  r.right_stride = s.is_adapter ? d.w1a_stride : d.w1_stride;
  r.right_aligned = s.is_adapter ? f.w1a_aligned : f.w1_aligned;
  r.right_at = nullptr;
  r.right_begin = (s.rank_block - (s.is_adapter ? q.base_blocks : 0)) * Shape::COLUMNS;
  r.right_limit = int(s.is_adapter ? d.lora_rank : d.rank);
  r.k = share(steps, s.part, f.split) * Shape::DEPTH;
  r.end = share(steps, s.part + 1, f.split) * Shape::DEPTH, r.depth = depth;
  return r;
}

// The base's range of an expand tile's contraction, or the adapter's.
template <class Shape, class T>
DEVICE Range<T> expand_range(const LayerLaunch& f, const Queue& q, const Expand& e,
                             const int32_t* columns, bool is_adapter) {
  const LayerCall& d = f.d;
  Range<T> r;
  r.left = as<T>(d.h) + (is_adapter ? q.base_blocks * Shape::COLUMNS : 0);
  r.left_stride = q.rank_blocks * Shape::COLUMNS, r.left_aligned = true, r.left_at = nullptr;
  r.right = as<T>(is_adapter ? d.W2a : d.W2);
  r.right_stride = is_adapter ? d.w2a_stride : d.w2_stride;
  r.right_aligned = is_adapter ? f.w2a_aligned : f.w2_aligned;
  r.right_at = is_adapter && scatters(d) ? columns : nullptr;
  r.right_begin = e.begin, r.right_limit = e.limit;
  r.k = 0, r.depth = int(is_adapter ? d.lora_rank : d.rank);
  r.end = e.is_pivots && !is_adapter ? 0 : r.depth;  // a pivot is h itself
  return r;
}

template <class Shape, class T>
DEVICE void finish_shrink(const LayerLaunch& f, const Queue& q, const Shrink& s, Sums<Shape>& sums,
                          Shared<T, Shape>& shared) {
  const LayerCall& d = f.d;
  const int row0 = s.row_block * Shape::ROWS, rank0 = s.rank_block * Shape::COLUMNS;
  if (gathers(d) && !s.is_adapter && s.part == 0)
    each_pair(sums, [&](int row, int column, float& first, float& second) {
      if (row0 + row >= d.M) return;
      const T* x = as<T>(d.x) + (row0 + row) * d.x_stride;
      if (rank0 + column < d.rank) first += widened(x[d.pivots[rank0 + column]]);
      if (rank0 + column + 1 < d.rank) second += widened(x[d.pivots[rank0 + column + 1]]);
    });
  if (f.split > 1 && !sum_of_parts<Sums<Shape>::COUNT, Shape::THREADS>(
                         &sums.part[0][0][0], d.partial, q.arrivals(s.place), s.place, s.part,
                         f.split, &shared.ticket))
    return;

  auto store = [&](void* to, int64_t stride, int column0) {
    stage_result(sums, shared.staged);
    store_tile<T, Shape::ROWS, Shape::COLUMNS, Shape::THREADS>(
        shared.staged, static_cast<T*>(to), stride, row0, d.M, column0, stride, nullptr);
  };
  auto scale = [&] {
    each_pair(sums,
              [&](int, int, float& first, float& second) { first *= d.alpha, second *= d.alpha; });
  };
  if (s.is_adapter) {
    if (d.transposed) scale();
    if (d.h_a) store(d.h_a, d.lora_rank, rank0 - q.base_blocks * Shape::COLUMNS);
    if (!d.transposed) scale();
  }
  store(d.h, q.rank_blocks * Shape::COLUMNS, rank0);
  q.say_ready(s.row_block);
}

template <class Shape, class T>
DEVICE void finish_expand(const LayerLaunch& f, const Queue& q, const Expand& e, Sums<Shape>& sums,
                          Shared<T, Shape>& shared) {
  const LayerCall& d = f.d;
  const int row0 = e.row_block * Shape::ROWS;
  const int32_t* columns = scatters(d) ? shared.columns : nullptr;
  const T* h = as<T>(d.h);
  const int64_t h_stride = q.rank_blocks * Shape::COLUMNS;
  each_pair(sums, [&](int row, int column, float& first, float& second) {
    if (e.is_pivots && row0 + row < d.M) {  // h has whole blocks of columns
      const T* at = h + (row0 + row) * h_stride + e.begin + column;
      first += widened(read_fresh(at)), second += widened(read_fresh(at + 1));
    }
    if (!d.bias) return;
    auto bias_of = [&](int c) {
      if (e.begin + c >= e.limit) return 0.0f;
      return widened(as<T>(d.bias)[columns ? columns[c] : e.begin + c]);
    };
    first += bias_of(column), second += bias_of(column + 1);
  });
  stage_result(sums, shared.staged);
  store_tile<T, Shape::ROWS, Shape::COLUMNS, Shape::THREADS>(
      shared.staged, static_cast<T*>(d.y), d.N, row0, d.M, e.begin, e.limit, columns);
}

// Writes to `shared.columns` where an expand tile's columns stand in y.
template <class Shape, class T>
DEVICE void list_columns(const LayerCall& d, const Expand& e, Shared<T, Shape>& shared) {
  for (int c = thread_index(); c < Shape::COLUMNS; c += Shape::THREADS) {
    const int at = at_most(e.begin + c, e.limit - 1);
    shared.columns[c] = e.is_pivots ? d.pivots[at] : int32_t(d.others[at]);
  }
  synchronize();
}

template <class T, int KERNEL_, bool DOWN>
KERNEL(32 * kTiles[KERNEL_].warps, kTiles[KERNEL_].blocks_per_sm)
layer(ARGUMENT LayerLaunch f) {
  using Shape = hylora::cuda::Shape<KERNEL_, false, DOWN, 2>;
  auto& shared = *reinterpret_cast<Shared<T, Shape>*>(shared_memory());
  const LayerCall& d = f.d;
  const Queue q = Queue::of<Shape>(f);
  int ticket = q.draw(&shared.ticket);
  for (; ticket < q.tiles; ticket = q.draw(&shared.ticket)) {
    const bool shrinks = ticket < q.shrink_tiles;
    const Shrink s = Shrink::of(q, ticket, f.split);
    const Expand e = Expand::of(q, d, ticket - q.shrink_tiles, Shape::COLUMNS);
    if (!shrinks && scatters(d)) list_columns(d, e, shared);
    // One contraction serves both kinds of tile: a second one would double the code.
    const Range<T> range = shrinks ? shrink_range<Shape, T>(f, q, s)
                                   : expand_range<Shape, T>(f, q, e, shared.columns, false);
    int steps = cover(range.end - range.k, Shape::DEPTH);
    if (!shrinks) steps += cover(d.lora_rank, Shape::DEPTH);
    Sums<Shape> sums = {};
    contract(
        sums, shared.staged, range, steps, (shrinks ? s.row_block : e.row_block) * Shape::ROWS,
        int(d.M),
        [&] {
          if (!shrinks) q.wait_until_ready(e.row_block);
        },
        [&] { return expand_range<Shape, T>(f, q, e, shared.columns, true); });
    if (shrinks)
      finish_shrink(f, q, s, sums, shared);
    else
      finish_expand(f, q, e, sums, shared);
  }
  q.reset(ticket, Shape::THREADS);
}

}  // namespace hylora::cuda
