// The second product, y = middle second^T + bias, and the pivoted form's weaving of y.
#pragma once
#include "first.h"

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
  int64_t column, N;
  int count;
  Row bias;

  PairTask() = default;
  PairTask(const B& b, int64_t panel, bool, T*) : column(panel * 32), N(b.d.N) {
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
    const T* next = y + (B::kRowsStay ? 32 : 32 * N);
    for (int i = 0; i < int(sizeof(T)) / 2; i++)
      __builtin_prefetch(next + 64 / int(sizeof(T)) * i, 1, 3);
    if (count == 32)
      store_row(y, sum);
    else
      store_row(y, sum, count);
    y += N;
  }
};

// Panels [begin, end) of a row of y: woven out of the pivots, the others of one panel and of the
// panel before.
template <class T>
struct Weaver {
  const OrderPanel* panels;
  const T* bias;
  int32_t begin, end;
  int ragged;  // columns of the last panel, if it isn't whole

  Weaver() = default;
  Weaver(const Dual& d, int32_t begin, int32_t end)
      : panels(d.order.panels), bias(static_cast<const T*>(d.bias)), begin(begin), end(end),
        ragged(end > begin && end * 32 > d.N ? int(d.N % 32) : 0) {}

  HYLORA_MEMBER void row(const T* before, const T* others, const T* pivots, T* y) const {
    const int32_t whole = end - (ragged > 0);
    for (int32_t p = begin; p < whole; p++)
      weave(panels[p], before, others, pivots + panels[p].pivot0, bias ? bias + p * 32 : nullptr,
            y + p * 32);
    if (ragged) last(before, others, pivots, y + whole * 32);
  }

  // The same where all panels of others stand side by side, behind one that isn't there.
  HYLORA_MEMBER void row_of_all(const T* others, const T* pivots, T* y) const {
    const int32_t whole = end - (ragged > 0);
    for (int32_t p = begin; p < whole; p++) {
      const T* before = others + panels[p].ready * 32;
      weave(panels[p], before, before + 32, pivots + panels[p].pivot0,
            bias ? bias + p * 32 : nullptr, y + p * 32);
    }
    if (!ragged) return;
    const T* before = others + panels[whole].ready * 32;
    last(before, before + 32, pivots, y + whole * 32);
  }

  __attribute__((noinline)) void last(const T* before, const T* others, const T* pivots,
                                      T* y) const {
    const OrderPanel& panel = panels[end - 1];
    T woven[32], added[32] = {};
    for (int i = 0; bias && i < ragged; i++)
      added[i] = bias[(end - 1) * 32 + i];
    weave(panel, before, others, pivots + panel.pivot0, added, woven);
    for (int i = 0; i < ragged; i++)
      y[i] = woven[i];
  }
};

// The rows of one tile of others, and the panels of y that are ready with them. `window` keeps two
// panels of others for every row, even ones on the left.
template <class B>
struct WeaveTask {
  using T = typename B::Type;
  T *y, *others, *window;
  const T* pivots;
  int64_t N, ld_pivots;
  int here;
  Weaver<T> ready;

  WeaveTask() = default;
  WeaveTask(const B& b, int64_t panel, bool writes, T* window)
      : window(window), N(b.d.N), ld_pivots(b.ld_pivots), here(panel % 2 * 32) {
    const int32_t* first = b.d.order.first_ready + panel;
    ready = Weaver<T>(b.d, first[0], first[writes]);
  }
  WeaveTask& at(const B& b, int64_t row) {
    y = static_cast<T*>(b.d.y) + (b.m0 + row) * N;
    pivots = b.pivots_row(row);
    others = window + row * 64;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    store_row(others + here, b.k.row(sums));
    if constexpr (B::kRowsStay) __builtin_prefetch(y + ready.end * 32, 1, 3);
    ready.row(others + (here ^ 32), others + here, pivots, y);
    y += N, pivots += ld_pivots, others += 64;
  }
};

