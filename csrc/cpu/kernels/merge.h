// The pivoted form's y: the others that expand made and the pivots, with their adapter's part,
// merged row by row. So y is written in long runs, and no AMX tile waits for it.
#pragma once
#include "block.h"

namespace hylora {
namespace {

// Finishes the rows of one panel of others, or of pivots that an adapter adds to. They are kept in
// the block's buffers until a group of panels is complete.
template <class B>
struct FinishUnmerged {
  using A = typename B::A;
  using T = typename B::Type;

  T* to;
  const A* h;  // pivots: what the adapter's part is added to
  int64_t stride, h_stride, column;
  bool is_pivots;
  Row bias;

  FinishUnmerged() = default;
  FinishUnmerged(const B& b, int64_t panel)
      : stride(b.at.others_stride), column((panel - b.group_begin + 1) * 32), is_pivots(false) {
    load_bias(b, b.plan.base_panels + panel);
  }
  static FinishUnmerged of_pivots(const B& b, int64_t panel) {
    FinishUnmerged finisher;
    finisher.stride = b.at.pivots_stride, finisher.h_stride = b.at.h.stride;
    finisher.column = panel * 32, finisher.is_pivots = true;
    finisher.load_bias(b, panel);
    return finisher;
  }
  void load_bias(const B& b, int64_t panel) {
    bias = b.call.bias ? load_row(b.at.bias + panel * 32) : Row{};
  }

  FinishUnmerged& at(const B& b, int64_t row) {
    to = (is_pivots ? b.pivots_row(row) : b.others_row(row)) + column;
    h = is_pivots ? b.at.h.at(row, column) : nullptr;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    Row sum = b.k.row(sums);
    if (h) {
      const Row base = b.k.get(h, b.at.h.plane);
      for (int i = 0; i < P; i++)
        sum.v[i] += base.v[i];
      h += h_stride;
    }
    for (int i = 0; i < P; i++)
      sum.v[i] += bias.v[i];
    store_row(to, sum);
    to += stride;
  }
};

// Adds the adapter's part to the pivots in panels [begin, end) of y, in the given row tiles.
template <class B>
void add_adapter_to_pivots(B& b, Pipeline<FinishUnmerged<B>>& pipe, int64_t begin, int64_t end,
                           int64_t tile_begin, int64_t tile_end) {
  const LayerCall& call = b.call;
  if (call.ra == 0 || begin == end) return;
  const int64_t first = call.table.panels[begin].pivot0;
  const int64_t last = end * 32 < call.N ? call.table.panels[end].pivot0 : call.table.pivots;
  for (int64_t p = first / 32; p < ceil_div(last, 32); p++) {
    TileColumn<FinishUnmerged<B>, typename B::A> column;
    column.count = b.term_of(column.terms, b.at.adapter_h, call.adapter_expand, p, 0,
                             call.adapter_expand.k, b.base_limbs());
    column.row_stride = b.at.adapter_h.stride;
    column.finisher = FinishUnmerged<B>::of_pivots(b, p);
    pipe.multiply_column(b, column, tile_begin, tile_end, true);
  }
}

// The pivots of `Count` rows from `row` on with their bias, for panels [begin, end) of y. h is
// those pivots and has to stay without it, so they are copied.
template <int Count, class B>
HYLORA_INLINE const typename B::Type* biased_pivots(const B& b, int64_t row, int64_t begin,
                                                    int64_t end) {
  const PivotPanel* panels = b.call.table.panels;
  const auto* pivots = b.pivots_row(row);
  auto* to = b.biased_row(row);
  const int64_t last = end * 32 < b.call.N ? ceil_div(panels[end].pivot0, 32) : b.plan.base_panels;
  for (int64_t p = panels[begin].pivot0 / 32; p < last; p++) {
    const Row bias = load_row(b.at.bias + p * 32);
    for (int r = 0; r < Count; r++) {
      Row sum = load_row(pivots + r * b.at.pivots_stride + p * 32);
      for (int i = 0; i < P; i++)
        sum.v[i] += bias.v[i];
      store_row(to + r * b.at.pivots_stride + p * 32, sum);
    }
  }
  return to;
}

// Merges panels [begin, end) of y, of `Count` rows from `row` on. `other0` is the first of the
// others in the buffer.
template <int Count, class B>
HYLORA_INLINE void merge_some_rows(const B& b, int64_t row, int64_t begin, int64_t end,
                                   int64_t other0) {
  using T = typename B::Type;
  const PivotPanel* panels = b.call.table.panels;
  const int64_t N = b.call.N, ldy = b.call.ldy, ragged = end * 32 > N ? N % 32 : 0;
  const int64_t pivots_stride = b.at.pivots_stride, others_stride = b.at.others_stride;
  const T* others = b.others_row(row) + 32 - other0;
  const T* pivots =
      b.at.biased_pivots ? biased_pivots<Count>(b, row, begin, end) : b.pivots_row(row);
  T* y = static_cast<T*>(b.call.y) + (b.m0 + row) * ldy;
  for (int64_t p = begin; p < end - (ragged > 0); p++)
    merge_pivots<Count>(panels[p], pivots, pivots_stride, others, others_stride, y + p * 32, ldy);
  if (!ragged) return;
  T merged[Count][32];
  merge_pivots<Count>(panels[end - 1], pivots, pivots_stride, others, others_stride, merged[0], 32);
  for (int r = 0; r < Count; r++)
    for (int64_t i = 0; i < ragged; i++)
      y[r * ldy + (end - 1) * 32 + i] = merged[r][i];
}

template <class B>
HYLORA_APART void merge_rows(const B& b, int64_t row0, int64_t row1, int64_t begin, int64_t end,
                             int64_t other0) {
  if (begin == end) return;
  int64_t row = row0;
  for (; row + kMergedRows <= row1; row += kMergedRows)
    merge_some_rows<kMergedRows>(b, row, begin, end, other0);
  for (; row < row1; row++)
    merge_some_rows<1>(b, row, begin, end, other0);
}

// The finisher policy of the pivoted form (the pair form's is WriteOutputs in expand.h). After each
// group of panels of others, the panels of y that are complete by then are merged, and the others
// that later panels need are carried over. With few rows, threads share the block and merge after
// all panels are made.
template <class B>
struct MergeOutputs {
  using FinishRow = FinishUnmerged<B>;

