// Products by vdpbf16ps, which multiplies pairs of bf16: x and h stay bf16, each 32-bit lane sums
// two k. On Sapphire Rapids it has half the rate of FMA (120 against 240 GFLOP/s a core), but there
// AMX serves; on Zen 4 it has twice that rate.
#pragma once
#include "fma.h"

namespace hylora {
namespace {

struct Paired {
  using A = bf16;
  static constexpr int kPlanes = 1;
  static constexpr int kPanelsPerTile = 1;
  static constexpr bool kTiles = false;
  static constexpr bool kFixedPoint = false;
  static constexpr int64_t kChunkBlocks = 16;
  static constexpr int64_t kRows = 192;

  void begin(int) {}
  void end() {}

  // Numbers of k that all rows of a tile pass before the next ones: 16 KB of a panel, which stay in
  // L1.
  static constexpr int64_t kStretch = 256;
  // Most rows that are multiplied together: the sums of both halves of a panel take 24 registers.
  static constexpr int kMostRows = 12;
  static constexpr int kUnfetchedRows = 5;
  static constexpr int64_t kAhead = 4096;  // bytes that prefetches go ahead

  // to = (from or 0) + the term, for rows [r0, r0 + MR) of a tile, all in its upper or lower half.
  // The panel is read in the order of memory. A few rows wait for memory, and prefetches would be
  // in the way (see fma_rows_paired); more rows leave the processor's own prefetchers too far
  // behind (Zen 4, DRAM, M = 12: 13.5 GB/s instead of 11.8).
  template <int MR>
  HYLORA_APART void group(const Term<bf16>& term, const float* from, float* to, int r0) {
    // With few rows each sum is kept as two, so that an addition needn't wait for the one before.
    constexpr int U = MR <= kUnfetchedRows ? 2 : 1;
    V sums[2][U][MR];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
      for (int u = 0; u < U; u++)
#pragma GCC unroll 12
        for (int r = 0; r < MR; r++)
          sums[half][u][r] = from && u == 0 ? load(from + half * 256 + r * 16) : V{};
    RowPointers<bf16, MR> a(term.a + r0 * term.lda, term.lda);
    const bf16* b = static_cast<const bf16*>(term.b);
    for (int64_t k = 0; k < term.k; k += 32, b += 1024) {
      const int64_t pairs = ceil_div(smaller(term.k - k, 32), 2);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        RowPointers<bf16, MR> at = a;
        const bf16* line = b + half * 512;
        auto one = [&](int u) HYLORA_LAMBDA {
          const __m512bh w = (__m512bh)_mm512_loadu_si512(line + u * 32);
#pragma GCC unroll 12
          for (int r = 0; r < MR; r++) {
            int32_t two;
            __builtin_memcpy(&two, at.at(r) + 2 * u, 4);
            V& sum = sums[half][u % U][r];
            sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(two), w);
          }
        };
        int64_t pair = 0;
        for (; pair + kUnrolledK <= pairs; pair += kUnrolledK) {
#pragma GCC unroll 4
          for (int u = 0; u < kUnrolledK; u++) {
            if (MR > kUnfetchedRows)
              __builtin_prefetch(reinterpret_cast<const char*>(line + u * 32) + kAhead);
            one(u);
          }
          at.advance(2 * kUnrolledK), line += 32 * kUnrolledK;
        }
        for (; pair < pairs; pair++) {
          one(0);
          at.advance(2), line += 32;
        }
      }
      a.advance(32);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 12
      for (int r = 0; r < MR; r++) {
        V total = sums[half][0][r];
        if (U == 2) total += sums[half][U - 1][r];
        store(to + half * 256 + r * 16, total);
      }
  }

  template <int MR = 1>
  static void group_of(int rows, const Term<bf16>& term, const float* from, float* to, int r0) {
    if (rows == MR)
      group<MR>(term, from, to, r0);
    else if constexpr (MR < kMostRows)
      group_of<MR + 1>(rows, term, from, to, r0);
  }

  template <class Interleave>
  void tile(const Term<bf16>* terms, int count, const float* from, float* to, int rows, int64_t,
            bool, Interleave&& step) {
    step();
    for (int s = 0; s < count; s++)
      for (int64_t k = 0; k < terms[s].k; k += kStretch) {
        Term<bf16> piece = terms[s];
        piece.a += k;
        piece.b = static_cast<const bf16*>(piece.b) + k * 32;
        piece.k = smaller(piece.k - k, kStretch);
        for (int half = 0; half < rows; half += 16) {
          const int some = int(smaller(rows - half, 16));
          const int groups = (some + kMostRows - 1) / kMostRows;
          for (int i = 0; i < groups; i++) {
            const int begin = some * i / groups, end = some * (i + 1) / groups;
            const int at = half * 32 + begin * 16;
            group_of(end - begin, piece, from ? from + at : nullptr, to + at, half + begin);
          }
        }
        from = to;
      }
    if (from != to)
      for (int i = 0; i < 1024; i++)
        to[i] = from ? from[i] : 0.0f;
  }

  static HYLORA_MEMBER Row row(const float* sums) { return tile_row(sums); }
  static HYLORA_MEMBER void put(bf16* at, int64_t, const Row& value) { store_row(at, value); }
  static HYLORA_MEMBER Row get(const bf16* at, int64_t) { return load_row(at); }
};

}  // namespace
}  // namespace hylora
