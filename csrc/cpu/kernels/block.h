// A block of rows on its way through both products: how x gets into it, and its rows and panels.
#pragma once
#include "buffers.h"
#include "pipeline.h"

namespace hylora {
namespace {

// bf16 limbs (amx.h) can't hold numbers that aren't finite, and rounding to bf16 could overflow
// the largest ones. A Range watches the numbers that are split.
struct Range {
  V largest{};
  VU wrong{};

  HYLORA_MEMBER void see(const Row& value) {
    for (int i = 0; i < P; i++) {
      VU magnitude = float_as_bits(value.v[i]) & 0x7fffffff;
      wrong |= reinterpret_cast<VU>(magnitude > 0x7f000000);
      V size = bits_as_float(magnitude);
      largest = size > largest ? size : largest;
    }
  }
  float max() const {
    float most = 0;
    for (int j = 0; j < W; j++)
      most = largest[j] > most ? largest[j] : most;
    return most;
  }
  bool has_unfit() const {
    uint32_t any = 0;
    for (int j = 0; j < W; j++)
      any |= wrong[j];
    return any != 0;
  }
};

// K: how to multiply (Fma, Paired, Amx); T: the tensors' type; A: what numbers are kept as.
template <class K, class T>
struct Block {
  using A = typename K::A;
  using Type = T;
  static constexpr bool kTilePanels = __is_same(T, bf16);
  static constexpr bool kLimbs = K::kPlanes > 1;
  static constexpr bool kKeepsType = __is_same(A, T) && !kLimbs;
  static constexpr bool kTiles = K::kTiles;
  static constexpr int kPanelsPerTile = K::kPanelsPerTile;
  static constexpr Method kMethod = {K::kTiles, K::kPlanes,    K::kPanelsPerTile, K::kChunkBlocks,
                                     K::kRows,  kKeepsType,    kTilePanels,       sizeof(T),
                                     sizeof(A), K::kFixedPoint};
  static constexpr bool kRowsStay = kMethod.rows_stay();

  const LayerCall& call;
  const int64_t m0;  // the block's first row of x
  const BlockPlan plan;
  Buffers<A, T> at;
  K k;
  int64_t group_begin = 0;    // the first panel of the group that expand is at
  bool out_of_range = false;  // a number was seen that bf16 limbs can't hold
  // at.widened or at.widened_units holds blocks of 32 k from `block` on of quantised panels from
  // `panel` on.
  struct {
    int64_t panel, block, blocks;
  } widened{};

  Block(const LayerCall& call, int64_t m0, int64_t rows, bool shared)
      : call(call), m0(m0), plan(plan_block(kMethod, call, rows, shared)) {}

  size_t lay_out(char* memory) { return at.lay_out(call, plan, kMethod, memory); }

  // ------------------------------------------------------------------------------------------ rows

  int64_t row_tiles() const { return ceil_div(plan.rows, 32); }

  // AMX multiplies whole tiles: the last tile of a ragged block starts early enough to have 32
  // rows, and only its own rows are finished.
  int64_t row_of(int64_t tile) const {
    return kTiles && plan.rows >= 32 && tile * 32 + 32 > plan.rows ? plan.rows - 32 : tile * 32;
  }
  int64_t rows_of(int64_t tile) const { return smaller(plan.rows - row_of(tile), 32); }

  const T* x_row(int64_t r) const { return static_cast<const T*>(call.x) + (m0 + r) * call.ldx; }
  Rows<A> rows_of_x() const {
    if (plan.x != XSource::in_place) return at.x;
    return {const_cast<A*>(reinterpret_cast<const A*>(x_row(0))), call.ldx, at.x.plane, at.x.fixed};
  }

  T* pivots_row(int64_t r) const {
    const bool one_tile = plan.finishes_row_tiles && call.ra;
    return at.pivots + (one_tile ? r % 32 : r) * at.pivots_stride;
  }
  T* biased_row(int64_t r) const {
    return at.biased_pivots + (plan.shared ? r : r % kMergedRows) * at.pivots_stride;
  }
  // 32 others of the group before, then this group's.
  T* others_row(int64_t r) const {
    return at.others + (plan.finishes_row_tiles ? r % 32 : r) * at.others_stride;
  }

  // ------------------------------------------------------------------------------------- copying x

  void prepare() {
    if (kLimbs)
      for (int64_t r = 0; r < plan.rows; r++)
        at.row_max[r] = 0;
    if (plan.merges_pivots && call.bias)
      sort_columns(call.table, static_cast<const T*>(call.bias),
                   [&](bool is_others, const T* numbers, int64_t column, int) {
                     copy_32(at.bias + (is_others ? 32 * plan.base_panels : 0) + column, numbers);
                   });
    if (call.x_block) return;
    for (int64_t r = 0; plan.fixed_point && r < plan.rows; r++)
      fix_row(x_row(r), call.K, at.x.fixed, r);
    if (plan.x != XSource::whole_copy) return;
    for (int64_t r = 0; r < plan.rows; r++) {
      if (call.sorts_x())
        sort_row(r);
      else
        copy_row(x_row(r), at.x.at(r), call.K, r);
    }
  }

  // Once all columns of h are there: the same as fixed point for a quantised expand.
  void fix_h() {
    if constexpr (__is_same(A, float))
      for (int64_t r = 0; at.h.fixed.data && r < plan.rows; r++)
        fix_row(at.h.at(r), call.expand.k, at.h.fixed, r);
  }

