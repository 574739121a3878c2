// The adapters' gradients: a^T b for an `a` of few columns, the sum running over many rows. b is
// packed a panel at a time as if it were a weight, then it is a tile product like any other.
#pragma once
#include "block.h"
#include "pack.h"

namespace hylora {
namespace {

template <class K, class T>
void thin_with(const Thin& t, int64_t col0, int64_t col1) {
  using A = typename K::A;
  const int64_t count = t.ra + t.sums, padded = round_up(count, 32), M32 = round_up(t.M, 32);
  const int64_t lda = M32 + 64 / int64_t(sizeof(A));
  const size_t a_bytes = size_t(padded * lda) * sizeof(A);
  char* memory = static_cast<char*>(scratch(0, a_bytes + size_t(M32) * 32 * sizeof(T)));
  A* a = reinterpret_cast<A*>(memory);
  T* panel = reinterpret_cast<T*>(memory + a_bytes);
  K k(0);

  for (int64_t i = 0; i < padded; i++)
    for (int64_t m = 0; m < M32; m++) {
      // Row t.ra is all ones: its product is the sum of b's rows.
      const float one = i == t.ra && t.sums ? 1.0f : 0.0f;
      a[i * lda + m] =
          from_float<A>(m >= t.M   ? 0.0f
                        : i < t.ra ? to_float(static_cast<const T*>(t.a)[m * t.lda + i])
                                   : one);
    }

  Step<A> step;
  alignas(64) float tile[1024];
  for (int64_t column = col0; column < col1; column += 32) {
    pack_panel(static_cast<const T*>(t.b) + column, t.n - column, t.M, 1, t.ldb, panel);
    const int width = int(t.n - column < 32 ? t.n - column : 32);
    for (int64_t i = 0; i < count; i += 32) {
      const int rows = int(count - i < 32 ? count - i : 32);
      step = {a + i * lda, lda, panel, 32, t.M, 0, 0};
      asm volatile("" ::: "memory");
      k.begin(rows);
      k.tile(&step, 1, nullptr, tile, rows, width, false, [] {});
      for (int r = 0; r < rows; r++) {
        Row sum = k.row(tile + (r >> 4) * 512 + (r & 15) * 16);
        if (i + r < t.ra)
          for (int j = 0; j < P; j++)
            sum.v[j] *= splat(t.scale);
        store_row(static_cast<T*>(t.c) + (i + r) * t.n + column, sum, width);
      }
      k.end();
    }
  }
}

}  // namespace
}  // namespace hylora
