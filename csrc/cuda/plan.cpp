// Chooses the kernel and the number of blocks for a call, and sizes its workspace.
#include "call.h"

#include <algorithm>

namespace hylora::cuda {
namespace {

constexpr int64_t kMostParts = 16;  // more parts cost as much to add up as the split saves

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

int64_t rank_blocks(const LayerCall& d, const Tile& tile) {
  return blocks(d.rank, tile.columns) + blocks(d.lora_rank, tile.columns);
}

int64_t column_blocks(const LayerCall& d, const Tile& tile) {
  const bool scatters = d.pivots && !d.transposed;
  if (!scatters) return blocks(d.N, tile.columns);
  return blocks(d.others_count, tile.columns) + blocks(d.rank, tile.columns);
}

int64_t adapter_gradients_tiles(const AdapterGradientsCall& t) {
  const Tile& tile = kTiles[kAdapterGradients];
  const int64_t dA = t.dA ? blocks(t.K, tile.columns) : 0;
  const int64_t dB = t.dB ? blocks(t.N, tile.columns) : 0;
  return (dA + dB) * blocks(t.lora_rank, tile.rows);
}

int64_t shared_of_multiprocessor(int arch) {
  const bool is_datacenter = arch == 90 || (arch >= 100 && arch < 120);
  if (is_datacenter) return 228 << 10;
  return (arch == 80 || arch == 87 ? 164 : 100) << 10;
}

int64_t shared_bytes(Kernel kernel) {
  const Tile& tile = kTiles[kernel];
  const int64_t ticket = 16;
  if (kernel == kDecode) return tile.warps * tile.rows * tile.columns * 4 + ticket;
  const int64_t staged = 2 * tile.stages * tile.depth * (tile.rows + tile.columns);
  return staged + 4 * tile.columns + ticket;
}

// Blocks that a multiprocessor holds at a time. Each takes a KiB of shared memory besides its own.
int64_t blocks_per_sm(Kernel kernel, int arch) {
  const int64_t by_shared = shared_of_multiprocessor(arch) / (shared_bytes(kernel) + 1024);
  return std::clamp<int64_t>(by_shared, 1, kTiles[kernel].blocks_per_sm);
}

// The number of parts that gives each of `programs` blocks a tile, with parts of at least `least`.
int parts(int64_t tiles, int64_t programs, int64_t depth, int64_t least) {
  const int64_t most = std::clamp<int64_t>(depth / least, 1, kMostParts);
  return int(std::clamp<int64_t>(programs / tiles, 1, most));
}

}  // namespace

Plan plan_as(const LayerCall& d, Kernel kernel, int split, int64_t programs) {
  const Tile& tile = kTiles[kernel];
  const int64_t ranks = rank_blocks(d, tile), row_blocks = blocks(d.M, tile.rows);
  const int64_t tiles = row_blocks * (ranks * split + column_blocks(d, tile));
  const int64_t cells = split > 1 ? row_blocks * ranks * split * tile.rows * tile.columns : 0;
  return {kernel,
          split,
          std::min(programs, tiles),
          ranks * tile.columns,
          cells,
          1 + row_blocks + row_blocks * ranks,
          32 * tile.warps,
          shared_bytes(kernel)};
}

Plan plan(const LayerCall& d, int multiprocessors, int arch) {
  const Tile& large = kTiles[kTile128];
  const bool has_few_rows = d.M <= kDecodeRows;
  // decode reads 16 bytes along a weight's row; transposed weights run down their columns.
  const bool decodes = has_few_rows && !d.transposed;
  const bool fills_with_large =
      blocks(d.M, large.rows) * std::min(column_blocks(d, large), rank_blocks(d, large) * 2) >=
      multiprocessors;
  Kernel kernel = kTile64;
  if (decodes)
    kernel = kDecode;
  else if (fills_with_large)
    kernel = kTile128;

  const Tile& tile = kTiles[kernel];
  const int64_t programs = multiprocessors * blocks_per_sm(kernel, arch);
  const int64_t tiles = blocks(d.M, tile.rows) * rank_blocks(d, tile);
  // Least part: one step for each warp in decode, whose warps share the steps; else a pipeline's
  // worth of stages.
  const int64_t least = tile.depth * (decodes ? tile.warps : tile.stages);
  return plan_as(d, kernel, parts(tiles, programs, d.K, least), programs);
}

// Each member has a queue of its own, in which the number of the next ticket is used by the first
// alone.
Plan plan_as(const GroupCall& g, int split, int64_t programs) {
  Plan whole = plan_as(g.members[0], kDecode, split, programs);
  int64_t tiles = whole.programs;
  for (int i = 1; i < g.count; i++) {
    const Plan one = plan_as(g.members[i], kDecode, split, programs);
    tiles += one.programs, whole.h_columns += one.h_columns;
    whole.partial_floats += one.partial_floats, whole.counters += one.counters;
  }
  whole.programs = std::min(programs, tiles);
  return whole;
}

Plan plan(const GroupCall& g, int multiprocessors, int arch) {
  const Tile& tile = kTiles[kDecode];
  int64_t tiles = 0;
  for (int i = 0; i < g.count; i++)
    tiles += rank_blocks(g.members[i], tile);
  const int64_t programs = multiprocessors * blocks_per_sm(kDecode, arch);
  const int64_t least = tile.depth * tile.warps;
  return plan_as(g, parts(tiles, programs, g.members[0].K, least), programs);
}

void complete(GroupCall& g, const Plan& whole, void* h, float* partial, int32_t* counters) {
  const Tile& tile = kTiles[kDecode];
  int64_t tiles = 0;
  for (int i = 0; i < g.count; i++)
    g.ends[i] = int32_t(tiles += rank_blocks(g.members[i], tile) * whole.split);
  for (int i = 0; i < g.count; i++)
    g.ends[g.count + i] = int32_t(tiles += column_blocks(g.members[i], tile));
  for (int i = 0; i < g.count; i++) {
    LayerCall& d = g.members[i];
    const Plan one = plan_as(d, kDecode, whole.split, 1);
    d.h = h, d.partial = partial, d.counters = counters;
    h = static_cast<char*>(h) + 2 * d.M * one.h_columns;
    partial += one.partial_floats, counters += one.counters;
  }
}

Plan plan_as(const AdapterGradientsCall& t, int split) {
  const Tile& tile = kTiles[kAdapterGradients];
  const int64_t tiles = adapter_gradients_tiles(t);
  // 16 rows more than the tile has hold the sums of dy's rows, as tensor cores compute them.
  const int64_t cells = split > 1 ? tiles * split * (tile.rows + 16) * tile.columns : 0;
  return {kAdapterGradients,
          split,
          tiles * split,
          0,
          cells,
          tiles,
          32 * tile.warps,
          shared_bytes(kAdapterGradients)};
}

Plan plan(const AdapterGradientsCall& t, int multiprocessors, int arch) {
  const Tile& tile = kTiles[kAdapterGradients];
  const int64_t programs = multiprocessors * blocks_per_sm(kAdapterGradients, arch);
  return plan_as(t, parts(adapter_gradients_tiles(t), programs, t.M, tile.depth * tile.stages));
}

}  // namespace hylora::cuda
