// The products in plain fused multiply-adds: rows of floats times a panel, at any vector width.
#pragma once
#include "../params.h"
#include "vector.h"

namespace hylora {
namespace {

// One stretch of k of a 32 x 32 tile: rows of `a` (lda elements apart) times a panel. `k` is exact,
// `blocks` counts started blocks of 32. Rows of a [k][32] panel are ldb apart.
template <class A>
struct Step {
  const A* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  int64_t k;
  int64_t a_plane = 0, b_plane = 0;  // of limbs
};

// Where row r, vector i of a 32 x 32 tile lies: the tile is kept as AMX stores it, four 16 x 16
// quarters.
HYLORA_INLINE int tile_at(int r, int i) {
  int column = i * W;
  return (r >> 4) * 512 + (column >> 4) * 256 + (r & 15) * 16 + (column & 15);
}

// A row of a tile, given where it starts.
HYLORA_INLINE Row tile_row(const float* sums) {
  Row row;
  for (int i = 0; i < P; i++)
    row.v[i] = load(sums + tile_at(0, i));
  return row;
}

// Number k of up to 12 rows, three rows a pointer: the addresses are pointer + 0, 1 or 2 strides,
// so five registers hold them all. (With one offset a row, the compiler reloads 12 of them every
// k.)
template <class A>
struct RowPointers {
  const char* third[4];
  int64_t stride;

  HYLORA_MEMBER RowPointers(const A* a, int64_t lda) : stride(lda * int64_t(sizeof(A))) {
    for (int i = 0; i < 4; i++)
      third[i] = reinterpret_cast<const char*>(a + 3 * i * lda);
  }
  HYLORA_MEMBER const A* at(int r) const {
    return reinterpret_cast<const A*>(third[r / 3] + (r % 3) * stride);
  }
  HYLORA_MEMBER void advance(int count) {
    for (int i = 0; i < 4; i++) {
      third[i] += count * int64_t(sizeof(A));
      asm("" : "+r"(third[i]));
    }
  }
};

// MR rows by 32 columns in registers. U > 1 keeps that many sums apart, so that few rows don't wait
// for one another's additions.
template <class T, int MR, int U>
HYLORA_INLINE void fma_rows(const Step<float>& step, const float* from, float* to, int r0,
                            bool prefetch) {
  V sum[U][MR][P];
#pragma GCC unroll 4
  for (int u = 0; u < U; u++)
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int i = 0; i < P; i++)
        sum[u][r][i] = V{};
  RowPointers<float> a(step.a + r0 * step.lda, step.lda);
  const T* b = static_cast<const T*>(step.b);
  const int64_t ldb = step.ldb;
  int64_t k = 0;
  for (; k + U <= step.k; k += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) {
      const T* row = b + (k + u) * ldb;
      if (prefetch) {
        __builtin_prefetch(reinterpret_cast<const char*>(row) + 8192);
        if (sizeof(T) == 4) __builtin_prefetch(reinterpret_cast<const char*>(row) + 8256);
      }
      V w[P];
#pragma GCC unroll 8
      for (int i = 0; i < P; i++)
        w[i] = load(row + i * W);
#pragma GCC unroll 12
      for (int r = 0; r < MR; r++) {
        V broadcast = splat(a.at(r)[u]);
#pragma GCC unroll 8
        for (int i = 0; i < P; i++)
          sum[u][r][i] = fma(broadcast, w[i], sum[u][r][i]);
      }
    }
    a.advance(U);
  }
  for (; k < step.k; k++) {
    V w[P];
#pragma GCC unroll 8
    for (int i = 0; i < P; i++)
      w[i] = load(b + k * ldb + i * W);
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++) {
      V broadcast = splat(*a.at(r));
#pragma GCC unroll 8
      for (int i = 0; i < P; i++)
        sum[0][r][i] = fma(broadcast, w[i], sum[0][r][i]);
    }
    a.advance(1);
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
    for (int i = 0; i < P; i++) {
      V total = sum[0][r][i];
#pragma GCC unroll 4
      for (int u = 1; u < U; u++)
        total += sum[u][r][i];
      if (from) total += load(from + tile_at(r0 + r, i));
      store(to + tile_at(r0 + r, i), total);
    }
}

