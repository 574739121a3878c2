// A tile of a product: load parts of both operands into shared memory, multiply, store.
//
// The operands arrive in stages; some are on their way while one is multiplied. An operand whose
// pointer and stride are multiples of 16 bytes is copied asynchronously, 16 bytes at a time. Any
// other operand, and one whose columns a list selects, goes number by number through registers.
#pragma once
#include "call.h"
#include "primitives.h"

namespace hylora::cuda {

DEVICE int at_most(int value, int most) { return value < most ? value : most; }
// The number of blocks that cover a size.
DEVICE int cover(int64_t size, int block) { return int((size + block - 1) / block); }

// The division of a tile among a block's warps and threads. DOWN: the contraction runs down that
// operand's columns. SUMS: a row of ones is multiplied as well, which sums up the right operand's
// columns.
template <int KERNEL_, bool LEFT_DOWN_, bool RIGHT_DOWN_, int WARPS_DOWN, bool SUMS_ = false>
struct Shape {
  static constexpr bool LEFT_DOWN = LEFT_DOWN_, RIGHT_DOWN = RIGHT_DOWN_, SUMS = SUMS_;
  static constexpr Tile TILE = kTiles[KERNEL_];
  static constexpr int ROWS = TILE.rows, COLUMNS = TILE.columns, DEPTH = TILE.depth;
  static constexpr int STAGES = TILE.stages, WARPS = TILE.warps, THREADS = 32 * WARPS;
  static constexpr int WARPS_ACROSS = WARPS / WARPS_DOWN;
  static constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLUMNS = COLUMNS / WARPS_ACROSS;
  static constexpr int M_TILES = WARP_ROWS / 16, N_TILES = WARP_COLUMNS / 8;
  static constexpr int STAGE = DEPTH * (ROWS + COLUMNS);  // numbers
};

// This thread's part of a tile's result, in the layout of mma.
template <class Shape>
struct Sums {
  static constexpr int COUNT = (Shape::M_TILES + Shape::SUMS) * Shape::N_TILES * 4;
  float part[Shape::M_TILES + Shape::SUMS][Shape::N_TILES][4];
};

// The shared memory of a block.
template <class T, class Shape>
struct Shared {
  T staged[Shape::STAGES * Shape::STAGE];
  int32_t columns[Shape::COLUMNS];  // places of the tile's columns in y, if it scatters
  int32_t ticket;
};

// A range of the contraction of two operands, from k to end. Numbers past `depth` count as zero.
template <class T>
struct Range {
  const T *left, *right;
  int64_t left_stride, right_stride;  // of rows in memory
  bool left_aligned, right_aligned;
  const int64_t* left_at;   // the column of left for each k, or null
  const int32_t* right_at;  // the row of right for each of the tile's, or null
  int right_begin, right_limit;
  int k, end, depth;
};

// The place of chunk c of a row in a tile whose rows are COLUMNS numbers. ldmatrix reads eight rows
// at a time; this order keeps them in different banks.
template <int COLUMNS>
DEVICE int place(int row, int c) {
  return row * COLUMNS + 8 * (c ^ (COLUMNS >= 64 ? row & 7 : row >> 1 & 3));
}

// Reads the first `count` of eight numbers; the rest are zeros.
template <class T>
DEVICE Chunk gathered(const T* row, const int64_t* at, int k, int count) {
  Chunk chunk;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t low = 0, high = 0;
    if (2 * i < count) low = row[at ? at[k + 2 * i] : k + 2 * i].bits;
    if (2 * i + 1 < count) high = row[at ? at[k + 2 * i + 1] : k + 2 * i + 1].bits;
    chunk.word[i] = low | high << 16;
  }
  return chunk;
}

// Loads [ROWS, COLUMNS] of a matrix, from (row0, column0) on, into shared memory; zeros past its
// limits.
template <class T, int ROWS, int COLUMNS, int THREADS>
DEVICE void load_tile(T* tile, const T* from, int64_t stride, bool aligned, int row0, int row_limit,
                      int column0, int column_limit, const int32_t* row_at,
                      const int64_t* column_at) {
  constexpr int CHUNKS = COLUMNS / 8, EACH = ROWS * CHUNKS / THREADS;
  static_assert(EACH * THREADS == ROWS * CHUNKS);
  const bool copies = aligned && !column_at;
  auto chunk = [&](int i) {
    const int c = thread_index() + i * THREADS, row = c / CHUNKS, column = column0 + c % CHUNKS * 8;
    const int left = row0 + row < row_limit ? column_limit - column : 0;
    const int count = left < 0 ? 0 : at_most(left, 8);
    const int64_t source = count == 0 ? 0 : row_at ? row_at[row] : row0 + row;
    T* to = tile + place<COLUMNS>(row, c % CHUNKS);
    if (copies)
      copy_async(to, from + source * stride + (count ? column : 0), 2 * count);
    else
      *reinterpret_cast<Chunk*>(to) = gathered(from + source * stride, column_at, column, count);
  };
  if (copies) {
#pragma unroll
    for (int i = 0; i < EACH; i++)
      chunk(i);
  } else {
#pragma unroll 1
    for (int i = 0; i < EACH; i++)
      chunk(i);
  }
}

