// The adapter's gradients in one launch: dA = dh_a^T x, dB = alpha dy^T h_a and db = the sum of
// dy's rows. A block computes one tile of ranks by columns of x or dy, summed over one of `split`
// shares of the rows. The last share to arrive adds up all shares in their order.
#pragma once
#include "tile.h"

namespace hylora::cuda {

// A call, and whether 16-byte loads reach every row of its matrices.
struct AdapterGradientsLaunch {
  AdapterGradientsCall t;
  int split;
  bool x_aligned, dy_aligned, ranks_aligned;  // ranks: of dh_a and h_a
};

// Stores db from the sums of the row of ones. All of that tile's 16 rows are equal.
template <class Shape, class T>
DEVICE void store_column_sums(const Sums<Shape>& sums, T* db, int column0, int64_t limit) {
  const int lane = thread_index() % 32;
  if (lane >= 4) return;
  const int first = column0 + thread_index() / 32 * Shape::WARP_COLUMNS + 2 * lane;
#pragma unroll
  for (int j = 0; j < Shape::N_TILES; j++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      if (first + 8 * j + i < limit)
        db[first + 8 * j + i] = rounded<T>(sums.part[Shape::M_TILES][j][i]);
}

template <class T>
KERNEL(32 * kTiles[kAdapterGradients].warps, kTiles[kAdapterGradients].blocks_per_sm)
adapter_gradients(ARGUMENT AdapterGradientsLaunch f) {
  using Shape = hylora::cuda::Shape<kAdapterGradients, true, true, 1, true>;
  auto& shared = *reinterpret_cast<Shared<T, Shape>*>(shared_memory());
  const AdapterGradientsCall& t = f.t;
  const int part = block_index() % f.split, tile = block_index() / f.split;
  const int rank_blocks = cover(t.lora_rank, Shape::ROWS);
  const int dA_tiles = t.dA ? cover(t.K, Shape::COLUMNS) * rank_blocks : 0;
  const bool is_dA = tile < dA_tiles;
  const int rank0 = tile % rank_blocks * Shape::ROWS;
  const int column0 = (is_dA ? tile : tile - dA_tiles) / rank_blocks * Shape::COLUMNS;
  const int steps = cover(t.M, Shape::DEPTH);

  Range<T> r;
  r.left = static_cast<const T*>(is_dA ? t.dh_a : t.h_a), r.left_stride = t.lora_rank;
  r.right = static_cast<const T*>(is_dA ? t.x : t.dy);
  r.right_stride = is_dA ? t.x_stride : t.dy_stride;
  r.left_aligned = f.ranks_aligned, r.right_aligned = is_dA ? f.x_aligned : f.dy_aligned;
  r.left_at = nullptr, r.right_at = nullptr;
  r.right_begin = column0, r.right_limit = int(is_dA ? t.K : t.N);
  r.k = share(steps, part, f.split) * Shape::DEPTH;
  r.end = share(steps, part + 1, f.split) * Shape::DEPTH, r.depth = int(t.M);
  Sums<Shape> sums = {};
  contract(
      sums, shared.staged, r, cover(r.end - r.k, Shape::DEPTH), rank0, int(t.lora_rank), [] {},
      [&] { return r; });
  if (f.split > 1 &&
      !sum_of_parts<Sums<Shape>::COUNT, Shape::THREADS>(
          &sums.part[0][0][0], t.partial, t.counters + tile, tile, part, f.split, &shared.ticket))
    return;

  T* out = shared.staged;
  if (is_dA) {
    stage_result(sums, out);
    store_tile<T, Shape::ROWS, Shape::COLUMNS, Shape::THREADS>(
        out, static_cast<T*>(t.dA), t.K, rank0, t.lora_rank, column0, t.K, nullptr);
    return;
  }
  synchronize();
  each_pair(sums, [&](int rank, int column, float first, float second) {
    out[column * OUT_STRIDE<Shape::ROWS> + rank] = rounded<T>(t.alpha * first);
    out[(column + 1) * OUT_STRIDE<Shape::ROWS> + rank] = rounded<T>(t.alpha * second);
  });
  synchronize();
  store_tile<T, Shape::COLUMNS, Shape::ROWS, Shape::THREADS>(
      out, static_cast<T*>(t.dB), t.lora_rank, column0, t.N, rank0, t.lora_rank, nullptr);
  if (t.db && rank0 == 0) store_column_sums(sums, static_cast<T*>(t.db), column0, t.N);
}

}  // namespace hylora::cuda
