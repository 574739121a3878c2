// The products in AMX tiles. One plane: bf16 as it is. Several: every number is the sum of that
// many bf16 limbs (8 bits of mantissa each) and a product is the sum of the limb products that
// count.
#pragma once
#include "fma.h"

namespace hylora {
namespace {

// g++ 12's tile intrinsics claim no memory: between plain stores and tile loads of the same bytes,
// or the reverse, the compiler needs to be told.
HYLORA_INLINE void barrier() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 sum, 4 and 5 hold rows of `a`, 6 and 7 a block of the panel. Up to 16 rows: 0, 1 sum
// even blocks and 2, 3 odd ones, so that a block doesn't wait for the one before it.
HYLORA_INLINE void configure_tiles(int rows) {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = uint8_t(i < 6 ? rows : 16);
  }
  barrier();
  _tile_loadconfig(&config);
}

#define HYLORA_TILE_BLOCK(load_a, load_b)                                                          \
  load_b(6, b, 64);                                                                                \
  load_a(4, a, stride);                                                                            \
  _tile_dpbf16ps(0, 4, 6);                                                                         \
  load_b(7, b + 512, 64);                                                                          \
  _tile_dpbf16ps(1, 4, 7);                                                                         \
  load_a(5, lower, stride);                                                                        \
  _tile_dpbf16ps(2, 5, 6);                                                                         \
  step();                                                                                          \
  _tile_dpbf16ps(3, 5, 7);                                                                         \
  a += 32, lower += 32, b += 1024

// The same for a panel of at most 16 columns.
#define HYLORA_NARROW_BLOCK(load_a, load_b)                                                        \
  load_b(6, b, 64);                                                                                \
  load_a(4, a, stride);                                                                            \
  _tile_dpbf16ps(0, 4, 6);                                                                         \
  load_a(5, lower, stride);                                                                        \
  step();                                                                                          \
  _tile_dpbf16ps(2, 5, 6);                                                                         \
  a += 32, lower += 32, b += 1024

// Fetches the block of a panel that is 4 KB ahead.
HYLORA_INLINE void fetch_ahead(const bf16* b) {
  const char* ahead = reinterpret_cast<const char*>(b) + 4096;
#pragma GCC unroll 32
  for (int line = 0; line < 32; line++)
    _mm_prefetch(ahead + line * 64, _MM_HINT_T0);
}

// Few: at most 16 rows, one tile of them.
template <int Planes, bool Few = false>
struct Amx {
  using A = bf16;
  static constexpr int kPlanes = Planes;
  static constexpr int kWide = 1;
  static constexpr bool kTiles = true;
  // 32 rows of 18 blocks are 36 KB of L1; more k a pass means fewer partial sums spilled. Three
  // limb planes of 8 blocks of a panel are 48 KB.
  static constexpr int64_t kChunk = Planes == 1 ? 18 : 8;
  static constexpr int64_t kRows = Planes == 1 ? 256 : 192;

  explicit Amx(int) {}

  void begin(int rows) { configure_tiles(Few ? rows : 16); }
  void end() { _tile_release(); }

