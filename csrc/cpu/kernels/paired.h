// The products in vdpbf16ps: rows stay bf16, two k a lane. Half the rate of plain multiply-adds on
// Sapphire Rapids (120 against 240 GFLOP/s a core), where AMX serves instead; twice it on Zen 4.
#pragma once
#include "fma.h"

namespace hylora {
namespace {

struct Paired {
  using A = bf16;
  static constexpr int kPlanes = 1;
  static constexpr int kWide = 1;
  static constexpr bool kTiles = false;
  static constexpr int64_t kChunk = 16;
  static constexpr int64_t kRows = 192;

  explicit Paired(int) {}
  void begin(int) {}
  void end() {}

  template <int MR>
  HYLORA_INLINE void group(const Step<bf16>* steps, int count, const float* from, float* to,
                           int r0) {
    // Few rows keep two sums apart, so that they don't wait for one another's additions.
    constexpr int U = MR <= 4 ? 2 : 1;
    V sum[U][MR][2];
#pragma GCC unroll 2
    for (int u = 0; u < U; u++)
#pragma GCC unroll 12
      for (int r = 0; r < MR; r++)
        for (int i = 0; i < 2; i++)
          sum[u][r][i] = from && u == 0 ? load(from + tile_at(r0 + r, i)) : V{};
    for (int s = 0; s < count; s++) {
      RowPointers<bf16, MR> a(steps[s].a + r0 * steps[s].lda, steps[s].lda);
      const bf16* b = static_cast<const bf16*>(steps[s].b);
      const int64_t pairs = round_up(ceil_div(steps[s].k, 2), U);
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
  void tile(const Step<bf16>* steps, int count, const float* from, float* to, int rows, int64_t,
            bool, Interleave&& step) {
    step();
    int r = 0;
    for (; rows - r >= 12 && rows - r != 16; r += 12)
      group<12>(steps, count, from, to, r);
    for (; rows - r >= 8; r += 8)
      group<8>(steps, count, from, to, r);
    for (; rows - r >= 4; r += 4)
      group<4>(steps, count, from, to, r);
    for (; rows - r >= 1; r += 1)
      group<1>(steps, count, from, to, r);
  }

  static HYLORA_MEMBER Row row(const float* sums) { return tile_row(sums); }
  static HYLORA_MEMBER void put(bf16* at, int64_t, const Row& value) { store_row(at, value); }
  static HYLORA_MEMBER Row get(const bf16* at, int64_t) { return load_row(at); }
};

}  // namespace
}  // namespace hylora
