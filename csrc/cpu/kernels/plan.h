// Decisions about a block of rows, by a pure function of sizes: which order the loops take, what is
// copied, how much fits a cache. tests/backends/cpu/test_plan.py compiles this file by itself.
#pragma once
#include "../call.h"

namespace hylora {
namespace {

// Bytes of L2 (2 MB where there are AMX tiles) for a group of panels. While a group is multiplied
// the next one is fetched, and rows and partial sums need the rest.
constexpr int64_t kGroupBytes = 576 << 10;
// The same for a group's outputs of all rows of the block, where panels stay and rows stream.
constexpr int64_t kGroupOutputBytes = 512 << 10;
// FMA takes row tiles first only if the expand weights are at most so many k-blocks long; longer
// ones read the rows too often. Speed relative to panels first, M = 512: 0.93 at K = 2048, 0.91 at
// K = 1024, but 1.05 at k = 301 and 1.08 at k = 768.
constexpr int64_t kRowTilesFirstBlocks = 24;
constexpr int64_t kUnlimited = int64_t(1) << 40;

// A way of multiplying (Fma, Paired, Amx) on one type of tensor.
struct Method {
  bool tiles;                // in AMX tiles
  int64_t planes;            // bf16 limbs that a number is kept as; 1: it is kept as it is
  int64_t panels_per_tile;   // 1, or 2 side by side
  int64_t chunk_blocks;      // k-blocks (of 32) that one pass over the block's rows sums
  int64_t rows;              // rows of a block
  bool keeps_type;           // x and h are kept in the tensors' type
  bool tile_panels;          // panels lie as AMX tiles (bf16), else as [k][32]
  int64_t type_bytes;        // of a number in the tensors
  int64_t kept_bytes;        // of a number of x or h as it is kept
  bool fixed_point = false;  // many rows of quantised panels are fixed point, too

