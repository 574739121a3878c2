// The shrink product, h = x [SVh; A]^T: rounded once, the adapter's columns scaled by alpha.
#pragma once
#include "block.h"

namespace hylora {
namespace {

// Finishes the rows of one 32-column panel of h.
template <class B>
struct FinishH {
  using A = typename B::A;
  using T = typename B::Type;

  A* to;
  int64_t stride, row_index, panel;
  T* pivots;
  int64_t pivots_stride;
  Row scale, bias;
  VU valid[P];         // the columns that aren't padding
  bool only_rounds;    // nothing below applies
  bool adds_pivots;    // backward: dy's pivots are added to h
  bool keeps_pivots;   // the pivots are kept beside h, with their bias
  bool keeps_adapter;  // the adapter's columns are kept apart, too
  bool emits;          // the adapter's columns are a result of the call (h_a)

  FinishH() = default;
  FinishH(const B& b, int64_t panel)
      : stride(b.at.h.stride), panel(panel), pivots_stride(b.at.pivots_stride) {
    const LayerCall& call = b.call;
    const BlockPlan& plan = b.plan;
    const bool is_base = panel < plan.base_panels;
    adds_pivots = call.sorts_x() && is_base;
    keeps_pivots = plan.merges_pivots && !plan.h_is_pivots && is_base && call.ra == 0;
    const int64_t columns = is_base ? call.shrink.n - panel * 32
                                    : call.adapter_shrink.n - (panel - plan.base_panels) * 32;
    const int64_t adapter_from = call.adapter_column - panel * 32;
    emits = call.h_a && adapter_from < 32 && adapter_from + call.ra > 0;
    keeps_adapter = plan.adapter_h_apart && panel >= call.adapter_column / 32;
    const bool scales = call.ra && adapter_from < 32 && call.alpha != 1.0f;
    only_rounds =
        !B::kLimbs && !adds_pivots && !keeps_adapter && !emits && !scales && columns >= 32;
    bias = keeps_pivots && call.bias ? load_row(b.at.bias + panel * 32) : Row{};
    const VU one = float_as_bits(splat(1.0f));
    const VU alpha = float_as_bits(splat(call.ra ? call.alpha : 1.0f));
    for (int i = 0; i < P; i++) {
      valid[i] = columns_in(i * W, 0, columns);
      const VU scaled = columns_in(i * W, adapter_from, 32);
      scale.v[i] = bits_as_float((alpha & scaled) | (one & ~scaled));
    }
  }

  // Goes to a row of the block, from which row() steps to the next one.
  FinishH& at(const B& b, int64_t row) {
    row_index = row;
    to = b.at.h.at(row, panel * 32);
    if (keeps_pivots) pivots = b.pivots_row(row) + panel * 32;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    Row sum = b.k.row(sums);
    if (!only_rounds) sum = adjusted(b, sum);
    b.k.put(to, b.at.h.plane, sum);
    to += stride, row_index++;
    if (!keeps_pivots) return;
    for (int i = 0; i < P; i++)
      sum.v[i] += bias.v[i];
    store_row(pivots, sum);
    pivots += pivots_stride;
  }

  // Not inlined: row() has to stay short (pipeline.h).
  __attribute__((noinline)) Row adjusted(B& b, Row sum) const {
    if (adds_pivots) {
      const Row pivots_of_dy = b.k.get(b.at.x.at(row_index, panel * 32), b.at.x.plane);
      for (int i = 0; i < P; i++)
        sum.v[i] += pivots_of_dy.v[i];
    }
    // Zero weights alone don't make the padding zero: x may hold Inf, and Inf * 0 is NaN.
    for (int i = 0; i < P; i++)
      sum.v[i] = bits_as_float(float_as_bits(sum.v[i]) & valid[i]);
    if (emits && !b.call.backward) emit(b, sum);  // h_a = x A^T
    for (int i = 0; i < P; i++)
      sum.v[i] *= scale.v[i];
    if (emits && b.call.backward) emit(b, sum);  // dh_a = alpha dy B
    if (keeps_adapter) keep_adapter(b, sum);
    if constexpr (B::kLimbs) {
      Range range;
      range.see(sum);
      b.out_of_range |= range.has_unfit();
    }
    return sum;
  }

  // Zeroes the base's columns first: an Inf in them would be NaN times their zero weights.
  void keep_adapter(B& b, Row sum) const {
    const int64_t first_panel = b.call.adapter_column / 32;
    for (int i = 0; i < P; i++) {
      const VU kept = columns_in(i * W, b.call.adapter_column - panel * 32, 32);
      sum.v[i] = bits_as_float(float_as_bits(sum.v[i]) & kept);
    }
    b.k.put(b.at.adapter_h.at(row_index, (panel - first_panel) * 32), b.at.adapter_h.plane, sum);
  }

  void emit(B& b, const Row& sum) const {
    T rounded[32];
    store_row(rounded, sum);
    T* h_a = static_cast<T*>(b.call.h_a) + (b.m0 + row_index) * b.call.ra;
    for (int c = 0; c < 32; c++) {
      const int64_t j = panel * 32 + c - b.call.adapter_column;
      if (j >= 0 && j < b.call.ra) h_a[j] = rounded[c];
    }
  }
};

// Computes panels of h. The passes over k are outermost, and the sums of unfinished passes are
// spilled to partial_sums.
template <class B>
class Shrink {
  using A = typename B::A;

  B& b;
  const LayerCall& call;
  Pipeline<FinishH<B>> pipe;
  bool cold = true;  // the panels haven't been fetched into L2

  bool copies_chunks() const { return b.plan.x == XSource::chunk_copy; }
  int64_t chunk_begin(int64_t pass) const { return pass * b.plan.shrink.blocks * 32; }
  int64_t chunk_end(int64_t pass) const { return smaller(chunk_begin(pass + 1), call.K); }