// The rows of one tile of others, kept until a row tile has all of a group of panels: then its rows
// of y are woven one after the other. y is written in long runs, and no tile waits for it.
template <class B>
struct OthersTask {
  using T = typename B::Type;
  T* to;
  int64_t panel;

  OthersTask() = default;
  OthersTask(const B&, int64_t panel, bool, T*) : panel(panel) {}
  OthersTask& at(const B& b, int64_t) {
    to = b.others + (panel - b.group_begin + 1) * 32;
    return *this;
  }

  HYLORA_MEMBER void row(B& b, const float* sums) {
    store_row(to, b.k.row(sums));
    to += b.ld_others;
  }

  // Row tile t has the group of panels [begin, end).
  static void tile_done(B& b, int64_t t, int64_t begin, int64_t end) {
    const Order& order = b.d.order;
    const Weaver<T> weaver(b.d, order.first_ready[begin], order.first_ready[end]);
    for (int64_t row = t * 32; row < b.rows && row < t * 32 + 32; row++) {
      T *others = b.others + (row - t * 32) * b.ld_others, *window = b.window + row * 64;
      if (begin > 0) copy_row_of(others, window);
      weaver.row_of_all(others - begin * 32, b.pivots_row(row),
                        static_cast<T*>(b.d.y) + (b.m0 + row) * b.d.N);
      copy_row_of(window, others + (end - begin) * 32);
    }
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
  const int64_t blocks = ceil_div(d.second.k, 32), tail_blocks = ceil_div(d.second_tail.k, 32);
  const int64_t chunks = blocks > b.chunk ? ceil_div(blocks, b.chunk) : 1;
  const int64_t even = ceil_div(blocks, chunks), tiles = b.row_tiles();
  alignas(64) typename B::Type few_window[kFewRows * 64];
  Pipeline<Task> pipe;
  bool cold = true;  // nobody has fetched the panels

  auto one = [&](int64_t q, int64_t wide, int64_t c, int64_t tile_begin, int64_t tile_end,
                 float* partial) {
    const bool last = c + 1 == chunks;
    const int64_t left = d.second.k - c * even * 32, width = left < even * 32 ? left : even * 32;
    Step<A> steps[2];
    int count =
        b.steps_of(steps, a + c * even * 32, lda, plane, d.second, q, c * even, width, b.split);
    if (last && d.second_tail.n) {
      // In the pivoted form the adapter's matrix starts with the pivots.
      const int64_t tail_panel = b.weaves ? b.r32 + q : q;
      count += b.steps_of(steps + count, a + 32 * b.r32, lda, plane, d.second_tail, tail_panel, 0,
                          d.second_tail.k, b.split_tail());
    }
    const int64_t columns = at_most(d.second.n - q * 32, 32 * wide);
    Task task, right;
    if (last) task = Task(b, q, q >= begin, b.shared ? few_window : b.window);
    if (last && wide == 2) right = Task(b, q + 1, true, b.shared ? few_window : b.window);
    for (int64_t t = tile_begin; t < tile_end; t++) {
      float* sums = partial + (t - tile_begin) * wide * 1024;
      float* to = last ? pipe.template free_tile<B>() : sums;
      Step<A> here[2];
      for (int s = 0; s < count; s++)
        here[s] = steps[s], here[s].a += b.row_of(t) * lda;
      pipe.multiply(b, here, count, c ? sums : nullptr, to, int(b.rows_of(t)), columns,
                    t == 0 && cold);
      if (!last) continue;
      pipe.push(task.at(b, t * 32), to, int(t * 32 - b.row_of(t)), int(b.rows_of(t)));
      if (wide == 1) continue;
      pipe.finish(b);
      pipe.push(right.at(b, t * 32), to + 1024, 0, int(b.rows_of(t)));
    }
  };

  b.k.begin(int(b.rows));
  if (B::kRowsStay && !b.shared) {
    if (b.weaves)  // the table: else every panel of the first row of y waits for its part of it
      for (int64_t p = 0; p < ceil_div(d.N, 32); p++)
        for (size_t at = 0; at < sizeof(OrderPanel); at += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(d.order.panels + p) + at, 0, 2);
    const int64_t group = b.panels_a_group(end - begin, blocks + tail_blocks);
    for (int64_t q0 = begin; q0 < end; q0 += group) {
      const int64_t q1 = q0 + group < end ? q0 + group : end;
      const int64_t next = end - q1 < group ? end - q1 : group;
      pipe.panels_ahead = Fetch(B::panel_at(d.second, q1, 0), next, blocks * 2048, blocks * 2048,
                                (q1 - q0) * tiles * (blocks + tail_blocks));
      b.group_begin = q0;
      for (int64_t t = 0; t < tiles; t++) {
        for (int64_t c = 0; c < chunks; c++)
          for (int64_t q = q0; q < q1; q++)
            one(q, 1, c, t, t + 1, b.partial + (q - q0) * 1024);
        if constexpr (__is_same(Task, OthersTask<B>)) {
          pipe.finish(b);
          Task::tile_done(b, t, q0, q1);
        }
      }
      cold = false;
    }
  } else {
    // A thread that starts in the middle needs the panel of others before its first.
    for (int64_t q = begin - (b.weaves && begin > 0), wide; q < end; q += wide) {
      wide = q < begin ? 1 : panels_a_tile<B>(q, end);
      for (int64_t c = 0; c < chunks; c++)
        one(q, wide, c, 0, tiles, b.partial);
    }
  }
  pipe.finish(b);
  b.k.end();
}

template <class B>
void second_product(B& b, int64_t begin, int64_t end) {
  if (b.weaves && B::kRowsStay && !b.shared)
    output_product<OthersTask<B>>(b, begin, end);
  else if (b.weaves)
    output_product<WeaveTask<B>>(b, begin, end);
  else
    output_product<PairTask<B>>(b, begin, end);
}

// The pivot outputs of a pivoted layer with an adapter: the middle plus the adapter's part.
template <class B>
struct PivotTask {
  typename B::Type* pivots;
  const typename B::A* middle;