template <class Shape, class T>
DEVICE void load_left(T* stage, const Range<T>& r, int k, int row0, int row_limit) {
  if constexpr (Shape::LEFT_DOWN)
    load_tile<T, Shape::DEPTH, Shape::ROWS, Shape::THREADS>(stage, r.left, r.left_stride,
                                                            r.left_aligned, k, r.depth, row0,
                                                            row_limit, nullptr, nullptr);
  else
    load_tile<T, Shape::ROWS, Shape::DEPTH, Shape::THREADS>(stage, r.left, r.left_stride,
                                                            r.left_aligned, row0, row_limit, k,
                                                            r.depth, nullptr, r.left_at);
}

template <class Shape, class T>
DEVICE void load_right(T* stage, const Range<T>& r, int k) {
  T* tile = stage + Shape::ROWS * Shape::DEPTH;
  if constexpr (Shape::RIGHT_DOWN)
    load_tile<T, Shape::DEPTH, Shape::COLUMNS, Shape::THREADS>(
        tile, r.right, r.right_stride, r.right_aligned, k, r.depth, r.right_begin, r.right_limit,
        nullptr, nullptr);
  else
    load_tile<T, Shape::COLUMNS, Shape::DEPTH, Shape::THREADS>(
        tile, r.right, r.right_stride, r.right_aligned, r.right_begin, r.right_limit, k, r.depth,
        r.right_at, nullptr);
}

// Loads a 16 x 16 block of an operand in the layout of mma. The left operand's four matrices are
// (rows, k) low-low, high-low, low-high, high-high; the right one's low-low, low-high, high-low,
// high-high. So one set of addresses serves one operand untransposed and the other transposed.
template <bool TRANSPOSED, int COLUMNS, class T>
DEVICE void fragment(uint32_t (&r)[4], const T* tile, int row, int chunk, bool rows_first) {
  const int lane = thread_index() % 32, low = lane & 15, crossed = (lane & 7) + (lane >> 4) * 8;
  const T* at = rows_first ? tile + place<COLUMNS>(row + low, chunk + (lane >> 4))
                           : tile + place<COLUMNS>(row + crossed, chunk + (lane >> 3 & 1));
  if constexpr (TRANSPOSED)
    ldmatrix_transposed(r, at);
  else
    ldmatrix(r, at);
}

// sums += left right^T over one stage.
template <class Shape, class T>
DEVICE void multiply(Sums<Shape>& sums, const T* left) {
  const T* right = left + Shape::ROWS * Shape::DEPTH;
  const int warp = thread_index() / 32;
  const int row0 = warp / Shape::WARPS_ACROSS * Shape::WARP_ROWS;
  const int column0 = warp % Shape::WARPS_ACROSS * Shape::WARP_COLUMNS;
  const uint32_t one = pack<T>(1.0f, 1.0f), ones[4] = {one, one, one, one};
#pragma unroll
  for (int k = 0; k < Shape::DEPTH; k += 16) {
    uint32_t a[Shape::M_TILES][4], b[Shape::N_TILES / 2][4];
#pragma unroll
    for (int i = 0; i < Shape::M_TILES; i++)
      if constexpr (Shape::LEFT_DOWN)
        fragment<true, Shape::ROWS>(a[i], left, k, (row0 + 16 * i) / 8, false);
      else
        fragment<false, Shape::DEPTH>(a[i], left, row0 + 16 * i, k / 8, true);
#pragma unroll
    for (int j = 0; j < Shape::N_TILES / 2; j++)
      if constexpr (Shape::RIGHT_DOWN)
        fragment<true, Shape::COLUMNS>(b[j], right, k, (column0 + 16 * j) / 8, true);
      else
        fragment<false, Shape::DEPTH>(b[j], right, column0 + 16 * j, k / 8, false);
#pragma unroll
    for (int j = 0; j < Shape::N_TILES; j++) {
      const uint32_t b0 = b[j / 2][j % 2 * 2], b1 = b[j / 2][j % 2 * 2 + 1];
#pragma unroll
      for (int i = 0; i < Shape::M_TILES; i++)
        mma<T>(sums.part[i][j], a[i], b0, b1);
      if constexpr (Shape::SUMS) mma<T>(sums.part[Shape::M_TILES][j], ones, b0, b1);
    }
  }
}

