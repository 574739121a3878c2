// The loop around a tile of sums. While one tile is multiplied, the rows of the tile before are
// finished (rounded, stored) and the next panels are fetched. Finishing a tile right after it was
// multiplied would take half of the expand product's time, waiting until AMX's stores can be
// loaded.
#pragma once
#include "fma.h"

namespace hylora {
namespace {

// Cache lines to be fetched into L2, a few at every step of a product: `rows` stretches of `lines`
// lines, `stride` bytes apart.
struct Fetch {
  const char* row = nullptr;
  int64_t stride = 0, rows = 0;
  int64_t lines = 0, line = 0, lines_per_step = 0;

  Fetch() = default;
  // Spreads `rows` times `bytes` over `steps` steps.
  Fetch(const void* from, int64_t rows, int64_t bytes, int64_t stride, int64_t steps)
      : row(static_cast<const char*>(from)), stride(stride), rows(bytes > 0 ? rows : 0),
        lines(ceil_div(bytes, 64)), lines_per_step(ceil_div(rows * lines, larger(steps, 1))) {}

  HYLORA_MEMBER void step() {
    for (int64_t i = 0; i < lines_per_step && rows > 0; i++) {
      __builtin_prefetch(row + line * 64, 0, 2);
      if (++line == lines) line = 0, row += stride, rows--;
    }
  }
};

// The same panels times row tile after row tile, in one pass over k.
template <class FinishRow, class A>
struct TileColumn {
  Term<A> terms[2];          // the base's and the adapter's; of the block's first row
  int count = 0;             // of terms
  int64_t row_stride = 0;    // of the rows that are multiplied; 0: all tiles read the same place
  int64_t columns = 32;      // outputs, at most 32 for each panel
  bool first_pass = true;    // else the sums go on from `partial`
  bool last_pass = true;     // else they are left there
  float* partial = nullptr;  // the sums of the column's first tile
  FinishRow finisher, right_finisher;  // of the panel, and of a second one to the right
  bool is_double = false;              // there is a second one
};

// Two tiles of sums: one is filled while a finisher takes the rows of the other, one after another.
// A finisher's row() must take few instructions, or the processor's reorder window no longer
// reaches the loads of the next tiles (55 instructions a row instead of 15: half the speed).
template <class FinishRow>
struct Pipeline {
  alignas(64) float tiles[2][1024];  // one after the other: a tile of two panels takes both
  int current = 0, row = 0, left = 0;
  const float* sums = nullptr;
  FinishRow finisher;
  Fetch rows_ahead, panels_ahead;

  // A tile that may be filled. Methods with AMX tiles finish rows during multiply(), so the other
  // tile may still be full; the others finish all of them before it.
  template <class B>
  float* free_tile() {
    return tiles[B::kTiles ? current : 0];
  }

  // Rows [begin, end) of a tile that was just filled wait for `next` to finish them.
  void push(const FinishRow& next, const float* tile, int begin, int end) {
    finisher = next;
    row = begin, left = end - begin;
    sums = tile + (begin >> 4) * 512 + (begin & 15) * 16;
    current ^= 1;
  }

  // The same for row tile t of one panel, or of two (right_panel not null): the right one's sums
  // follow the left one's.
  template <class B>
  void push_tile(B& block, int64_t t, const float* tile, FinishRow& panel, FinishRow* right_panel) {
    const int rows = int(block.rows_of(t));
    push(panel.at(block, t * 32), tile, int(t * 32 - block.row_of(t)), rows);
    if (!right_panel) return;
    finish(block);
    push(right_panel->at(block, t * 32), tile + 1024, 0, rows);
  }

  // Finishes `count` of the waiting rows.
  template <class B>
  HYLORA_MEMBER void finish(B& block, int count) {
    if (count > left) count = left;
    left -= count;
    for (; count > 0; count--) {
      finisher.row(block, sums);
      sums += 16;
      if ((++row & 15) == 0) sums += 256;
    }
  }

  template <class B>
  void finish(B& block) {
    asm volatile("" ::: "memory");
    finish(block, 32);
  }

  // to = (from or 0) + the terms, while the waiting rows are finished. Of the tile's 32 or 64
  // columns those from `columns` on hold anything. `cold`: the panel isn't in L2 yet.
  template <class B>
  HYLORA_MEMBER void multiply(B& block, const Term<typename B::A>* terms, int count,
                              const float* from, float* to, int rows, int64_t columns, bool cold) {
    int64_t blocks = 0;
    for (int s = 0; s < count; s++)
      blocks += ceil_div(terms[s].k, 32);
    const int share = B::kTiles && blocks ? int(ceil_div(32, blocks)) : 32;
    if (!blocks) finish(block);
    block.k.tile(terms, count, from, to, rows, columns, cold, [&]() HYLORA_LAMBDA {
      if constexpr (B::kTiles) {
        rows_ahead.step();
        panels_ahead.step();
      }
      finish(block, share);
    });
  }

  // Row tiles [tile_begin, tile_end) of a column.
  template <class B>
  void multiply_column(B& block, TileColumn<FinishRow, typename B::A>& column, int64_t tile_begin,
                       int64_t tile_end, bool cold) {
    for (int64_t t = tile_begin; t < tile_end; t++) {
      float* sums = column.partial + (t - tile_begin) * (column.is_double ? 2048 : 1024);
      float* to = column.last_pass ? free_tile<B>() : sums;
      Term<typename B::A> terms[2];
      for (int s = 0; s < column.count; s++)
        terms[s] = column.terms[s].from(block.row_of(t), column.row_stride);
      multiply(block, terms, column.count, column.first_pass ? nullptr : sums, to,
               int(block.rows_of(t)), column.columns, t == 0 && cold);
      if (column.last_pass)
        push_tile(block, t, to, column.finisher,
                  column.is_double ? &column.right_finisher : nullptr);
    }
  }
};

}  // namespace
}  // namespace hylora