  HYLORA_MEMBER void row(B& b, const float* sums) {
    Row sum = b.k.row(sums), base = b.k.get(middle, b.middle_plane);
    for (int i = 0; i < P; i++)
      sum.v[i] += base.v[i];
    store_row(pivots, sum);
    pivots += b.ld_pivots, middle += b.ld_middle;
  }
};

template <class B>
void pivot_outputs(B& b) {
  using A = typename B::A;
  using T = typename B::Type;
  const Dual& d = b.d;
  if (!b.weaves) return;
  if (d.first_tail.n) {
    Pipeline<PivotTask<B>> pipe;
    b.k.begin(int(b.rows));
    for (int64_t p = 0; p < b.r32; p++) {
      Step<A> steps[1];
      const int count = b.steps_of(steps, b.middle + 32 * b.r32, b.ld_middle, b.middle_plane,
                                   d.second_tail, p, 0, d.second_tail.k, b.split);
      for (int64_t t = 0; t < b.row_tiles(); t++) {
        const int64_t row = b.row_of(t);
        Step<A> here[1];
        for (int s = 0; s < count; s++)
          here[s] = steps[s], here[s].a += row * b.ld_middle;
        float* to = pipe.template free_tile<B>();
        pipe.multiply(b, here, count, nullptr, to, int(b.rows_of(t)), 32, false);
        pipe.push({b.pivots_row(row) + p * 32, b.middle + row * b.ld_middle + p * 32}, to, 0,
                  int(b.rows_of(t)));
      }
    }
    pipe.finish(b);
    b.k.end();
  }
  if (d.second.n) return;
  // Rank N: every output is a pivot.
  const T none[32] = {};
  const Weaver<T> all(d, 0, int32_t(ceil_div(d.N, 32)));
  for (int64_t r = 0; r < b.rows; r++)
    all.row(none, none, b.pivots_row(r), static_cast<T*>(d.y) + (b.m0 + r) * d.N);
}

}  // namespace
}  // namespace hylora
