// The loop around a tile: its sums grow while the rows of the tile before are finished and what
// comes next is fetched. Finished at once, a tile's rows cost half of the second product, waiting
// for the sums to leave for memory and come back.
#pragma once
#include "fma.h"

namespace hylora {
namespace {

// Cache lines on their way into L2, a few at every step of a product: `rows` stretches of `lines`
// lines, `stride` bytes apart.
struct Fetch {
  const char* row = nullptr;
  int64_t stride = 0, rows = 0;
  int64_t lines = 0, at = 0, a_step = 0;

  Fetch() = default;
  Fetch(const void* from, int64_t rows, int64_t bytes, int64_t stride, int64_t steps)
      : row(static_cast<const char*>(from)), stride(stride), rows(bytes > 0 ? rows : 0),
        lines(ceil_div(bytes, 64)), a_step(ceil_div(rows * lines, steps > 0 ? steps : 1)) {}

  HYLORA_MEMBER void step() {
    for (int64_t i = 0; i < a_step && rows > 0; i++) {
      __builtin_prefetch(row + at * 64, 0, 2);
      if (++at == lines) at = 0, row += stride, rows--;
    }
  }
};

// Two tiles of sums: one is being filled while the rows of the other are finished by its task. A
// row has to cost few instructions: what the processor can look ahead by is what it needs to load
// the next tiles in time (55 instructions a row instead of 15: half the speed).
template <class Task>
struct Pipeline {
  alignas(64) float tiles[2][1024];  // side by side, for a tile of two panels takes both
  int current = 0, row = 0, left = 0;
  const float* sums = nullptr;
  Task task;
  Fetch rows_ahead, panels_ahead;

  // Where rows may still wait only if they are finished on the way; else both tiles are free.
  template <class B>
  float* free_tile() {
    return tiles[B::kTiles ? current : 0];
  }

  // A tile just filled: its rows [begin, end) are for `next` to finish.
  void push(const Task& next, const float* tile, int begin, int end) {
    task = next;
    row = begin, left = end - begin;
    sums = tile + (begin >> 4) * 512 + (begin & 15) * 16;
    current ^= 1;
  }

  // Row tile t of one panel just filled, or of two: the right one's lies behind the left one's.
  template <class B>
  void push_tile(B& block, int64_t t, const float* tile, Task& left_task, Task* right_task) {
    const int rows = int(block.rows_of(t));
    push(left_task.at(block, t * 32), tile, int(t * 32 - block.row_of(t)), rows);
    if (!right_task) return;
    finish(block);
    push(right_task->at(block, t * 32), tile + 1024, 0, rows);
  }

  template <class B>
  HYLORA_MEMBER void finish(B& block, int count) {
    if (count > left) count = left;
    left -= count;
    for (; count > 0; count--) {
      task.row(block, sums);
      sums += 16;
      if ((++row & 15) == 0) sums += 256;
    }
  }

  template <class B>
  void finish(B& block) {
    asm volatile("" ::: "memory");
    finish(block, 32);
  }

  // One tile of sums, the waiting rows finished on the way; of its 32 or 64 columns, from `columns`
  // on they are anything. `cold`: the panel isn't in L2 yet.
  template <class B>
  HYLORA_MEMBER void multiply(B& block, const Step<typename B::A>* steps, int count,
                              const float* from, float* to, int rows, int64_t columns, bool cold) {
    int64_t blocks = 0;
    for (int s = 0; s < count; s++)
      blocks += ceil_div(steps[s].k, 32);
    const int share = B::kTiles && blocks ? int(ceil_div(32, blocks)) : 32;
    if (!blocks) finish(block);
    block.k.tile(steps, count, from, to, rows, columns, cold, [&]() HYLORA_LAMBDA {
      if constexpr (B::kTiles) {
        rows_ahead.step();
        panels_ahead.step();
      }
      finish(block, share);
    });
  }
};

}  // namespace
}  // namespace hylora
