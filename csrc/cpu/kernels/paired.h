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

  // to = (from or 0) + the terms, for rows [r0, r0 + MR) of a tile.
  template <int MR>
  HYLORA_INLINE void group(const Term<bf16>* terms, int count, const float* from, float* to,
                           int r0) {
    // With few rows each sum is kept as two, so that an addition needn't wait for the one before.
    constexpr int U = MR <= 4 ? 2 : 1;
    V sum[U][MR][2];
#pragma GCC unroll 2
    for (int u = 0; u < U; u++)
#pragma GCC unroll 12
      for (int r = 0; r < MR; r++)
        for (int i = 0; i < 2; i++)
          sum[u][r][i] = from && u == 0 ? load(from + tile_at(r0 + r, i)) : V{};
    for (int s = 0; s < count; s++) {
      RowPointers<bf16, MR> a(terms[s].a + r0 * terms[s].lda, terms[s].lda);
      const bf16* b = static_cast<const bf16*>(terms[s].b);
      const int64_t pairs = round_up(ceil_div(terms[s].k, 2), U);
      for (int64_t pair = 0; pair < pairs; pair += U) {
#pragma GCC unroll 2
        for (int u = 0; u < U; u++) {
          const bf16* line = b + ((pair + u) >> 4) * 1024 + ((pair + u) & 15) * 32;
          __builtin_prefetch(reinterpret_cast<const char*>(line) + 4096);
          __builtin_prefetch(reinterpret_cast<const char*>(line) + 5120);
          const __m512bh left = (__m512bh)_mm512_loadu_si512(line);
          const __m512bh right = (__m512bh)_mm512_loadu_si512(line + 512);
#pragma GCC unroll 12
          for (int r = 0; r < MR; r++) {
            int32_t two;
            __builtin_memcpy(&two, a.at(r) + 2 * u, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            sum[u][r][0] = _mm512_dpbf16_ps(sum[u][r][0], both, left);
            sum[u][r][1] = _mm512_dpbf16_ps(sum[u][r][1], both, right);
          }
        }
        a.advance(2 * U);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++)
      for (int i = 0; i < 2; i++)
        store(to + tile_at(r0 + r, i), U == 2 ? sum[0][r][i] + sum[U - 1][r][i] : sum[0][r][i]);
  }

  template <class Interleave>
  void tile(const Term<bf16>* terms, int count, const float* from, float* to, int rows, int64_t,
            bool, Interleave&& step) {
    step();
    int r = 0;
    for (; rows - r >= 12 && rows - r != 16; r += 12)
      group<12>(terms, count, from, to, r);
    for (; rows - r >= 8; r += 8)
      group<8>(terms, count, from, to, r);
    for (; rows - r >= 4; r += 4)
      group<4>(terms, count, from, to, r);
    for (; rows - r >= 1; r += 1)
      group<1>(terms, count, from, to, r);
  }

  static HYLORA_MEMBER Row row(const float* sums) { return tile_row(sums); }
  static HYLORA_MEMBER void put(bf16* at, int64_t, const Row& value) { store_row(at, value); }
  static HYLORA_MEMBER Row get(const bf16* at, int64_t) { return load_row(at); }
};

}  // namespace
}  // namespace hylora
