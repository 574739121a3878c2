// The first product, middle = x first^T: rounded once, the adapter's columns scaled by alpha.
#pragma once
#include "block.h"

namespace hylora {
namespace {

// The rows of one tile of the middle, from the first on.
template <class B>
struct MiddleTask {
  using A = typename B::A;
  using T = typename B::Type;

  bool bare;  // nothing to do but round
  A* to;
  int64_t ld, row_at, panel;
  T* pivots;
  int64_t ld_pivots;
  Row scale, bias;
  VU keep[P];
  bool adds_pivots, keeps_pivots, keeps_adapter, emits;

  MiddleTask() = default;
  MiddleTask(const B& b, int64_t panel) : ld(b.ld_middle), panel(panel), ld_pivots(b.ld_pivots) {
    const Dual& d = b.d;
    const bool base = panel < b.r32;
    adds_pivots = d.sorts_input && base;
    keeps_pivots = b.weaves && !b.pivots_in_middle && base && d.ra == 0;
    const int64_t valid = base ? d.first.n - panel * 32 : d.first_tail.n - (panel - b.r32) * 32;
    const int64_t adapter_from = d.tail_at - panel * 32;
    emits = d.tail && adapter_from < 32 && adapter_from + d.ra > 0;
    keeps_adapter = b.joined_pivots && panel >= d.tail_at / 32;
    const bool scales = d.ra && adapter_from < 32 && d.alpha != 1.0f;
    bare = !B::kSplit && !adds_pivots && !keeps_adapter && !emits && !scales && valid >= 32;
    bias = keeps_pivots && d.bias ? load_row(b.bias + panel * 32) : Row{};
    const VU one = float_as_bits(splat(1.0f)), alpha = float_as_bits(splat(d.ra ? d.alpha : 1.0f));
    for (int i = 0; i < P; i++) {
      keep[i] = columns_in(i * W, 0, valid);
      const VU scaled = columns_in(i * W, adapter_from, 32);
      scale.v[i] = bits_as_float((alpha & scaled) | (one & ~scaled));
    }
  }
  MiddleTask& at(const B& b, int64_t row) {
    row_at = row;
    to = b.middle + row * ld + panel * 32;
    if (keeps_pivots) pivots = b.pivots_row(row) + panel * 32;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    Row sum = b.k.row(sums);
    if (!bare) sum = dressed(b, sum);
    b.k.put(to, b.middle_plane, sum);
    to += ld, row_at++;
    if (!keeps_pivots) return;
    for (int i = 0; i < P; i++)
      sum.v[i] += bias.v[i];
    store_row(pivots, sum);
    pivots += ld_pivots;
  }

  __attribute__((noinline)) Row dressed(B& b, Row sum) const {
    if (adds_pivots) {
      Row identity = b.k.get(b.x + row_at * b.ldx + panel * 32, b.x_plane);
      for (int i = 0; i < P; i++)
        sum.v[i] += identity.v[i];
    }
    // The padding is zeroed, not left to zero weights: x may hold Inf, and Inf * 0 is NaN.
    for (int i = 0; i < P; i++)
      sum.v[i] = bits_as_float(float_as_bits(sum.v[i]) & keep[i]);
    if (emits && !b.d.emit_scaled) emit(b, sum);
    for (int i = 0; i < P; i++)
      sum.v[i] *= scale.v[i];
    if (emits && b.d.emit_scaled) emit(b, sum);
    if (keeps_adapter) keep_adapter(b, sum);
    if constexpr (B::kSplit) {
      typename B::Range range;
      range.see(sum);
      b.out_of_range |= range.unfit();
    }
    return sum;
  }

  // Alone, for what is infinite in the base's columns would be NaN times their zero weights.
  void keep_adapter(B& b, Row sum) const {
    const int64_t base_panels = b.d.tail_at / 32;
    for (int i = 0; i < P; i++)
      sum.v[i] =
          bits_as_float(float_as_bits(sum.v[i]) & columns_in(i * W, b.d.tail_at - panel * 32, 32));
    b.k.put(b.adapter + row_at * b.ld_adapter + (panel - base_panels) * 32, b.adapter_plane, sum);
  }

