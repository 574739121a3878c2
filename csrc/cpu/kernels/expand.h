// The second product, y = middle second^T + bias, and the pivoted form's weaving of y.
#pragma once
#include "shrink.h"

namespace hylora {
namespace {

template <class T>
HYLORA_INLINE Row bias_row(const void* bias, int64_t column, int count) {
  return bias ? load_row(static_cast<const T*>(bias) + column, count) : Row{};
}

// The rows of one tile of y.
template <class B>
struct PairTask {
  using T = typename B::Type;
  T* y;
  int64_t column, N, ahead;
  int count;
  Row bias;

  PairTask() = default;
  PairTask(const B& b, int64_t panel)
      : column(panel * 32), N(b.d.N), ahead(b.rows_first ? 32 * B::kWide : 32 * N) {
    const int64_t left = N - column;
    count = int(left < 32 ? left : 32);
    bias = bias_row<T>(b.d.bias, column, count);
  }
  PairTask& at(const B& b, int64_t row) {
    y = static_cast<T*>(b.d.y) + (b.m0 + row) * N + column;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    Row sum = b.k.row(sums);
    for (int i = 0; i < P; i++)
      sum.v[i] += bias.v[i];
    // y's line in the next tile: waiting for it at the store fills the store buffer.
    const T* next = y + ahead;
    for (int i = 0; i < int(sizeof(T)) / 2; i++)
      __builtin_prefetch(next + 64 / int(sizeof(T)) * i, 1, 3);
    if (count == 32)
      store_row(y, sum);
    else
      store_row(y, sum, count);
    y += N;
  }
};

// The rows of one tile of others, or of pivots with an adapter's part, kept until rows have all of
// a group of panels and are woven: y is written in long runs, and no tile waits for it.
template <class B>
struct WovenTask {
  using A = typename B::A;
  using T = typename B::Type;
  T* to;
  const A* base;  // of pivots, what the adapter's part is added to
  int64_t ld, ld_base, column;
  bool is_pivots;
  Row bias;

  WovenTask() = default;
  WovenTask(const B& b, int64_t panel)
      : ld(b.ld_others), column((panel - b.group_begin + 1) * 32), is_pivots(false) {
    take_bias(b, b.r32 + panel);
  }
  static WovenTask of_pivots(const B& b, int64_t panel) {
    WovenTask task;
    task.ld = b.ld_pivots, task.ld_base = b.ld_middle, task.column = panel * 32;
    task.is_pivots = true;
    task.take_bias(b, panel);
    return task;
  }
  void take_bias(const B& b, int64_t panel) {
    bias = b.d.bias ? load_row(b.bias + panel * 32) : Row{};
  }
  WovenTask& at(const B& b, int64_t row) {
    to = (is_pivots ? b.pivots_row(row) : b.others_row(row)) + column;
    base = is_pivots ? b.middle + row * ld_base + column : nullptr;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    Row sum = b.k.row(sums);
    if (base) {
      const Row more = b.k.get(base, b.middle_plane);
      for (int i = 0; i < P; i++)
        sum.v[i] += more.v[i];
      base += ld_base;
    }
    for (int i = 0; i < P; i++)
      sum.v[i] += bias.v[i];
    store_row(to, sum);
    to += ld;
  }
};

// The pivots of panels [begin, end) of y in row tiles [tile_begin, tile_end), where an adapter adds
// to them.
template <class B>
void pivot_outputs(B& b, Pipeline<WovenTask<B>>& pipe, int64_t begin, int64_t end,
                   int64_t tile_begin, int64_t tile_end) {
  using A = typename B::A;
  const Dual& d = b.d;
  if (d.ra == 0 || begin == end) return;
  const int64_t first = d.order.panels[begin].pivot0 / 32;
  const int64_t last = end * 32 < d.N ? d.order.panels[end].pivot0 : d.order.pivots;
  for (int64_t p = first; p < ceil_div(last, 32); p++) {
    Step<A> steps[1];
    const int count = b.steps_of(steps, b.adapter, b.ld_adapter, b.adapter_plane, d.second_tail, p,
                                 0, d.second_tail.k, b.split);
    WovenTask<B> task = WovenTask<B>::of_pivots(b, p);
    for (int64_t t = tile_begin; t < tile_end; t++) {
      Step<A> here[1];
      for (int s = 0; s < count; s++)
        here[s] = steps[s], here[s].a += b.row_of(t) * b.ld_adapter;
      float* to = pipe.template free_tile<B>();
      pipe.multiply(b, here, count, nullptr, to, int(b.rows_of(t)), 32, t == 0);
      pipe.push_tile(b, t, to, task, nullptr);
    }
  }
}

// Panels [begin, end) of `Rows` rows of y from `row` on; `others` are those from other0 on.
template <int Rows, class B>
HYLORA_INLINE void weave_some(const B& b, int64_t row, int64_t begin, int64_t end, int64_t other0) {
  using T = typename B::Type;
  const OrderPanel* panels = b.d.order.panels;
  const int64_t N = b.d.N, ragged = end * 32 > N ? N % 32 : 0;
  const T *pivots = b.pivots_row(row), *others = b.others_row(row) + 32 - other0;
  if (b.biased) {
    const int64_t from = panels[begin].pivot0 / 32;
    const int64_t to = end * 32 < N ? ceil_div(panels[end].pivot0, 32) : b.r32;
    T* sums = b.biased_row(row);
    for (int64_t p = from; p < to; p++) {
      const Row bias = load_row(b.bias + p * 32);
      for (int r = 0; r < Rows; r++) {
        Row sum = load_row(pivots + r * b.ld_pivots + p * 32);
        for (int i = 0; i < P; i++)
          sum.v[i] += bias.v[i];
        store_row(sums + r * b.ld_pivots + p * 32, sum);
      }
    }
    pivots = sums;
  }
  T* y = static_cast<T*>(b.d.y) + (b.m0 + row) * N;
  for (int64_t p = begin; p < end - (ragged > 0); p++)
    weave<Rows>(panels[p], pivots, b.ld_pivots, others, b.ld_others, y + p * 32, N);
  if (!ragged) return;
  T woven[Rows][32];
  weave<Rows>(panels[end - 1], pivots, b.ld_pivots, others, b.ld_others, woven[0], 32);
  for (int r = 0; r < Rows; r++)
    for (int64_t i = 0; i < ragged; i++)
      y[r * N + (end - 1) * 32 + i] = woven[r][i];
}

template <class B>
HYLORA_APART void weave_rows(const B& b, int64_t row0, int64_t row1, int64_t begin, int64_t end,
                             int64_t other0) {
  if (begin == end) return;
  int64_t row = row0;
  for (; row + kWovenRows <= row1; row += kWovenRows)
    weave_some<kWovenRows>(b, row, begin, end, other0);
  for (; row < row1; row++)
    weave_some<1>(b, row, begin, end, other0);
}

// A group of panels of others on its way into y: which panels of y it makes ready, and what it
// leaves for the next group.
template <class B>
struct Weaving {
  int64_t begin = 0, end = 0;  // panels of y
  int64_t group_begin, group_end;