  // One pass of row tiles [tile_begin, tile_end) over panel p of h, and the next one if is_double.
  void column(int64_t pass, int64_t p, bool is_double, int64_t tile_begin, int64_t tile_end) {
    const int64_t even = b.plan.shrink.blocks;
    const bool is_base = p < b.plan.base_panels;
    const Panels& panels = is_base ? call.shrink : call.adapter_shrink;
    const int64_t panel = is_base ? p : p - b.plan.base_panels;
    const int64_t block = pass * even, left = panels.k - block * 32;
    if (left <= 0 && pass > 0) return;
    Rows<A> x = b.rows_of_x();
    // A sorted dy starts with the pivots, which the base doesn't multiply.
    if (!copies_chunks()) x.data += block * 32 + (call.sorts_x() && is_base ? pivot_columns() : 0);

    TileColumn<FinishH<B>, A> column;
    column.count =
        b.term_of(column.terms, x, panels, panel, block, smaller(left, even * 32), b.base_limbs());
    column.row_stride = copies_chunks() && B::kRowsStay ? 0 : x.stride;
    column.is_double = is_double;
    column.columns = smaller(panels.n - panel * 32, is_double ? 64 : 32);
    column.first_pass = pass == 0, column.last_pass = left <= even * 32;
    column.partial = b.at.partial_sums;
    if (b.plan.shrink.count > 1)
      column.partial += (p * b.row_tiles() + tile_begin * (is_double ? 2 : 1)) * 1024;
    if (column.last_pass) column.finisher = FinishH<B>(b, p);
    if (column.last_pass && is_double) column.right_finisher = FinishH<B>(b, p + 1);
    pipe.multiply_column(b, column, tile_begin, tile_end, cold);
  }
  int64_t pivot_columns() const { return b.plan.base_panels * 32; }

  // Widens what pass `pass` reads of the base's panels in [begin, end), if they are quantised.
  void widen(int64_t pass, int64_t begin, int64_t end) {
    const int64_t even = b.plan.shrink.blocks, block = pass * even;
    b.widen(call.shrink, begin, smaller(end, b.plan.base_panels), block,
            smaller(even, k_blocks(call.shrink) - block));
  }

  // While panels [p0, p1) are multiplied: fetches the group after them, or the first one of the
  // next pass. The adapter's panels are few, and not fetched.
  void fetch_next_group(int64_t pass, int64_t begin, int64_t p0, int64_t p1, int64_t end,
                        int64_t group) {
    const int64_t even = b.plan.shrink.blocks, blocks = k_blocks(call.shrink);
    const bool same_pass = p1 < end;
    const int64_t p = same_pass ? p1 : begin, block = (same_pass ? pass : pass + 1) * even;
    int64_t count = same_pass ? end - p1 : pass + 1 < b.plan.shrink.count ? group : 0;
    pipe.panels_ahead = {};
    if (p >= b.plan.base_panels || block >= blocks || call.shrink.bits) return;
    count = smaller(smaller(count, group), b.plan.base_panels - p);
    pipe.panels_ahead =
        Fetch(B::panel_at(call.shrink, p, block), count, smaller(even, blocks - block) * 2048,
              blocks * 2048, (p1 - p0) * even * b.row_tiles());
  }

  // For methods whose rows stay: a row tile passes a group of panels, which fits L2, while its 32
  // rows stay in L1; then the next one does.
  void pass_by_row_tiles(int64_t pass, int64_t begin, int64_t end) {
    const int64_t from = chunk_begin(pass), to = chunk_end(pass), tiles = b.row_tiles();
    const int64_t group = even_group(end - begin, b.plan.shrink_group);
    for (int64_t p0 = begin; p0 < end; p0 += group) {
      const int64_t p1 = smaller(p0 + group, end);
      widen(pass, p0, p1);
      fetch_next_group(pass, begin, p0, p1, end, group);
      for (int64_t t = 0; t < tiles; t++) {
        if (copies_chunks()) b.copy_chunk(b.row_of(t), b.rows_of(t), from, to);
        if (t + 1 < tiles && b.plan.x != XSource::whole_copy)
          pipe.rows_ahead = Fetch(b.x_row(b.row_of(t + 1)) + from, 32, (to - from) * 2,
                                  call.ldx * 2, (p1 - p0) * b.plan.shrink.blocks);
        for (int64_t p = p0; p < p1; p++)
          column(pass, p, false, t, t + 1);
      }
      cold = false;
    }
  }

  // For the others: all row tiles pass one panel, or two side by side, then the next.
  void pass_by_panels(int64_t pass, int64_t begin, int64_t end) {
    if (copies_chunks()) b.copy_chunk(0, b.plan.rows, chunk_begin(pass), chunk_end(pass));
    const int64_t base = b.plan.base_panels;
    for (int64_t p = begin, count; p < end; p += count) {
      count = B::panels_of_tile(p, p < base && base < end ? base : end);
      widen(pass, p, p + count);
      column(pass, p, count == 2, 0, b.row_tiles());
    }
  }

 public:
  explicit Shrink(B& b) : b(b), call(b.call) {}

  // Panels [begin, end) of h.
  void run(int64_t begin, int64_t end) {
    b.k.begin(int(b.plan.rows));
    for (int64_t pass = 0; pass < b.plan.shrink.count; pass++) {
      if (B::kRowsStay && !b.plan.shared)
        pass_by_row_tiles(pass, begin, end);
      else
        pass_by_panels(pass, begin, end);
    }
    pipe.finish(b);
    b.k.end();
  }
};

}  // namespace
}  // namespace hylora
