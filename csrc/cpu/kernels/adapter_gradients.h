// The adapters' gradients: a^T b for an `a` of few columns, the sum running over many rows. b is
// packed a panel at a time as if it were a weight, then it is a tile product like any other.
#pragma once
#include "block.h"
#include "pack.h"

namespace hylora {
namespace {

// Rows of b at a time: few enough that the next panel finds their pages and neighbouring lines
// still at hand (M = 512, n = 1536: 0.27 ms; with all rows at a time 0.39).
constexpr int64_t kThinRows = 64;

// Rows [m0, m0 + count) of a, turned; row t.ra is all ones, so that its product is the sum of b's
// rows.
template <class A, class T>
void turn_rows(const Thin& t, int64_t m0, int64_t count, int64_t lda, A* to) {
  const A one = from_float<A>(1.0f);
  for (int64_t m = 0; m < count; m++) {
    const T* row = static_cast<const T*>(t.a) + (m0 + m) * t.lda;
    for (int64_t i = 0; i < t.ra; i++) {
      if constexpr (__is_same(A, T))
        to[i * lda + m] = row[i];
      else
        to[i * lda + m] = to_float(row[i]);
    }
    if (t.sums) to[t.ra * lda + m] = one;
  }
  for (int64_t m = count; m < round_up(count, 32); m++)
    for (int64_t i = 0; i < t.ra + t.sums; i++)
      to[i * lda + m] = A{};
}

template <class K, class T>
void thin_with(const Thin& t, int64_t col0, int64_t col1) {
  using A = typename K::A;
  const int64_t count = t.ra + t.sums, groups = ceil_div(count, 32);
  const int64_t panels = ceil_div(col1 - col0, 32);
  const int64_t lda = kThinRows + 64 / int64_t(sizeof(A));
  const size_t a_bytes = size_t(32 * groups * lda) * sizeof(A);
  const size_t panel_bytes = size_t(kThinRows) * 32 * sizeof(T);
  char* memory =
      static_cast<char*>(scratch(0, a_bytes + panel_bytes + size_t(panels * groups) * 4096));
  A* a = reinterpret_cast<A*>(memory);
  T* panel = reinterpret_cast<T*>(memory + a_bytes);
  float* sums = reinterpret_cast<float*>(memory + a_bytes + panel_bytes);
  for (int64_t i = 0; i < 32 * groups * lda; i++)
    a[i] = A{};

  K k(0);
  k.begin(32);
  for (int64_t m0 = 0; m0 == 0 || m0 < t.M; m0 += kThinRows) {
    const int64_t rows = t.M - m0 < kThinRows ? t.M - m0 : kThinRows;
    turn_rows<A, T>(t, m0, rows, lda, a);
    // In the order they lie, which memory is fast at; the panels below jump from row to row.
    for (int64_t m = m0; m < m0 + rows; m++)
      for (int64_t column = col0; column < col1; column += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(static_cast<const T*>(t.b) + m * t.ldb + column, 0, 2);
    for (int64_t p = 0; p < panels; p++) {
      const int64_t column = col0 + p * 32, width = t.n - column;
      pack_panel(static_cast<const T*>(t.b) + m0 * t.ldb + column, width, rows, 1, t.ldb, panel);
      asm volatile("" ::: "memory");
      for (int64_t g = 0; g < groups; g++) {
        float* tile = sums + (p * groups + g) * 1024;
        const int64_t left = count - g * 32;
        const Step<A> step = {a + g * 32 * lda, lda, panel, rows};
        k.tile(&step, 1, m0 ? tile : nullptr, tile, int(left < 32 ? left : 32), 32, false, [] {});
      }
    }
  }
  k.end();

  for (int64_t p = 0; p < panels; p++) {
    const int64_t column = col0 + p * 32;
    const int width = int(t.n - column < 32 ? t.n - column : 32);
    for (int64_t i = 0; i < count; i++) {
      Row sum = k.row(sums + (p * groups + i / 32) * 1024 + (i % 32 >> 4) * 512 + (i & 15) * 16);
      if (i < t.ra)
        for (int j = 0; j < P; j++)
          sum.v[j] *= splat(t.scale);
      store_row(static_cast<T*>(t.c) + i * t.n + column, sum, width);
    }
  }
}

}  // namespace
}  // namespace hylora