// sums += the product over `steps` stages: those of `range`, then those of next(). The first right
// tiles are requested before ready(), which waits until the left ones can be read.
template <class Shape, class T, class Ready, class Next>
DEVICE void contract(Sums<Shape>& sums, T* staged, Range<T> range, int steps, int row0,
                     int row_limit, Ready ready, Next next) {
  constexpr int AHEAD = Shape::STAGES - 1;
  const int early = at_most(AHEAD, cover(range.end - range.k, Shape::DEPTH));
  for (int step = 0; step < early; step++)
    load_right<Shape>(staged + step * Shape::STAGE, range, range.k + step * Shape::DEPTH);
  ready();
  int slot = 0, free = 0;  // of the stage that is multiplied, and of the one loaded AHEAD of it
#pragma unroll 1
  for (int step = -AHEAD; step < steps; step++) {
    if (step >= 0) {
      wait<AHEAD - 1>();
      synchronize();  // everyone's copies are there, and everyone is through with the slot before
    }
    if (step + AHEAD < steps) {
      if (range.k >= range.end) range = next();
      load_left<Shape>(staged + free * Shape::STAGE, range, range.k, row0, row_limit);
      if (step + AHEAD >= early) load_right<Shape>(staged + free * Shape::STAGE, range, range.k);
      range.k += Shape::DEPTH;
      free = free + 1 == Shape::STAGES ? 0 : free + 1;
    }
    commit();
    if (step < 0) continue;
    multiply<Shape>(sums, staged + slot * Shape::STAGE);
    slot = slot + 1 == Shape::STAGES ? 0 : slot + 1;
  }
}

// Calls visit(row, column, first, second) for this thread's pairs of neighbours in the tile's rows.
template <class Shape, class Visit>
DEVICE void each_pair(Sums<Shape>& sums, Visit visit) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int row0 = warp / Shape::WARPS_ACROSS * Shape::WARP_ROWS + lane / 4;
  const int column0 = warp % Shape::WARPS_ACROSS * Shape::WARP_COLUMNS + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Shape::M_TILES; i++)
#pragma unroll
    for (int j = 0; j < Shape::N_TILES; j++)
#pragma unroll
      for (int low = 0; low < 2; low++) {
        float (&four)[4] = sums.part[i][j];
        visit(row0 + 16 * i + 8 * low, column0 + 8 * j, four[2 * low], four[2 * low + 1]);
      }
}

// Row stride of a result in shared memory; the gap keeps eight rows in different banks.
template <int COLUMNS>
constexpr int OUT_STRIDE = COLUMNS + 8;

// Rounds a result into `out`, for store_tile to read.
template <class Shape, class T>
DEVICE void stage_result(Sums<Shape>& sums, T* out) {
  synchronize();  // everyone is through with what lay there
  each_pair(sums, [&](int row, int column, float first, float second) {
    *reinterpret_cast<uint32_t*>(out + row * OUT_STRIDE<Shape::COLUMNS> + column) =
        pack<T>(first, second);
  });
  synchronize();
}

// Stores `out` [ROWS, COLUMNS] to a matrix of row stride `stride`, from (row0, column0) on.
// columns_at: the places of the tile's columns instead, or null.
template <class T, int ROWS, int COLUMNS, int THREADS>
DEVICE void store_tile(const T* out, T* to, int64_t stride, int row0, int64_t row_limit,
                       int column0, int64_t column_limit, const int32_t* columns_at) {
  const bool is_aligned =
      (reinterpret_cast<uintptr_t>(to) | uintptr_t(stride * sizeof(T))) % 16 == 0;
  constexpr int STRIDE = OUT_STRIDE<COLUMNS>, CHUNKS = COLUMNS / 8;
  if (is_aligned && !columns_at) {  // so that a chunk is inside or outside as a whole
#pragma unroll 1
    for (int c = thread_index(); c < ROWS * CHUNKS; c += THREADS) {
      const int row = c / CHUNKS, column = c % CHUNKS * 8;
      if (row0 + row < row_limit && column0 + column < column_limit)
        *reinterpret_cast<Chunk*>(to + (row0 + row) * stride + column0 + column) =
            *reinterpret_cast<const Chunk*>(out + row * STRIDE + column);
    }
    return;
  }
#pragma unroll 1
  for (int e = thread_index(); e < ROWS * COLUMNS; e += THREADS) {
    const int row = e / COLUMNS, column = e % COLUMNS;
    if (row0 + row < row_limit && column0 + column < column_limit)
      to[(row0 + row) * stride + (columns_at ? columns_at[column] : column0 + column)] =
          out[row * STRIDE + column];
  }
}

// The first of `steps` that part number `part` adds up.
DEVICE int share(int steps, int part, int split) { return int(int64_t(part) * steps / split); }

// Returns true to the last part's block to arrive, with the sum of all parts in their order; false
// to the others. The last one resets its counter to zero.
template <int COUNT, int THREADS>
DEVICE bool sum_of_parts(float* sums, float* partial, int32_t* arrival, int64_t place, int part,
                         int split, int32_t* ticket) {
  float* first = partial + place * split * COUNT * THREADS + thread_index();
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    first[(part * COUNT + i) * THREADS] = sums[i];
  synchronize();
  if (thread_index() == 0) *ticket = add_acquire_release(arrival, 1);
  synchronize();
  if (*ticket != split - 1) return false;
#pragma unroll
  for (int i = 0; i < COUNT; i++)
    sums[i] = 0.0f;
#pragma unroll 1
  for (int n = 0; n < split; n++)
#pragma unroll
    for (int i = 0; i < COUNT; i++)
      sums[i] += read_fresh(first + (n * COUNT + i) * THREADS);
  if (thread_index() == 0) add_relaxed(arrival, -split);
  return true;
}

}  // namespace hylora::cuda
