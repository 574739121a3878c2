// Which kernel serves a call, with how many blocks, and the workspace it needs.
#include "call.h"

#include <algorithm>

namespace hylora::cuda {
namespace {

constexpr int64_t kMostParts = 16;  // past it their sum costs what the split gains

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

int64_t rank_blocks(const Dataflow& d, const Tile& tile) {
  return blocks(d.rank, tile.columns) + blocks(d.lora_rank, tile.columns);
}

int64_t column_blocks(const Dataflow& d, const Tile& tile) {
  const bool scatters = d.pivots && !d.transposed;
  if (!scatters) return blocks(d.N, tile.columns);
  return blocks(d.others_count, tile.columns) + blocks(d.rank, tile.columns);
}

int64_t thin_tiles(const Thin& t) {
  const Tile& tile = kTiles[kThin];
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

// Blocks a multiprocessor holds at a time; each pays a KiB of shared memory on top of its own.
int64_t residents(Kernel kernel, int arch) {
  const int64_t by_shared = shared_of_multiprocessor(arch) / (shared_bytes(kernel) + 1024);
  return std::clamp<int64_t>(by_shared, 1, kTiles[kernel].residents);
}

// Parts that give each of `programs` blocks a tile, none shorter than `least` of the contraction.
int parts(int64_t tiles, int64_t programs, int64_t depth, int64_t least) {
  const int64_t most = std::clamp<int64_t>(depth / least, 1, kMostParts);
  return int(std::clamp<int64_t>(programs / tiles, 1, most));
}

}  // namespace

Plan plan_as(const Dataflow& d, Kernel kernel, int split, int64_t programs) {
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

Plan plan(const Dataflow& d, int multiprocessors, int arch) {
  const Tile& large = kTiles[kTile128];
  const bool has_few_rows = d.M <= kDecodeRows;
  // Weights that run down their columns aren't what decode's 16-byte loads are made for.
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
  const int64_t programs = multiprocessors * residents(kernel, arch);
  const int64_t tiles = blocks(d.M, tile.rows) * rank_blocks(d, tile);
  // A step for every warp of decode's, which share them; of the tiles as many as are on their way.
  const int64_t least = tile.depth * (decodes ? tile.warps : tile.stages);
  return plan_as(d, kernel, parts(tiles, programs, d.K, least), programs);
}

Plan plan_as(const Thin& t, int split) {
  const Tile& tile = kTiles[kThin];
  const int64_t tiles = thin_tiles(t);
  // A row of 16 more than the tile has: the sums of dy's rows, as tensor cores make them.
  const int64_t cells = split > 1 ? tiles * split * (tile.rows + 16) * tile.columns : 0;
  return {kThin, split, tiles * split, 0, cells, tiles, 32 * tile.warps, shared_bytes(kThin)};
}

Plan plan(const Thin& t, int multiprocessors, int arch) {
  const Tile& tile = kTiles[kThin];
  const int64_t programs = multiprocessors * residents(kThin, arch);
  return plan_as(t, parts(thin_tiles(t), programs, t.M, tile.depth * tile.stages));
}

}  // namespace hylora::cuda