  constexpr bool has_limbs() const { return planes > 1; }
  // Rows stay in L1 while panels stream past them; other methods keep the panel and stream rows.
  constexpr bool rows_stay() const { return tiles && planes == 1; }
};

// The place that the shrink product reads x from.
enum class XSource {
  in_place,
  chunk_copy,  // each chunk of k is copied (converted, padded) before it is multiplied
  whole_copy,  // all of it is copied before the shrink product
};

// The passes over k of a product: `count` of `blocks` k-blocks each, the last one maybe shorter.
struct Passes {
  int64_t count, blocks;
};

struct BlockPlan {
  int64_t rows;
  bool shared;           // few rows: several threads work on this block, each on its panels
  bool row_tiles_first;  // expand: a 32-row tile passes a group of panels, then the next tile does
  bool finishes_row_tiles;  // and is then done, so `others` and the adapter's pivots hold one tile
  XSource x;
  bool fixed_point;      // rows of quantised panels are fixed point
  bool has_h;            // else the layer is one product, on x
  bool merges_pivots;    // y is merged from pivots and others
  bool h_is_pivots;      // h as it is kept holds the pivots, so that they need no copy
  bool adapter_h_apart;  // the adapter's columns of h are kept once more without the base's
  int64_t base_panels;   // of h; the adapter's follow, if it is separate
  Passes shrink, expand;
  int64_t shrink_group, expand_group;  // at most so many panels pass through L2 together
};

inline int64_t k_blocks(const Panels& panels) { return ceil_div(panels.k, 32); }

// k-blocks of all that an output of expand is summed from.
inline int64_t expand_blocks(const LayerCall& call) {
  return k_blocks(call.expand) +
         (call.adapter == Adapter::separate ? k_blocks(call.adapter_expand) : 0);
}

// Rows of a block. If K fits one pass, no partial sums are spilled, which leaves space in L2 for
// twice the rows.
inline int64_t rows_per_block(const Method& method, const LayerCall& call) {
  const bool one_pass = ceil_div(call.K, 32) <= method.chunk_blocks;
  return method.rows_stay() && one_pass ? 2 * method.rows : method.rows;
}

// Panels that fit a group if each has `blocks` k-blocks, a multiple of panels_per_tile.
inline int64_t panels_in_l2(const Method& method, int64_t blocks) {
  const int64_t panels = kGroupBytes / (1024 * method.type_bytes * larger(blocks, 4));
  return larger(panels / method.panels_per_tile, 1) * method.panels_per_tile;
}

// `whole_units`: no pass ends within a unit of a quantised panel, which is two k-blocks.
inline Passes passes_of(int64_t blocks, int64_t chunk_blocks, bool whole_units) {
  if (blocks <= chunk_blocks) return {1, blocks};
  const int64_t even = ceil_div(blocks, ceil_div(blocks, chunk_blocks));
  const int64_t each = whole_units ? round_up(even, 2) : even;
  return {ceil_div(blocks, each), each};
}

inline XSource x_source(const Method& method, const LayerCall& call, int64_t rows, bool shared) {
  const Panels& first = call.shrink.n ? call.shrink : call.expand;
  const bool only_codes = first.bits && !call.adapter_shrink.n;
  if (method.fixed_point && only_codes && !shared) return XSource::in_place;
  const bool whole_blocks = !method.tile_panels || call.K % 32 == 0;
  const bool half_tile = method.tiles && rows > 16 && rows < 32;
  // Rows a multiple of 4096 bytes apart evict each other: they share one set of L1.
  const bool rows_collide = rows > 4 && call.ldx * method.kept_bytes % 4096 == 0;
  if (method.keeps_type && whole_blocks && !half_tile && !rows_collide && !call.sorts_x())
    return XSource::in_place;
  const bool before_shrink = shared || call.sorts_x() || call.shrink.n == 0;
  return before_shrink ? XSource::whole_copy : XSource::chunk_copy;
}

// Row tiles first writes y in long runs, panels first 128 bytes of one row after the other
// (float32, M = 61, K = 194, N = 4982, r = 44: 0.53 ms instead of 1.1).
inline bool takes_row_tiles_first(const Method& method, const LayerCall& call, int64_t rows,
                                  bool shared) {
  if (method.rows_stay()) return !shared;
  return !method.tiles && rows > 32 && expand_blocks(call) <= kRowTilesFirstBlocks;
}

inline int64_t expand_group(const Method& method, const LayerCall& call, const BlockPlan& plan) {
  if (plan.row_tiles_first) return panels_in_l2(method, expand_blocks(call));
  if (plan.shared || !plan.merges_pivots) return kUnlimited;
  const int64_t panels = kGroupOutputBytes / (plan.rows * 32 * method.type_bytes);
  return larger(panels / method.panels_per_tile, 1) * method.panels_per_tile;
}

// `shared`: the block holds all rows of a call with few.
inline BlockPlan plan_block(const Method& method, const LayerCall& call, int64_t rows,
                            bool shared) {
  BlockPlan plan{};
  plan.rows = rows, plan.shared = shared;
  plan.row_tiles_first = takes_row_tiles_first(method, call, rows, shared);
  plan.finishes_row_tiles = plan.row_tiles_first && !shared;
  plan.x = x_source(method, call, rows, shared);
  plan.fixed_point = call.is_quantized() && (shared || method.fixed_point);
  plan.has_h = call.shrink.n > 0;
  plan.merges_pivots = call.merges_pivots();
  plan.h_is_pivots = plan.merges_pivots && method.keeps_type && call.ra == 0;
  plan.adapter_h_apart = plan.merges_pivots && call.adapter == Adapter::joined;
  plan.base_panels = ceil_div(call.shrink.n, 32);
  // A shared block is one pass: its few rows stay in cache whole.
  const int64_t chunk = shared ? kUnlimited : method.chunk_blocks;
  plan.shrink = passes_of(larger(k_blocks(call.shrink), k_blocks(call.adapter_shrink)), chunk,
                          plan.fixed_point);
  // FMA that takes row tiles first sums stretches shorter than a chunk anyway.
  const bool one_pass = plan.row_tiles_first && !method.tiles;
  plan.expand = passes_of(k_blocks(call.expand), one_pass ? kUnlimited : chunk, plan.fixed_point);
  plan.shrink_group =
      method.rows_stay() && !shared ? panels_in_l2(method, plan.shrink.blocks) : kUnlimited;
  plan.expand_group = expand_group(method, call, plan);
  return plan;
}

// The size of even groups of at most `most` of `count` panels: every group reads the rows again, so
// a small last one would be a waste.
inline int64_t even_group(int64_t count, int64_t most) {
  return count ? ceil_div(count, ceil_div(count, most)) : 1;
}

// Blocks of 32 k, an even number of each, of the quantised panels that are widened at a time:
// those of a group that row tiles pass one after another, or of a tile.
inline int64_t widened_blocks(const Method& method, const LayerCall& call, const BlockPlan& plan) {
  const auto panels = [&](int64_t count, int64_t group) {
    return smaller(round_up(count, method.panels_per_tile), group);
  };
  int64_t shrink = 0, expand = 0;
  if (call.shrink.bits)
    shrink = round_up(plan.shrink.blocks, 2) *
             panels(ceil_div(call.shrink.n, 32),
                    method.rows_stay() ? plan.shrink_group : method.panels_per_tile);
  if (call.expand.bits && plan.row_tiles_first)
    expand = round_up(k_blocks(call.expand), 2) * panels(expand_panels(call), plan.expand_group);
  else if (call.expand.bits)
    expand = round_up(plan.expand.blocks, 2) * method.panels_per_tile;
  return larger(shrink, expand);
}

}  // namespace
}  // namespace hylora
