// The adapter's gradients, a^T b (call.h): few columns of a, and sums over many rows. b is packed
// panel by panel as if it were a weight, which makes each panel a product of a tile like any other.
#pragma once
#include "block.h"
#include "pack.h"

namespace hylora {
namespace {

// Rows of b at a time, few enough that the next panel finds their lines in cache and their pages in
// the TLB (M = 512, n = 1536: 0.27 ms; with all rows at a time 0.39).
constexpr int64_t kGradientRows = 64;

// Writes the transpose of rows [m0, m0 + count) of a; with sums a row of ones follows, whose
// product is the sum of b's rows.
template <class A, class T>
void transpose_rows(const AdapterGradients& call, int64_t m0, int64_t count, int64_t lda, A* to) {
  const A one = from_float<A>(1.0f);
  for (int64_t m = 0; m < count; m++) {
    const T* row = static_cast<const T*>(call.a) + (m0 + m) * call.lda;
    for (int64_t i = 0; i < call.ra; i++) {
      if constexpr (__is_same(A, T))
        to[i * lda + m] = row[i];
      else
        to[i * lda + m] = to_float(row[i]);
    }
    if (call.sums) to[call.ra * lda + m] = one;
  }
  for (int64_t m = count; m < round_up(count, 32); m++)
    for (int64_t i = 0; i < call.ra + call.sums; i++)
      to[i * lda + m] = A{};
}

// K: how to multiply; T: the type of a, b and c.
template <class K, class T>
void adapter_gradients_by(const AdapterGradients& call, int64_t col0, int64_t col1) {
  using A = typename K::A;
  const int64_t count = call.ra + call.sums, groups = ceil_div(count, 32);
  const int64_t panels = ceil_div(col1 - col0, 32);
  const int64_t lda = kGradientRows + 64 / int64_t(sizeof(A));
  const size_t a_bytes = size_t(32 * groups * lda) * sizeof(A);
  const size_t panel_bytes = size_t(kGradientRows) * 32 * sizeof(T);
  char* memory = static_cast<char*>(
      scratch(Scratch::own_work, a_bytes + panel_bytes + size_t(panels * groups) * 4096));
  A* a = reinterpret_cast<A*>(memory);
  T* panel = reinterpret_cast<T*>(memory + a_bytes);
  float* sums = reinterpret_cast<float*>(memory + a_bytes + panel_bytes);
  for (int64_t i = 0; i < 32 * groups * lda; i++)
    a[i] = A{};

  K k;
  k.begin(32);
  for (int64_t m0 = 0; m0 == 0 || m0 < call.M; m0 += kGradientRows) {
    const int64_t rows = call.M - m0 < kGradientRows ? call.M - m0 : kGradientRows;
    transpose_rows<A, T>(call, m0, rows, lda, a);
    // Prefetches the rows in memory order, which is fast; the panels below jump from row to row.
    for (int64_t m = m0; m < m0 + rows; m++)
      for (int64_t column = col0; column < col1; column += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(static_cast<const T*>(call.b) + m * call.ldb + column, 0, 2);
    for (int64_t p = 0; p < panels; p++) {
      const int64_t column = col0 + p * 32, width = call.n - column;
      pack_panel(static_cast<const T*>(call.b) + m0 * call.ldb + column, width, rows, 1, call.ldb,
                 panel);
      asm volatile("" ::: "memory");
      for (int64_t g = 0; g < groups; g++) {
        float* tile = sums + (p * groups + g) * 1024;
        const int64_t left = count - g * 32;
        const Term<A> term = {a + g * 32 * lda, lda, panel, rows};
        k.tile(&term, 1, m0 ? tile : nullptr, tile, int(left < 32 ? left : 32), 32, false, [] {});
      }
    }
  }
  k.end();

  for (int64_t p = 0; p < panels; p++) {
    const int64_t column = col0 + p * 32;
    const int width = int(call.n - column < 32 ? call.n - column : 32);
    for (int64_t i = 0; i < count; i++) {
      Row sum = k.row(sums + (p * groups + i / 32) * 1024 + (i % 32 >> 4) * 512 + (i & 15) * 16);
      if (i < call.ra)
        for (int j = 0; j < P; j++)
          sum.v[j] *= splat(call.scale);
      store_row(static_cast<T*>(call.c) + i * call.n + column, sum, width);
    }
  }
}

}  // namespace
}  // namespace hylora
