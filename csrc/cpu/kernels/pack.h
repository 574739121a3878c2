// Weights into panels (call.h), and panels into what torch's products read. The way back to
// weights, which need not be fast, is in panels.cpp.
#pragma once
#include "codes.h"

namespace hylora {
namespace {

#if defined(__AVX512BW__)
// Transposes 16 rows, `stride` bytes apart, of 16 numbers of 32 bits: out[i] holds number i of
// every row.
HYLORA_INLINE void transpose16(const char* rows, int64_t stride, __m512i* out) {
  __m512i in[16], two[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    in[i] = _mm512_loadu_si512(rows + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    two[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  // Lane l of in[4 g + j] now holds column 4 l + j of rows 4 g .. 4 g + 3.
#pragma GCC unroll 4
  for (int g = 0; g < 16; g += 4) {
    in[g] = _mm512_unpacklo_epi64(two[g], two[g + 2]);
    in[g + 1] = _mm512_unpackhi_epi64(two[g], two[g + 2]);
    in[g + 2] = _mm512_unpacklo_epi64(two[g + 1], two[g + 3]);
    in[g + 3] = _mm512_unpackhi_epi64(two[g + 1], two[g + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i low02 = _mm512_shuffle_i32x4(in[j], in[4 + j], 0x88);
    __m512i low13 = _mm512_shuffle_i32x4(in[j], in[4 + j], 0xdd);
    __m512i high02 = _mm512_shuffle_i32x4(in[8 + j], in[12 + j], 0x88);
    __m512i high13 = _mm512_shuffle_i32x4(in[8 + j], in[12 + j], 0xdd);
    out[j] = _mm512_shuffle_i32x4(low02, high02, 0x88);
    out[8 + j] = _mm512_shuffle_i32x4(low02, high02, 0xdd);
    out[4 + j] = _mm512_shuffle_i32x4(low13, high13, 0x88);
    out[12 + j] = _mm512_shuffle_i32x4(low13, high13, 0xdd);
  }
}
#endif

// Packs one bf16 panel, a block [2][16][16][2] for every 32 k, of the first `rows` (at most 32)
// rows of W. Neighbours along n are sn numbers apart, along k sk.
static void pack_panel(const bf16* W, int64_t rows, int64_t k, int64_t sn, int64_t sk, bf16* to) {
  for (int64_t k0 = 0; k0 < k; k0 += 32, to += 1024) {
    const int64_t width = k - k0 < 32 ? k - k0 : 32;
#if defined(__AVX512BW__)
    if (rows >= 32 && width == 32 && sk == 1) {
      for (int half = 0; half < 2; half++) {
        __m512i lines[16];
        transpose16(reinterpret_cast<const char*>(W + half * 16 * sn + k0), sn * 2, lines);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
          _mm512_storeu_si512(to + half * 512 + i * 32, lines[i]);
      }
      continue;
    }
    if (rows >= 32 && width == 32 && sn == 1) {
      static const uint16_t left[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                        37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                        11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
      const __m512i pairs = _mm512_loadu_si512(left);
      const __m512i right_pairs = _mm512_add_epi16(pairs, _mm512_set1_epi16(16));
      for (int pair = 0; pair < 16; pair++) {
        const __m512i even = _mm512_loadu_si512(W + (k0 + 2 * pair) * sk);
        const __m512i odd = _mm512_loadu_si512(W + (k0 + 2 * pair + 1) * sk);
        _mm512_storeu_si512(to + pair * 32, _mm512_permutex2var_epi16(even, pairs, odd));
        _mm512_storeu_si512(to + 512 + pair * 32,
                            _mm512_permutex2var_epi16(even, right_pairs, odd));
      }
      continue;
    }
#endif
    for (int i = 0; i < 1024; i++)
      to[i] = 0;
    for (int64_t n = 0; n < (rows < 32 ? rows : 32); n++)
      for (int64_t j = 0; j < width; j++)
        to[(n >> 4) * 512 + (j >> 1) * 32 + (n & 15) * 2 + (j & 1)] = W[n * sn + (k0 + j) * sk];
  }
}

// The same for float or half panels, [k][32].
template <class T>
static void pack_panel(const T* W, int64_t rows, int64_t k, int64_t sn, int64_t sk, T* to) {
  int64_t j = 0;
#if defined(__AVX512BW__)
  if (sizeof(T) == 4 && rows >= 32 && sk == 1)
    for (; j + 16 <= k; j += 16)
      for (int half = 0; half < 2; half++) {
        __m512i lines[16];
        transpose16(reinterpret_cast<const char*>(W + half * 16 * sn + j), sn * 4, lines);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
          _mm512_storeu_si512(to + (j + i) * 32 + half * 16, lines[i]);
      }
#endif
  for (; j < k; j++)
    for (int64_t n = 0; n < 32; n++)
      to[j * 32 + n] = n < rows ? W[n * sn + j * sk] : T{};
}

template <class T>
static void pack_panels(const Packing& p, int64_t panel0, int64_t panel1) {
  const int64_t size = (__is_same(T, bf16) ? round_up(p.k, 32) : p.k) * 32;
  for (int64_t panel = panel0; panel < panel1; panel++)
    pack_panel(static_cast<const T*>(p.W) + panel * 32 * p.row_stride, p.n - panel * 32, p.k,
               p.row_stride, p.column_stride, static_cast<T*>(p.panels) + panel * size);
}

static void pack(const Packing& p, int64_t panel0, int64_t panel1) {
  if (p.type == Type::bf16) return pack_panels<bf16>(p, panel0, panel1);
  if (p.type == Type::fp16) return pack_panels<fp16>(p, panel0, panel1);
  pack_panels<float>(p, panel0, panel1);
}

// Kernels::unpack.
static void unpack(const Panels& W, int64_t panel0, int64_t panel1, float* to, int64_t ld) {
  for (int64_t p = panel0; p < panel1; p++) {
    float* columns = to + p * 32;
    if (W.bits)
      with_bits(W.bits, [&](auto bits) {
        constexpr int kBits = decltype(bits)::value;
        const char* panel = static_cast<const char*>(W.data) + p * panel_bytes(kBits, W.k);
        widen_codes<kBits>(panel, 0, ceil_div(W.k, 32), columns, ld);
      });
    else
      for (int64_t k = 0; k < W.k; k++)
        copy_32(columns + k * ld, static_cast<const float*>(W.data) + (p * W.k + k) * 32);
  }
}

}  // namespace
}  // namespace hylora