// The same over bf16 tiles: each 32-bit lane holds the weights of an even and an odd k, so widening
// is one shift and one mask.
template <int MR, int U>
HYLORA_INLINE void fma_rows_paired(const Step<float>& step, const float* from, float* to, int r0,
                                   bool prefetch) {
  V sum[U][MR][P];
#pragma GCC unroll 2
  for (int u = 0; u < U; u++)
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int i = 0; i < P; i++)
        sum[u][r][i] = V{};
  RowPointers<float> a(step.a + r0 * step.lda, step.lda);
  const bf16* b = static_cast<const bf16*>(step.b);
  const int64_t pairs = ceil_div(step.k, 2);
  for (int64_t pair = 0; pair < pairs; pair++) {
    const bf16* line = b + (pair >> 4) * 1024 + (pair & 15) * 32;
    if (prefetch) {
      __builtin_prefetch(reinterpret_cast<const char*>(line) + 4096);
      __builtin_prefetch(reinterpret_cast<const char*>(line) + 5120);
    }
    V even[P], odd[P];
#pragma GCC unroll 8
    for (int i = 0; i < P; i++) {
      int column = i * W;
      VU both = *reinterpret_cast<const VUu*>(line + (column >> 4) * 512 + (column & 15) * 2);
      even[i] = bits_as_float(both << 16);
      odd[i] = bits_as_float(both & 0xffff0000u);
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++) {
      V first = splat(a.at(r)[0]), second = splat(a.at(r)[1]);
#pragma GCC unroll 8
      for (int i = 0; i < P; i++)
        sum[0][r][i] = fma(first, even[i], sum[0][r][i]);
#pragma GCC unroll 8
      for (int i = 0; i < P; i++)
        sum[U - 1][r][i] = fma(second, odd[i], sum[U - 1][r][i]);
    }
    a.advance(2);
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
    for (int i = 0; i < P; i++) {
      V total = sum[0][r][i];
      if (U == 2) total += sum[1][r][i];
      if (from) total += load(from + tile_at(r0 + r, i));
      store(to + tile_at(r0 + r, i), total);
    }
}

// The rows of the middle and of x are floats; panels hold T.
template <class T>
struct Fma {
  using A = float;
  static constexpr int kPlanes = 1;
  static constexpr bool kTiles = false;
  static constexpr bool kPaired = sizeof(T) == 2 && __is_same(T, bf16);
  static constexpr int64_t kStretch = 64;  // k: what is summed in one chain
  static constexpr int64_t kChunk = 16;    // k-blocks a pass over a block of rows
  static constexpr int64_t kRows = 192;    // rows a block

  explicit Fma(int) {}
  void begin(int) {}
  void end() {}

  template <int MR, int U>
  HYLORA_INLINE void group(const Step<float>& step, const float* from, float* to, int r0) {
    const bool prefetch = r0 == 0;
    if constexpr (kPaired)
      fma_rows_paired<MR, (U > 1 ? 2 : 1)>(step, from, to, r0, prefetch);
    else
      fma_rows<T, MR, U>(step, from, to, r0, prefetch);
  }

  // to = (from or 0) + sum over steps, `rows` of 32 rows. Every stretch of k is summed from zero
  // and then added: rounding errors grow with the length of a chain, and the stretch stays in L1.
  template <class Interleave>
  void tile(const Step<float>* steps, int count, const float* from, float* to, int rows, int, bool,
            Interleave&& step) {
    step();
    for (int s = 0; s < count; s++)
      for (int64_t k = 0; k < steps[s].k; k += kStretch) {
        Step<float> piece = steps[s];
        piece.a += k;
        piece.b = static_cast<const T*>(piece.b) + k * 32;
        piece.k = piece.k - k < kStretch ? piece.k - k : kStretch;
        stretch(piece, from, to, rows);
        from = to;
      }
    if (from != to)
      for (int i = 0; i < 1024; i++)
        to[i] = from ? from[i] : 0.0f;
  }

  HYLORA_INLINE void stretch(const Step<float>& step, const float* from, float* to, int rows) {
    int r = 0;
    if constexpr (W == 16) {
      for (; rows - r >= 12 && rows - r != 16; r += 12)
        group<12, 1>(step, from, to, r);
      for (; rows - r >= 8; r += 8)
        group<8, 1>(step, from, to, r);
      for (; rows - r >= 4; r += 4)
        group<4, 2>(step, from, to, r);
      for (; rows - r >= 2; r += 2)
        group<2, 4>(step, from, to, r);
      for (; rows - r >= 1; r += 1)
        group<1, 4>(step, from, to, r);
    } else if constexpr (W == 8) {
      for (; rows - r >= 3; r += 3)
        group<3, 1>(step, from, to, r);
      for (; rows - r >= 1; r += 1)
        group<1, 2>(step, from, to, r);
    } else {
      for (; r < rows; r++)
        group<1, 1>(step, from, to, r);
    }
  }

  static HYLORA_MEMBER Row row(const float* sums) { return tile_row(sums); }
  static HYLORA_MEMBER void put(float* at, int64_t, const Row& value) { store_row(at, value); }
  static HYLORA_MEMBER Row get(const float* at, int64_t) { return load_row(at); }
};

}  // namespace
}  // namespace hylora