  template <class Interleave>
  HYLORA_MEMBER void tile(const Step<bf16>* steps, int count, const float* from, float* to, int,
                          int64_t columns, bool cold, Interleave&& step) {
    if constexpr (Few) return tile_few(steps, count, to, columns, step);
    if (from) {
      _tile_loadd(0, from, 64);
      _tile_loadd(1, from + 256, 64);
      _tile_loadd(2, from + 512, 64);
      _tile_loadd(3, from + 768, 64);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int s = 0; s < count; s++) {
      const bf16 *a = steps[s].a, *lower = a + 16 * steps[s].lda;
      const bf16* b = static_cast<const bf16*>(steps[s].b);
      const int64_t stride = steps[s].lda * 2, blocks = ceil_div(steps[s].k, 32);
      // What streams from L2 is loaded with the hint that keeps it from pushing the other operand
      // out of L1: 1.3-1.5x.
      if constexpr (Planes > 1) {
        const int64_t pa = steps[s].a_plane, pb = steps[s].b_plane;
        for (int64_t k = 0; k < blocks; k++)
          limb_block(a + 32 * k, lower + 32 * k, stride, pa, b + 1024 * k, pb, step);
      } else if (columns <= 16) {
        for (int64_t k = 0; k < blocks; k++) {
          HYLORA_NARROW_BLOCK(_tile_loadd, _tile_loadd);
        }
      } else if (cold) {
        for (int64_t k = 0; k < blocks; k++) {
          fetch_ahead(b);
          HYLORA_TILE_BLOCK(_tile_loadd, _tile_loadd);
        }
      } else {
        for (int64_t k = 0; k < blocks; k++) {
          HYLORA_TILE_BLOCK(_tile_loadd, _tile_stream_loadd);
        }
      }
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
    barrier();
  }

  // One k-block of all limb products that count (the sum of both limbs' numbers below Planes), in
  // an order that changes one operand at a time: 14 tile loads for 24 products, not 24.
  template <class Interleave>
  static HYLORA_MEMBER void limb_block(const bf16* a, const bf16* lower, int64_t stride, int64_t pa,
                                       const bf16* b, int64_t pb, Interleave&& step) {
    if constexpr (Planes == 3) {
      load_rows(a + 2 * pa, lower + 2 * pa, stride);
      load_columns(b);
      multiply();
    }
    load_rows(a + pa, lower + pa, stride);
    if constexpr (Planes == 2) load_columns(b);
    multiply();
    if constexpr (Planes == 3) {
      load_columns(b + pb);
      multiply();
      load_rows(a, lower, stride);
      multiply();
      load_columns(b + 2 * pb);
      multiply();
      load_columns(b);
    } else {
      load_columns(b + pb);
      load_rows(a, lower, stride);
      multiply();
      load_columns(b);
    }
    step();
    multiply();
  }
  static HYLORA_MEMBER void load_rows(const bf16* upper, const bf16* lower, int64_t stride) {
    _tile_loadd(4, upper, stride);
    _tile_loadd(5, lower, stride);
  }
  static HYLORA_MEMBER void load_columns(const bf16* b) {
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + 512, 64);
  }
  static HYLORA_MEMBER void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // Up to 16 rows: the panels pass through once and memory is the limit, so they are fetched 4 KB
  // ahead. The two halves of the sum are added when the tile is read.
  template <class Interleave>
  HYLORA_MEMBER void tile_few(const Step<bf16>* steps, int count, float* to, int64_t columns,
                              Interleave&& step) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < count; s++) {
      const bf16* a = steps[s].a;
      const bf16* b = static_cast<const bf16*>(steps[s].b);
      const int64_t stride = steps[s].lda * 2, blocks = ceil_div(steps[s].k, 32);
      for (int64_t k = 0; k < blocks; k++) {
        fetch_ahead(b);
        _tile_loadd(4, a, stride);
        _tile_loadd(6, b, 64);
        if (columns > 16) _tile_loadd(7, b + 512, 64);
        if (k & 1) {
          _tile_dpbf16ps(2, 4, 6);
          if (columns > 16) _tile_dpbf16ps(3, 4, 7);
        } else {
          _tile_dpbf16ps(0, 4, 6);
          if (columns > 16) _tile_dpbf16ps(1, 4, 7);
        }
        step();
        a += 32, b += 1024;
      }
    }
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 256, 64);
    _tile_stored(2, to + 512, 64);
    _tile_stored(3, to + 768, 64);
    barrier();
  }

  static HYLORA_MEMBER Row row(const float* sums) {
    Row sum = tile_row(sums);
    if constexpr (Few)
      for (int i = 0; i < P; i++)
        sum.v[i] += load(sums + 512 + tile_at(0, i));
    return sum;
  }

  static HYLORA_MEMBER void put(bf16* at, int64_t plane, const Row& value) {
    Row rest = value;
    for (int p = 0; p < Planes; p++) {
      store_row(at + p * plane, rest);
      if (p + 1 < Planes)
        for (int i = 0; i < P; i++)
          rest.v[i] -= load(at + p * plane + i * W);
    }
  }
  static HYLORA_MEMBER Row get(const bf16* at, int64_t plane) {
    Row sum = load_row(at);
    for (int p = 1; p < Planes; p++)
      for (int i = 0; i < P; i++)
        sum.v[i] += load(at + p * plane + i * W);
    return sum;
  }

  // A [k][32] panel -> its limbs in tile blocks, planes of `plane` numbers.
  template <class T>
  static void split_panel(const T* panel, int64_t k, bf16* to, int64_t plane) {
    static const uint16_t pairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_loadu_si512(pairs);
    for (int64_t pair = 0; pair < round_up(k, 32) / 2; pair++)
      for (int half = 0; half < 2; half++) {
        const T* row = panel + pair * 64 + half * 16;
        V even = 2 * pair < k ? load(row) : V{}, odd = 2 * pair + 1 < k ? load(row + 32) : V{};
        bf16* tile_line = to + (pair >> 4) * 1024 + half * 512 + (pair & 15) * 32;
        for (int p = 0; p < Planes; p++) {
          __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
          _mm512_storeu_si512(tile_line + p * plane, _mm512_permutexvar_epi16(interleave, both));
          if (p + 1 == Planes) break;
          __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
          __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
          even -= (V)_mm512_slli_epi32(low, 16);
          odd -= (V)_mm512_slli_epi32(high, 16);
        }
      }
  }
};

}  // namespace
}  // namespace hylora
