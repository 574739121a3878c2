// The pivoted form's sorting: a row of y woven out of pivots and others, and a row taken apart.
#pragma once
#include "../params.h"
#include "vector.h"

namespace hylora {
namespace {

// 32 columns of y. `before`, `others`: 32 each, of panel ready - 1 and panel ready; `pivots`: from
// pivot0 on, 32 readable; `bias`: 32, or null.
template <class T>
HYLORA_INLINE void weave(const OrderPanel& panel, const T* before, const T* others, const T* pivots,
                         const T* bias, T* to) {
#if defined(__AVX512BW__)
  const __m512i from = _mm512_loadu_si512(panel.from);
  if constexpr (sizeof(T) == 2) {
    __m512i columns =
        _mm512_permutex2var_epi16(_mm512_loadu_si512(before), from, _mm512_loadu_si512(others));
    columns =
        _mm512_mask_permutexvar_epi16(columns, panel.is_pivot, from, _mm512_loadu_si512(pivots));
    if (!bias) return _mm512_storeu_si512(to, columns);
    store_row(to, Row{widen(_mm512_castsi512_si256(columns), T()) + load(bias),
                      widen(_mm512_extracti64x4_epi64(columns, 1), T()) + load(bias + 16)});
  } else {
    for (int half = 0; half < 2; half++) {
      const __m512i at = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(from, 1)
                                                    : _mm512_castsi512_si256(from));
      const __mmask16 is_pivot = __mmask16(panel.is_pivot >> (16 * half));
      const __mmask16 later = _mm512_test_epi32_mask(at, _mm512_set1_epi32(32));
      auto pick = [&](const T* p) __attribute__((always_inline)) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(p), at, _mm512_loadu_ps(p + 16));
      };
      __m512 columns = _mm512_mask_blend_ps(later, pick(before), pick(others));
      columns = _mm512_mask_blend_ps(is_pivot, columns, pick(pivots));
      store(to + 16 * half, bias ? (V)columns + load(bias + 16 * half) : (V)columns);
    }
  }
#else
  for (int c = 0; c < 32; c++) {
    const int i = panel.from[c];
    to[c] = panel.is_pivot >> c & 1 ? pivots[i] : i < 32 ? before[i] : others[i - 32];
  }
  if (!bias) return;
  Row row = load_row(to), added = load_row(bias);
  for (int i = 0; i < P; i++)
    row.v[i] += added.v[i];
  store_row(to, row);
#endif
}

// to[i] = from[at[i]] for i < count; writes 32 numbers, those behind count are anything.
template <class T>
HYLORA_INLINE void gather_columns(const T* from, [[maybe_unused]] int width, const uint16_t* at,
                                  int count, T* to) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) {
    const __mmask32 there = width >= 32 ? ~0u : (1u << width) - 1;
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(at),
                                                     _mm512_maskz_loadu_epi16(there, from)));
    return;
  }
#endif
  for (int i = 0; i < count; i++)
    to[i] = from[at[i]];
}

}  // namespace
}  // namespace hylora