  int64_t group_begin = 0, group_end = 0;  // panels of others
  int64_t begin = 0, end = 0;              // panels of y that they complete

  void start_group(B& b, int64_t q0, int64_t q1) {
    b.group_begin = b.plan.shared ? 0 : q0;
    if (b.plan.shared) return;
    const PivotTable& table = b.call.table;
    const int64_t panels = ceil_div(table.n, 32), made = q1 * 32;
    group_begin = q0, group_end = q1, begin = end;
    while (end < panels &&
           (end + 1 < panels ? table.panels[end + 1].other0 : b.call.expand.n) <= made)
      end++;
  }

  // Before the group's panels of row tiles [tile_begin, tile_end).
  void start_tiles(B& b, Pipeline<FinishRow>& pipe, int64_t tile_begin, int64_t tile_end,
                   int64_t q0, int64_t q1) {
    fetch_y(b, pipe, tile_begin, tile_end, q0, q1);
    if (!b.plan.shared) add_adapter_to_pivots(b, pipe, begin, end, tile_begin, tile_end);
  }

  // After them.
  void finish_tiles(B& b, Pipeline<FinishRow>& pipe, int64_t tile_begin, int64_t tile_end) {
    if (b.plan.shared) return;
    pipe.finish(b);
    const int64_t row0 = tile_begin * 32, row1 = smaller(b.plan.rows, tile_end * 32);
    if (group_begin > 0)
      for (int64_t r = row0; r < row1; r++)
        copy_32(b.others_row(r), b.at.previous_others + r * 32);
    merge_rows(b, row0, row1, begin, end, group_begin * 32);
    if (group_end * 32 < b.call.expand.n)
      for (int64_t r = row0; r < row1; r++)
        copy_32(b.at.previous_others + r * 32, b.others_row(r) + (group_end - group_begin) * 32);
  }

  // Fetches the lines of y that the merge will write, or it would wait for each of them (M = 512,
  // K = 576, N = 1536, r = 224: 0.86 of the pair form's speed without, 1.04 with).
  static void fetch_y(B& b, Pipeline<FinishRow>& pipe, int64_t tile_begin, int64_t tile_end,
                      int64_t q0, int64_t q1) {
    const int64_t N = b.call.N, ldy = b.call.ldy, size = sizeof(typename B::Type);
    const int64_t panels = expand_panels(b.call);
    const int64_t from = N * q0 / panels, to = N * q1 / panels, row0 = tile_begin * 32;
    const int64_t rows = smaller(b.plan.rows - row0, (tile_end - tile_begin) * 32);
    pipe.rows_ahead = Fetch(
        static_cast<const char*>(b.call.y) + ((b.m0 + row0) * ldy + from) * size, rows,
        (to - from) * size, ldy * size, (q1 - q0) * ceil_div(rows, 32) * expand_blocks(b.call));
  }
};

// Adds the adapter's part to all pivots of row tiles [tile_begin, tile_end), outside of an expand
// product: before a shared block's, or at rank N, where there are no others and hence none.
template <class B>
void add_adapter_to_all_pivots(B& b, int64_t tile_begin, int64_t tile_end) {
  Pipeline<FinishUnmerged<B>> pipe;
  b.k.begin(int(b.plan.rows));
  add_adapter_to_pivots(b, pipe, 0, ceil_div(b.call.N, 32), tile_begin, tile_end);
  pipe.finish(b);
  b.k.end();
}

}  // namespace
}  // namespace hylora