  void emit(B& b, const Row& sum) const {
    T rounded[32];
    store_row(rounded, sum);
    T* tail = static_cast<T*>(b.d.tail) + (b.m0 + row_at) * b.d.ra;
    for (int c = 0; c < 32; c++) {
      const int64_t j = panel * 32 + c - b.d.tail_at;
      if (j >= 0 && j < b.d.ra) tail[j] = rounded[c];
    }
  }
};

// Panels [begin, end) of the middle. With many rows the k-chunks are outermost, and the sums of
// unfinished chunks are spilled. Within a chunk tiles go row tile by row tile: its rows, 32 of
// them, stay in L1 while the panels, a group that fits L2, stream past. Other ways of multiplying
// keep the panel instead and let the rows stream.
template <class B>
void first_product(B& b, int64_t begin, int64_t end) {
  using A = typename B::A;
  const Dual& d = b.d;
  const int64_t longest = ceil_div(d.first.k > d.first_tail.k ? d.first.k : d.first_tail.k, 32);
  const int64_t chunks = longest > b.chunk ? ceil_div(longest, b.chunk) : 1;
  const int64_t even = ceil_div(longest, chunks), tiles = b.row_tiles();
  const bool copies = !b.straight && !b.whole_x;
  Pipeline<MiddleTask<B>> pipe;
  bool cold = true;  // nobody has fetched the panels

  auto one = [&](int64_t c, int64_t p, int64_t wide, int64_t tile_begin, int64_t tile_end) {
    const bool base = p < b.r32;
    const Panels& panels = base ? d.first : d.first_tail;
    const int64_t panel = base ? p : p - b.r32;
    const int64_t block = c * even, left = panels.k - block * 32;
    const int64_t width = left < even * 32 ? left : even * 32;
    const bool last = left <= even * 32;
    if (left <= 0 && c > 0) return;
    const A* a = b.straight ? reinterpret_cast<const A*>(b.x_row(0)) : b.x;
    // The sorted input starts with the pivots, which the base doesn't multiply.
    if (!copies) a += block * 32 + (d.sorts_input && base ? b.r32 * 32 : 0);
    const int64_t lda = b.straight ? d.ldx : b.ldx;
    Step<A> steps[1];
    const int count = b.steps_of(steps, a, lda, b.x_plane, panels, panel, block, width, b.split);
    const int64_t columns = at_most(panels.n - panel * 32, 32 * wide);
    MiddleTask<B> task(b, p), right;
    if (wide == 2) right = MiddleTask<B>(b, p + 1);
    for (int64_t t = tile_begin; t < tile_end; t++) {
      float* sums = b.partial + (chunks > 1 ? p * tiles + t * wide : 0) * 1024;
      float* to = last ? pipe.template free_tile<B>() : sums;
      Step<A> here[1];
      const int64_t row = copies && B::kRowsStay ? 0 : b.row_of(t);
      for (int s = 0; s < count; s++)
        here[s] = steps[s], here[s].a += row * lda;
      pipe.multiply(b, here, count, c ? sums : nullptr, to, int(b.rows_of(t)), columns,
                    t == 0 && cold);
      if (!last) continue;
      pipe.push_tile(b, t, to, task, wide == 2 ? &right : nullptr);
    }
  };

  b.k.begin(int(b.rows));
  const int64_t group = b.panels_a_group(end - begin, b.panels_in_l2(even));
  for (int64_t c = 0; c < chunks; c++) {
    const int64_t from = c * even * 32, to = from + even * 32 < d.K ? from + even * 32 : d.K;
    if (B::kRowsStay && !b.shared) {
      for (int64_t p0 = begin; p0 < end; p0 += group) {
        const int64_t p1 = p0 + group < end ? p0 + group : end, steps = (p1 - p0) * even;
        const bool more = p1 < end;
        pipe.panels_ahead =
            b.fetch_panels(more ? p1 : begin, more ? c * even : (c + 1) * even, even,
                           more             ? end - p1
                           : c + 1 < chunks ? group
                                            : 0,
                           group, steps * tiles);
        for (int64_t t = 0; t < tiles; t++) {
          if (copies) b.copy_columns(b.row_of(t), b.rows_of(t), from, to);
          if (t + 1 < tiles && !b.whole_x)
            pipe.rows_ahead =
                Fetch(b.x_row(b.row_of(t + 1)) + from, 32, (to - from) * 2, d.ldx * 2, steps);
          for (int64_t p = p0; p < p1; p++)
            one(c, p, 1, t, t + 1);
        }
        cold = false;
      }
    } else {
      if (copies) b.copy_columns(0, b.rows, from, to);
      for (int64_t p = begin, wide; p < end; p += wide) {
        wide = panels_a_tile<B>(p, p < b.r32 && b.r32 < end ? b.r32 : end);
        one(c, p, wide, 0, tiles);
      }
    }
  }
  pipe.finish(b);
  b.k.end();
}

}  // namespace
}  // namespace hylora
