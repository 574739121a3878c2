// The pivot table at work: pivots and others merged into outputs, and outputs sorted into both.
#pragma once
#include "../call.h"
#include "vector.h"

namespace hylora {
namespace {

// Rows that are merged together: the table's entry is loaded once for all of them.
constexpr int kMergedRows = 4;

// Merges the 32 outputs of one table entry, of `Count` rows. `pivots`, `others` and `y` point to a
// row's first number; 32 numbers can be read from pivots + pivot0 and from others + other0 on.
// Takes one permutation a source for 32 halves or 16 floats; vpexpandw, which needs no index, takes
// two micro-operations.
template <int Count, class T>
HYLORA_INLINE void merge_pivots(const PivotPanel& panel, const T* pivots, int64_t pivots_stride,
                                const T* others, int64_t others_stride, T* y, int64_t y_stride) {
  pivots += panel.pivot0, others += panel.other0;
#if defined(__AVX512BW__)
  const __m256i from = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel.from));
  if constexpr (sizeof(T) == 2) {
    const __m512i at = _mm512_cvtepu8_epi16(from);
#pragma GCC unroll 4
    for (int r = 0; r < Count; r++) {
      const __m512i columns = _mm512_permutexvar_epi16(at, _mm512_loadu_si512(others));
      _mm512_storeu_si512(y, _mm512_mask_permutexvar_epi16(columns, panel.is_pivot, at,
                                                           _mm512_loadu_si512(pivots)));
      pivots += pivots_stride, others += others_stride, y += y_stride;
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
    for (int r = 0; r < Count; r++) {
      const T *more_pivots = pivots + pivots_left, *more_others = others + 16 - pivots_left;
      const __m512 a = _mm512_permutexvar_ps(at_left, _mm512_loadu_ps(others));
      const __m512 b = _mm512_permutexvar_ps(at_right, _mm512_loadu_ps(more_others));
      _mm512_storeu_ps(y, _mm512_mask_permutexvar_ps(a, left, at_left, _mm512_loadu_ps(pivots)));
      _mm512_storeu_ps(
          y + 16, _mm512_mask_permutexvar_ps(b, right, at_right, _mm512_loadu_ps(more_pivots)));
      pivots += pivots_stride, others += others_stride, y += y_stride;
    }
  }
#else
  for (int c = 0; c < 32; c++) {
    const bool is_pivot = panel.is_pivot >> c & 1;
    const T* from = (is_pivot ? pivots : others) + panel.from[c];
    const int64_t stride = is_pivot ? pivots_stride : others_stride;
    for (int r = 0; r < Count; r++)
      y[c + r * y_stride] = from[r * stride];
  }
#endif
}

// to[i] = from[at[i]] for i < count, of `width` numbers. Writes 32; those from `count` on hold
// anything.
template <class T>
HYLORA_INLINE void gather_columns(const T* from, [[maybe_unused]] int width, const uint8_t* at,
                                  [[maybe_unused]] int count, T* to) {
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

// Sorts numbers in output order into pivots and others: calls put(is_others, numbers, the first
// one's number among its kind, how many) for 32 at a time, and at last for what is left.
template <class T, class Put>
HYLORA_INLINE void sort_columns(const PivotTable& table, const T* from, Put&& put) {
  for (int kind = 0; kind < 2; kind++) {
    const bool is_others = kind == 1;
    T waiting[64];
    int filled = 0;
    int64_t done = 0;
    for (int64_t c = 0; c < table.n; c += 32) {
      const PivotPanel& panel = table.panels[c / 32];
      const int width = int(smaller(table.n - c, 32));
      const int pivots_here = __builtin_popcount(panel.is_pivot);
      const int count = is_others ? width - pivots_here : pivots_here;
      gather_columns(from + c, width, is_others ? panel.other_at : panel.pivot_at, count,
                     waiting + filled);
      filled += count;
      if (filled < 32) continue;
      put(is_others, waiting, done, 32);
      done += 32, filled -= 32;
      for (int i = 0; i < 32; i++)
        waiting[i] = waiting[32 + i];
    }
    if (filled) put(is_others, waiting, done, filled);
  }
}

}  // namespace
}  // namespace hylora