  void start(const B& b, int64_t q0, int64_t q1) {
    const Order& order = b.d.order;
    const int64_t panels = ceil_div(order.n, 32), there = q1 * 32;
    group_begin = q0, group_end = q1, begin = end;
    while (end < panels &&
           (end + 1 < panels ? order.panels[end + 1].other0 : b.d.second.n) <= there)
      end++;
  }
  void rows(const B& b, int64_t row0, int64_t row1) const {
    if (group_begin > 0)
      for (int64_t r = row0; r < row1; r++)
        copy_row_of(b.others_row(r), b.carried + r * 32);
    weave_rows(b, row0, row1, begin, end, group_begin * 32);
    if (group_end * 32 < b.d.second.n)
      for (int64_t r = row0; r < row1; r++)
        copy_row_of(b.carried + r * 32, b.others_row(r) + (group_end - group_begin) * 32);
  }
};

// Panels [begin, end) of the second matrix, in groups that fit L2, and within a group row tile by
// row tile as in the first product: so rows of y are written in long runs, too. Other ways of
// multiplying take one panel or two at a time.
template <class Task, class B>
void output_product(B& b, int64_t begin, int64_t end) {
  using A = typename B::A;
  const Dual& d = b.d;
  const A* a = b.has_middle ? b.middle : b.straight ? reinterpret_cast<const A*>(b.x_row(0)) : b.x;
  const int64_t lda = b.has_middle ? b.ld_middle : b.straight ? d.ldx : b.ldx;
  const int64_t plane = b.has_middle ? b.middle_plane : b.x_plane;
  const int64_t blocks = ceil_div(d.second.k, 32);
  const int64_t tail_blocks = d.first_tail.n ? ceil_div(d.second_tail.k, 32) : 0;
  // Multiply-adds that go rows first sum shorter stretches than a chunk anyway.
  const bool whole = blocks <= b.chunk || (b.rows_first && !B::kTiles);
  const int64_t chunks = whole ? 1 : ceil_div(blocks, b.chunk);
  const int64_t even = ceil_div(blocks, chunks), tiles = b.row_tiles();
  constexpr bool weaves = __is_same(Task, WovenTask<B>);
  Weaving<B> weaving;
  Pipeline<Task> pipe;
  bool cold = true;  // nobody has fetched the panels

  auto one = [&](int64_t q, int64_t wide, int64_t c, int64_t tile_begin, int64_t tile_end,
                 float* partial) {
    const bool last = c + 1 == chunks;
    const int64_t left = d.second.k - c * even * 32, width = left < even * 32 ? left : even * 32;
    Step<A> steps[2];
    int count =
        b.steps_of(steps, a + c * even * 32, lda, plane, d.second, q, c * even, width, b.split);
    if (last && d.first_tail.n) {
      // In the pivoted form the adapter's matrix starts with the pivots.
      const int64_t tail_panel = b.weaves ? b.r32 + q : q;
      count += b.steps_of(steps + count, a + 32 * b.r32, lda, plane, d.second_tail, tail_panel, 0,
                          d.second_tail.k, b.split_tail());
    }
    const int64_t columns = at_most(d.second.n - q * 32, 32 * wide);
    Task task, right;
    if (last) task = Task(b, q);
    if (last && wide == 2) right = Task(b, q + 1);
    for (int64_t t = tile_begin; t < tile_end; t++) {
      float* sums = partial + (t - tile_begin) * wide * 1024;
      float* to = last ? pipe.template free_tile<B>() : sums;
      Step<A> here[2];
      for (int s = 0; s < count; s++)
        here[s] = steps[s], here[s].a += b.row_of(t) * lda;
      pipe.multiply(b, here, count, c ? sums : nullptr, to, int(b.rows_of(t)), columns,
                    t == 0 && cold);
      if (!last) continue;
      pipe.push_tile(b, t, to, task, wide == 2 ? &right : nullptr);
    }
  };

  // What rows of y will be woven into: else every line would be waited for there (M = 512, K = 576,
  // N = 1536, r = 224: 0.86 of the pair's speed without, 1.04 with).
  auto fetch_y = [&](int64_t row0, int64_t q0, int64_t q1) {
    const int64_t panels = second_panels(d), size = sizeof(typename B::Type);
    const int64_t from = d.N * q0 / panels, to = d.N * q1 / panels;
    const int64_t here = b.rows_first ? at_most(b.rows - row0, 32) : b.rows;
    pipe.rows_ahead = Fetch(static_cast<const char*>(d.y) + ((b.m0 + row0) * d.N + from) * size,
                            here, (to - from) * size, d.N * size,
                            (q1 - q0) * ceil_div(here, 32) * (blocks + tail_blocks));
  };

  b.k.begin(int(b.rows));
  const int64_t group = round_up(b.panels_a_group(end - begin, b.most_outputs_a_group()), B::kWide);
  for (int64_t q0 = begin; q0 < end; q0 += group) {
    const int64_t q1 = q0 + group < end ? q0 + group : end;
    if constexpr (weaves) {
      b.group_begin = b.shared ? 0 : q0;
      if (!b.shared) weaving.start(b, q0, q1);
    }
    if (b.rows_first) {
      const int64_t next = end - q1 < group ? end - q1 : group;
      pipe.panels_ahead = Fetch(B::panel_at(d.second, q1, 0), next, blocks * 2048, blocks * 2048,
                                (q1 - q0) * tiles * (blocks + tail_blocks));
      for (int64_t t = 0; t < tiles; t++) {
        if constexpr (weaves) {
          fetch_y(t * 32, q0, q1);
          if (!b.shared) pivot_outputs(b, pipe, weaving.begin, weaving.end, t, t + 1);
        }
        for (int64_t c = 0; c < chunks; c++)
          for (int64_t q = q0, wide; q < q1; q += wide) {
            wide = panels_a_tile<B>(q, q1);
            one(q, wide, c, t, t + 1, b.partial + (q - q0) * 1024);
          }
        if constexpr (weaves) {
          if (b.shared) continue;
          pipe.finish(b);
          weaving.rows(b, t * 32, at_most(b.rows, t * 32 + 32));
        }
      }
      cold = !B::kTiles;
    } else {
      if constexpr (weaves) {
        fetch_y(0, q0, q1);
        if (!b.shared) pivot_outputs(b, pipe, weaving.begin, weaving.end, 0, tiles);
      }
      for (int64_t q = q0, wide; q < q1; q += wide) {
        wide = panels_a_tile<B>(q, q1);
        for (int64_t c = 0; c < chunks; c++)
          one(q, wide, c, 0, tiles, b.partial);
      }
      if constexpr (weaves)
        if (!b.shared) {
          pipe.finish(b);
          weaving.rows(b, 0, b.rows);
        }
    }
  }
  pipe.finish(b);
  b.k.end();
}

// Pivots of a block, where nothing else is to be done with their tiles at hand.
template <class B>
void pivots_alone(B& b, int64_t tile_begin, int64_t tile_end) {
  Pipeline<WovenTask<B>> pipe;
  b.k.begin(int(b.rows));
  pivot_outputs(b, pipe, 0, ceil_div(b.d.N, 32), tile_begin, tile_end);
  pipe.finish(b);
  b.k.end();
}

template <class B>
void second_product(B& b, int64_t begin, int64_t end) {
  if (!b.weaves) return output_product<PairTask<B>>(b, begin, end);
  if (begin < end) return output_product<WovenTask<B>>(b, begin, end);
  // At rank N there are no others.
  const int64_t step = b.tilewise ? 1 : b.row_tiles();
  for (int64_t t = 0; t < b.row_tiles(); t += step) {
    pivots_alone(b, t, t + step);
    weave_rows(b, t * 32, at_most(b.rows, (t + step) * 32), 0, ceil_div(b.d.N, 32), 0);
  }
}

}  // namespace
}  // namespace hylora