  // Columns [begin, end) of `count` rows of x from row0 on, to the front of its buffer.
  void copy_chunk(int64_t row0, int64_t count, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < count; r++)
      copy_row(x_row(row0 + r) + begin, at.x.at(r), end - begin, row0 + r);
    asm volatile("" ::: "memory");
  }

  // `width` numbers of row r, zero padded to a multiple of 32.
  void copy_row(const T* from, A* to, int64_t width, int64_t r) {
    if constexpr (kKeepsType) {
      int64_t c = 0;
      for (; c + 32 <= width; c += 32)
        copy_32(to + c, from + c);
      for (int64_t i = c; i < round_up(width, 32); i++)
        to[i] = i < width ? from[i] : T{};
      return;
    }
    Range range;
    for (int64_t c = 0; c < width; c += 32) {
      Row value = c + 32 <= width ? load_row(from + c) : load_row(from + c, int(width - c));
      if constexpr (kLimbs) range.see(value);
      k.put(to + c, at.x.plane, value);
    }
    if constexpr (kLimbs) {
      at.row_max[r] = range.max() > at.row_max[r] ? range.max() : at.row_max[r];
      out_of_range |= range.has_unfit();
    }
  }

  // Row r of x, in output order -> its pivots, zero padded to a multiple of 32, then its others.
  void sort_row(int64_t r) {
    sort_columns(call.table, x_row(r),
                 [&](bool is_others, const T* numbers, int64_t column, int count) {
                   const int64_t begin = is_others ? 32 * plan.base_panels : 0;
                   copy_row(numbers, at.x.at(r, begin + column), count, r);
                 });
  }

  // AMX flushes denormals: of a row whose numbers are all tiny the lower limbs would be lost.
  bool fits_limbs() const {
    bool fits = !out_of_range;
    if constexpr (kLimbs)
      for (int64_t r = 0; r < plan.rows; r++)
        fits &= at.row_max[r] == 0 || at.row_max[r] >= 0x1p-60f;
    return fits;
  }

  // ---------------------------------------------------------------------------------------- panels

  // Widens `count` blocks of quantised panels [begin, end) for the terms that follow. `count` may
  // be less than 1: a shorter matrix has no blocks in a pass.
  void widen(const Panels& panels, int64_t begin, int64_t end, int64_t block, int64_t count) {
    if (!panels.bits || plan.shared) return;
    widened = {begin, block, count};
    with_bits(panels.bits, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      for (int64_t p = begin; p < end; p++) {
        const char* panel =
            static_cast<const char*>(panels.data) + p * panel_bytes(kBits, panels.k);
        if (plan.fixed_point)
          widen_units<kBits>(panel, block / 2, widened_units(), widened_unit(p));
        else
          widen_codes<kBits>(panel, block, count, at.widened + (p - begin) * count * 1024);
      }
    });
  }
  int64_t widened_units() const { return ceil_div(widened.blocks, 2); }  // of each panel
  WidenedUnit* widened_unit(int64_t panel) const {
    return at.widened_units + (panel - widened.panel) * widened_units();
  }

  // Not for quantised panels.
  static const char* panel_at(const Panels& panels, int64_t panel, int64_t block) {
    const T* data = static_cast<const T*>(panels.data);
    return reinterpret_cast<const char*>(kTilePanels
                                             ? data + (panel * k_blocks(panels) + block) * 1024
                                             : data + (panel * panels.k + block * 32) * 32);
  }

  // Writes the term `rows` times k-blocks [block, ...) of a panel, `width` numbers of k, to *term.
  // Returns how many terms that is: 0 if width is. `limbs` takes the panel's, where there are any.
  HYLORA_MEMBER int term_of(Term<A>* term, const Rows<A>& rows, const Panels& panels, int64_t panel,
                            int64_t block, int64_t width, bf16* limbs) const {
    if (width <= 0) return 0;
    if (panels.bits && plan.fixed_point) {
      const int64_t bytes = panel_bytes(panels.bits, panels.k);
      *term = {rows.data,
               rows.stride,
               static_cast<const char*>(panels.data) + panel * bytes,
               width,
               0,
               bytes,
               panels.bits,
               !plan.shared,
               rows.fixed};
      if (plan.shared) return 1;
      term->fixed = rows.fixed.from(0, block / 2);
      term->b = widened_unit(panel) + (block - widened.block) / 2;
      term->b_plane = widened_units() * int64_t(sizeof(WidenedUnit));
      return 1;
    }
    const T* numbers = reinterpret_cast<const T*>(panel_at(panels, panel, block));
    int64_t next_panel = panels.k * 32;
    if (panels.bits) {
      next_panel = widened.blocks * 1024;
      numbers = at.widened + (panel - widened.panel) * next_panel + (block - widened.block) * 1024;
    }
    if constexpr (kLimbs) {
      K::split_panel(numbers, width, limbs, at.limb_plane);
      *term = {rows.data, rows.stride, limbs, width, rows.plane, at.limb_plane};
    } else {
      *term = {rows.data, rows.stride, numbers, width, 0, next_panel};
    }
    return 1;
  }
  bf16* base_limbs() const { return at.limbs; }
  bf16* adapter_limbs() const { return at.limbs + K::kPlanes * at.limb_plane; }

  // How many panels the tile from panel p on takes; `end` is not among them.
  static int64_t panels_of_tile(int64_t p, int64_t end) {
    return end - p < kPanelsPerTile ? 1 : kPanelsPerTile;
  }
};

}  // namespace
}  // namespace hylora
