// Products in AMX tiles, of bf16 or of bf16 limbs.
//
// bf16 limbs: bf16 pieces whose sum is a float32. Each has 8 bits of mantissa, so two hold a
// float16 and three a float32. A product of two numbers is the sum of the products of their limbs,
// of which the smallest are left out:
//
//     limb_products   type      limbs   limb i of x times limb j of W   error
//     3               float16   2       i + j < 2                       at most 2^-18 of a product
//     3               float32   2       i + j < 2                       5e-6
//     6               float32   3       i + j < 3                       that of float32
#pragma once
#include "fma.h"

namespace hylora {
namespace {

// Keeps the compiler from moving plain stores past tile loads of the same bytes, or tile stores
// past plain loads: g++ 12's tile intrinsics don't say that they touch memory.
HYLORA_INLINE void barrier() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 hold sums, 4 and 5 rows of `a`, 6 and 7 a k-block of the panel. With more than 16 rows,
// 4, 0 and 1 are the upper 16 rows and 5, 2 and 3 the lower ones. With at most 16, 0 and 1 sum the
// even k-blocks and 2 and 3 the odd ones, so that a block needn't wait for the one before.
HYLORA_INLINE void configure_tiles(int rows) {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = uint8_t(i < 6 ? rows : 16);
  }
  barrier();
  _tile_loadconfig(&config);
}

// Multiplies one k-block of 32 rows by 32 columns. load_a and load_b are the tile loads for the
// rows and the panel.
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

// Prefetches the 2 KB block of a panel that is 4 KB ahead.
HYLORA_INLINE void fetch_ahead(const bf16* b) {
  const char* ahead = reinterpret_cast<const char*>(b) + 4096;
#pragma GCC unroll 32
  for (int line = 0; line < 32; line++)
    _mm_prefetch(ahead + line * 64, _MM_HINT_T0);
}

// Planes: 1 for bf16 as it is, else the number of limbs. Few: at most 16 rows, one tile of them.
template <int Planes, bool Few = false>
struct Amx {
  using A = bf16;
  static constexpr int kPlanes = Planes;
  static constexpr int kPanelsPerTile = 1;
  static constexpr bool kTiles = true;
  static constexpr bool kFixedPoint = false;
  // 32 rows of 18 k-blocks take 36 KB of L1 (48 KB); longer chunks mean fewer spilled partial sums.
  // With limbs, 8 k-blocks of a panel in three planes take 48 KB.
  static constexpr int64_t kChunkBlocks = Planes == 1 ? 18 : 8;
  static constexpr int64_t kRows = Planes == 1 ? 256 : 192;

  void begin(int rows) { configure_tiles(Few ? rows : 16); }
  void end() { _tile_release(); }

  // to = (from or 0) + the terms; step() is called once a k-block.
  template <class Interleave>
  HYLORA_MEMBER void tile(const Term<bf16>* terms, int count, const float* from, float* to, int,
                          int64_t columns, bool cold, Interleave&& step) {
    if constexpr (Few) return tile_few(terms, count, to, columns, step);
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
      const bf16 *a = terms[s].a, *lower = a + 16 * terms[s].lda;
      const bf16* b = static_cast<const bf16*>(terms[s].b);
      const int64_t stride = terms[s].lda * 2, blocks = ceil_div(terms[s].k, 32);
      // Panels stream from L2. The streaming load keeps them from evicting the rows from
      // L1: 1.3-1.5x.
      if constexpr (Planes > 1) {
        const int64_t pa = terms[s].a_plane, pb = terms[s].b_plane;
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

  // Multiplies one k-block of all limb products i + j < Planes, the smallest first, in an order
  // that changes one operand at a time: 14 tile loads instead of 24 for the 24 tile products of 3
  // limbs.
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

  // The same for at most 16 rows. Every panel is read once, so memory is the limit, and panels are
  // prefetched 4 KB ahead. row() adds the sums of even and odd k-blocks.
  template <class Interleave>
  HYLORA_MEMBER void tile_few(const Term<bf16>* terms, int count, float* to, int64_t columns,
                              Interleave&& step) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < count; s++) {
      const bf16* a = terms[s].a;
      const bf16* b = static_cast<const bf16*>(terms[s].b);
      const int64_t stride = terms[s].lda * 2, blocks = ceil_div(terms[s].k, 32);
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

  // Stores a row, or its limbs, each in its plane.
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

  // Splits k numbers of a [k][32] panel into limbs, which lie as AMX tiles (Panels in call.h), one
  // plane after another.
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
