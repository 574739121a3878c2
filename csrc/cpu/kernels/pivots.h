// The pivoted form's sorting: rows of y woven out of pivots and others, and a row taken apart.
#pragma once
#include "../call.h"
#include "vector.h"

namespace hylora {
namespace {

// Rows that are woven together: the table is loaded once for all of them.
constexpr int kWovenRows = 4;

// 32 columns of `Rows` rows of y; the strides are in numbers, 32 are readable from pivots + pivot0
// and from others + other0. One permutation a source and 32 halves (16 floats): vpexpandw, which
// needs no table, costs two.
template <int Rows, class T>
HYLORA_INLINE void weave(const OrderPanel& panel, const T* pivots, int64_t ld_pivots,
                         const T* others, int64_t ld_others, T* y, int64_t ld_y) {
  pivots += panel.pivot0, others += panel.other0;
#if defined(__AVX512BW__)
  const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel.from));
  if constexpr (sizeof(T) == 2) {
    const __m512i at = _mm512_cvtepu8_epi16(from);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      const __m512i columns = _mm512_permutexvar_epi16(at, _mm512_loadu_si512(others));
      _mm512_storeu_si512(y, _mm512_mask_permutexvar_epi16(columns, panel.is_pivot, at,
                                                           _mm512_loadu_si512(pivots)));
      pivots += ld_pivots, others += ld_others, y += ld_y;
    }
  } else {
    const __mmask16 left = __mmask16(panel.is_pivot), right = __mmask16(panel.is_pivot >> 16);
    const int pivots_left = __builtin_popcount(left);
    const __m512i at_left = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(from));
    const __m512i skip =
        _mm512_mask_set1_epi32(_mm512_set1_epi32(16 - pivots_left), right, pivots_left);
    const __m512i at_right =
        _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(from, 1)), skip);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
      const T *more_pivots = pivots + pivots_left, *more_others = others + 16 - pivots_left;
      const __m512 a = _mm512_permutexvar_ps(at_left, _mm512_loadu_ps(others));
      const __m512 b = _mm512_permutexvar_ps(at_right, _mm512_loadu_ps(more_others));
      _mm512_storeu_ps(y, _mm512_mask_permutexvar_ps(a, left, at_left, _mm512_loadu_ps(pivots)));
      _mm512_storeu_ps(
          y + 16, _mm512_mask_permutexvar_ps(b, right, at_right, _mm512_loadu_ps(more_pivots)));
      pivots += ld_pivots, others += ld_others, y += ld_y;
    }
  }
#else
  for (int c = 0; c < 32; c++) {
    const bool is_pivot = panel.is_pivot >> c & 1;
    const T* from = (is_pivot ? pivots : others) + panel.from[c];
    const int64_t stride = is_pivot ? ld_pivots : ld_others;
    for (int r = 0; r < Rows; r++)
      y[c + r * ld_y] = from[r * stride];
  }
#endif
}

// to[i] = from[at[i]] for i < count; writes 32 numbers, those behind count are anything.
template <class T>
HYLORA_INLINE void gather_columns(const T* from, [[maybe_unused]] int width, const uint8_t* at,
                                  int count, T* to) {
#if defined(__AVX512BW__)
  const __m256i columns = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  const __mmask32 there = width >= 32 ? ~0u : (1u << width) - 1;
  if constexpr (sizeof(T) == 2) {
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(columns),
                                                     _mm512_maskz_loadu_epi16(there, from)));
  } else {
    const __m512 left = _mm512_maskz_loadu_ps(__mmask16(there), from);
    const __m512 right = _mm512_maskz_loadu_ps(__mmask16(there >> 16), from + 16);
    for (int half = 0; half < 2; half++) {
      const __m512i lanes = _mm512_cvtepu8_epi32(half ? _mm256_extracti128_si256(columns, 1)
                                                      : _mm256_castsi256_si128(columns));
      _mm512_storeu_ps(to + 16 * half, _mm512_permutex2var_ps(left, lanes, right));
    }
  }
#else
  for (int i = 0; i < count; i++)
    to[i] = from[at[i]];
#endif
}

// Numbers in natural order -> to(part 0, ...) the pivots, to(part 1, ...) the others, 32 at a time:
// calls put(part, numbers, index of the first, how many).
template <class T, class Put>
HYLORA_INLINE void sort_columns(const Order& order, const T* from, Put&& put) {
  for (int part = 0; part < 2; part++) {
    T waiting[64];
    int filled = 0;
    int64_t done = 0;
    for (int64_t c = 0; c < order.n; c += 32) {
      const OrderPanel& panel = order.panels[c / 32];
      const int width = int(order.n - c < 32 ? order.n - c : 32);
      const int pivots_here = __builtin_popcount(panel.is_pivot);
      const int count = part ? width - pivots_here : pivots_here;
      gather_columns(from + c, width, part ? panel.other_at : panel.pivot_at, count,
                     waiting + filled);
      filled += count;
      if (filled < 32) continue;
      put(part, waiting, done, 32);
      done += 32, filled -= 32;
      for (int i = 0; i < 32; i++)
        waiting[i] = waiting[32 + i];
    }
    if (filled) put(part, waiting, done, filled);
  }
}

}  // namespace
}  // namespace hylora
