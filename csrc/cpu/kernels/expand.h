// The expand product, y = h [U, B]^T + bias; in the pivoted form it makes the others.
#pragma once
#include "merge.h"
#include "shrink.h"

namespace hylora {
namespace {

// Finishes the rows of one 32-column panel of y.
template <class B>
struct FinishY {
  using T = typename B::Type;

  T* y;
  int64_t column, ldy, next_tile;
  int count;
  Row bias;

  FinishY() = default;
  FinishY(const B& b, int64_t panel) : column(panel * 32), ldy(b.call.ldy) {
    next_tile = b.plan.row_tiles_first ? 32 * B::kPanelsPerTile : 32 * ldy;
    count = int(smaller(b.call.N - column, 32));
    const T* all = static_cast<const T*>(b.call.bias);
    bias = all ? load_row(all + column, count) : Row{};
  }
  FinishY& at(const B& b, int64_t row) {
    y = static_cast<T*>(b.call.y) + (b.m0 + row) * ldy + column;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    Row sum = b.k.row(sums);
    for (int i = 0; i < P; i++)
      sum.v[i] += bias.v[i];
    // Fetches the line of y that the next tile will write: stores to lines that have yet to come
    // would fill the store buffer.
    const T* next = y + next_tile;
    for (int i = 0; i < int(sizeof(T)) / 2; i++)
      __builtin_prefetch(next + 64 / int(sizeof(T)) * i, 1, 3);
    if (count == 32)
      store_row(y, sum);
    else
      store_row(y, sum, count);
    y += ldy;
  }
};

// The finisher policy of the pair form. FinishY writes outputs to y, so nothing is left to do.
template <class B>
struct WriteOutputs {
  using FinishRow = FinishY<B>;
  void start_group(B&, int64_t, int64_t) {}
  void start_tiles(B&, Pipeline<FinishRow>&, int64_t, int64_t, int64_t, int64_t) {}
  void finish_tiles(B&, Pipeline<FinishRow>&, int64_t, int64_t) {}
};

// Computes panels of y (Outputs = WriteOutputs) or of the others (MergeOutputs), in groups that fit
// L2.
template <class Outputs, class B>
class Expand {
  using A = typename B::A;
  using FinishRow = typename Outputs::FinishRow;

  B& b;
  const LayerCall& call;
  const Rows<A> h;  // x where the layer has no h
  Outputs outputs;
  Pipeline<FinishRow> pipe;
  bool cold = true;  // the panels haven't been fetched into L2

  // One pass of row tiles [tile_begin, tile_end) over panel q, and the next one if is_double.
  void column(int64_t pass, int64_t q, bool is_double, int64_t tile_begin, int64_t tile_end,
              float* partial) {
    const int64_t even = b.plan.expand.blocks, begin = pass * even * 32;
    const bool last_pass = pass + 1 == b.plan.expand.count;
    TileColumn<FinishRow, A> column;
    column.count =
        b.term_of(column.terms, {h.data + begin, h.stride, h.plane, h.fixed}, call.expand, q,
                  pass * even, smaller(call.expand.k - begin, even * 32), b.base_limbs());
    if (last_pass && call.adapter == Adapter::separate) {
      // In the pivoted form the adapter's rows of the pivots come first.
      const int64_t panel = b.plan.merges_pivots ? b.plan.base_panels + q : q;
      column.count += b.term_of(column.terms + column.count, b.at.adapter_h, call.adapter_expand,
                                panel, 0, call.adapter_expand.k, b.adapter_limbs());
    }
    column.row_stride = h.stride;
    column.is_double = is_double;
    column.columns = smaller(call.expand.n - q * 32, is_double ? 64 : 32);
    column.first_pass = pass == 0, column.last_pass = last_pass;
    column.partial = partial;
    if (last_pass) column.finisher = FinishRow(b, q);
    if (last_pass && is_double) column.right_finisher = FinishRow(b, q + 1);
    pipe.multiply_column(b, column, tile_begin, tile_end, cold);
  }

  // A row tile passes all panels of the group, then the next one does.
  void group_by_row_tiles(int64_t q0, int64_t q1, int64_t next_panels) {
    const int64_t tiles = b.row_tiles(), blocks = k_blocks(call.expand);
    if (!call.expand.bits)
      pipe.panels_ahead = Fetch(B::panel_at(call.expand, q1, 0), next_panels, blocks * 2048,
                                blocks * 2048, (q1 - q0) * tiles * expand_blocks(call));
    b.widen(call.expand, q0, q1, 0, blocks);
    for (int64_t t = 0; t < tiles; t++) {
      outputs.start_tiles(b, pipe, t, t + 1, q0, q1);
      for (int64_t pass = 0; pass < b.plan.expand.count; pass++)
        for (int64_t q = q0, count; q < q1; q += count) {
          count = B::panels_of_tile(q, q1);
          column(pass, q, count == 2, t, t + 1, b.at.partial_sums + (q - q0) * 1024);
        }
      outputs.finish_tiles(b, pipe, t, t + 1);
    }
    cold = !B::kTiles;
  }

  // All row tiles pass one panel, or two side by side, then the next.
  void group_by_panels(int64_t q0, int64_t q1) {
    outputs.start_tiles(b, pipe, 0, b.row_tiles(), q0, q1);
    for (int64_t q = q0, count; q < q1; q += count) {
      count = B::panels_of_tile(q, q1);
      for (int64_t pass = 0, even = b.plan.expand.blocks; pass < b.plan.expand.count; pass++) {
        b.widen(call.expand, q, q + count, pass * even,
                smaller(even, k_blocks(call.expand) - pass * even));
        column(pass, q, count == 2, 0, b.row_tiles(), b.at.partial_sums);
      }
    }
    outputs.finish_tiles(b, pipe, 0, b.row_tiles());
  }

 public:
  explicit Expand(B& b) : b(b), call(b.call), h(b.plan.has_h ? b.at.h : b.rows_of_x()) {}

  // Panels [begin, end).
  void run(int64_t begin, int64_t end) {
    b.k.begin(int(b.plan.rows));
    const int64_t group = round_up(even_group(end - begin, b.plan.expand_group), B::kPanelsPerTile);
    for (int64_t q0 = begin; q0 < end; q0 += group) {
      const int64_t q1 = smaller(q0 + group, end);
      outputs.start_group(b, q0, q1);
      if (b.plan.row_tiles_first)
        group_by_row_tiles(q0, q1, smaller(end - q1, group));
      else
        group_by_panels(q0, q1);
    }
    pipe.finish(b);
    b.k.end();
  }
};

// Panels [begin, end) of y or of the others.
template <class B>
void expand_product(B& b, int64_t begin, int64_t end) {
  if (!b.plan.merges_pivots) return Expand<WriteOutputs<B>, B>(b).run(begin, end);
  if (begin < end) return Expand<MergeOutputs<B>, B>(b).run(begin, end);
  // At rank N there are no others.
  const int64_t step = b.plan.finishes_row_tiles ? 1 : b.row_tiles();
  for (int64_t t = 0; t < b.row_tiles(); t += step) {
    add_adapter_to_all_pivots(b, t, t + step);
    merge_rows(b, t * 32, smaller(b.plan.rows, (t + step) * 32), 0, ceil_div(b.call.N, 32), 0);
  }
}

}  // namespace
}  // namespace hylora
