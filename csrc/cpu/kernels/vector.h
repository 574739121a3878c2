// Vectors of W floats, as wide as this compilation's instruction set has them, and their conversion
// from and to bf16 and fp16. Each instruction set's file includes this header, so everything has
// internal linkage: of an inline function with external linkage the linker keeps one copy, maybe
// one that older processors can't run.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HYLORA_INLINE static inline __attribute__((always_inline))
#define HYLORA_MEMBER inline __attribute__((always_inline))
#define HYLORA_APART static __attribute__((noinline))
#define HYLORA_LAMBDA __attribute__((always_inline))

namespace hylora {
namespace {

using bf16 = uint16_t;
struct fp16 {
  uint16_t bits;
};

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int P = 32 / W;  // vectors in a row of 32 columns

typedef float V __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
typedef float Vu __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t VUu __attribute__((vector_size(4 * W), aligned(2)));
typedef uint16_t VHu __attribute__((vector_size(2 * W), aligned(2)));

HYLORA_INLINE V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
HYLORA_INLINE void store(float* p, V v) { *reinterpret_cast<Vu*>(p) = v; }
HYLORA_INLINE V bits_as_float(VU u) { return reinterpret_cast<V>(u); }
HYLORA_INLINE VU float_as_bits(V v) { return reinterpret_cast<VU>(v); }

HYLORA_INLINE V splat(float s) {
#if defined(__AVX512F__)
  return _mm512_set1_ps(s);
#elif defined(__AVX2__)
  return _mm256_set1_ps(s);
#else
  return V{s, s, s, s};
#endif
}

HYLORA_INLINE V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)
// Widens 16 numbers of half a register. The second argument only chooses the type.
HYLORA_INLINE V widen(__m256i h, bf16) {
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
}
HYLORA_INLINE V widen(__m256i h, fp16) { return _mm512_cvtph_ps(h); }
#endif

HYLORA_INLINE V load(const bf16* p) {
#if defined(__AVX512F__)
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), bf16());
#elif defined(__AVX2__)
  // g++ 12 makes four instructions of a conversion of vectors.
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (V)_mm256_slli_epi32(wide, 16);
#else
  VH h = *reinterpret_cast<const VHu*>(p);
  return bits_as_float(__builtin_convertvector(h, VU) << 16);
#endif
}

HYLORA_INLINE V load(const fp16* p) {
#if defined(__AVX512F__)
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), fp16());
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // A product moves the exponent. It is exact, and turns fp16 denormals into normal floats.
  VU h = __builtin_convertvector(*reinterpret_cast<const VHu*>(p), VU);
  VU magnitude = h & 0x7fff;
  V value = bits_as_float(magnitude << 13) * 0x1p112f;
  VU special = reinterpret_cast<VU>(magnitude >= 0x7c00);
  VU bits = (float_as_bits(value) & ~special) | (((magnitude << 13) | 0x7f800000) & special);
  return bits_as_float(bits | ((h & 0x8000) << 16));
#endif
}

// Rounds to nearest, ties to even; a NaN stays one.
HYLORA_INLINE VU bf16_bits(V v) {
  VU u = float_as_bits(v);
  VU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  VU is_nan = reinterpret_cast<VU>(v != v);
  return (rounded & ~is_nan) | (((u >> 16) | 0x40) & is_nan);
}

// The numbers as bf16, those of `even` in the low halves of lanes.
HYLORA_INLINE VU bf16_pairs(V even, V odd) {
#if defined(__AVX512BF16__)
  const VU low = (VU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  return low | (VU)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd)) << 16;
#else
  return bf16_bits(even) | bf16_bits(odd) << 16;
#endif
}

HYLORA_INLINE void store(bf16* p, V v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
#elif defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bf16_bits(v)));
#else
  *reinterpret_cast<VHu*>(p) = __builtin_convertvector(bf16_bits(v), VH);
#endif
}

HYLORA_INLINE uint16_t fp16_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // denormal in fp16: an addition of floats rounds it
    float value;
    __builtin_memcpy(&value, &magnitude, 4);
    value += 0.5f;
    __builtin_memcpy(&u, &value, 4);
    return uint16_t(sign | (u - 0x3f000000));
  }
  return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

HYLORA_INLINE void store(fp16* p, V v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; i++)
    p[i].bits = fp16_bits(v[i]);
#endif
}

// A mask with all bits set in the lanes whose column, column0 + lane, is in [begin, end).
HYLORA_INLINE VU columns_in(int column0, int64_t begin, int64_t end) {
  typedef int32_t VI __attribute__((vector_size(4 * W)));
  VI column;
  for (int i = 0; i < W; i++)
    column[i] = column0 + i;
  const int32_t from = begin < 0 ? 0 : begin > 32 ? 32 : int32_t(begin);
  const int32_t to = end < 0 ? 0 : end > 32 ? 32 : int32_t(end);
  return reinterpret_cast<VU>(column >= from) & reinterpret_cast<VU>(column < to);
}

// 32 columns of one row.
struct Row {
  V v[P];
};

template <class T>
HYLORA_INLINE Row load_row(const T* p) {
  Row row;
  for (int i = 0; i < P; i++)
    row.v[i] = load(p + i * W);
  return row;
}

template <class T>
HYLORA_INLINE void store_row(T* p, const Row& row) {
  for (int i = 0; i < P; i++)
    store(p + i * W, row.v[i]);
}
#if defined(__AVX512BF16__)
HYLORA_INLINE void store_row(bf16* p, const Row& row) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(row.v[1], row.v[0]));
}
#endif

// Stores or loads the first `count` columns only; memory behind them isn't touched. The other
// columns are loaded as zeros.
template <class T>
HYLORA_INLINE void store_row(T* p, const Row& row, int count) {
  if (count >= 32) return store_row(p, row);
  T whole[32];
  store_row(whole, row);
  for (int i = 0; i < count; i++)
    p[i] = whole[i];
}

template <class T>
HYLORA_INLINE Row load_row(const T* p, int count) {
  if (count >= 32) return load_row(p);
  T whole[32] = {};
  for (int i = 0; i < count; i++)
    whole[i] = p[i];
  return load_row(whole);
}

// Copies 32 numbers bit for bit.
template <class T>
HYLORA_INLINE void copy_32(T* to, const T* from) {
#if defined(__AVX512F__)
  for (int i = 0; i < int(sizeof(T)) / 2; i++)
    _mm512_storeu_si512(to + 32 / (sizeof(T) / 2) * i,
                        _mm512_loadu_si512(from + 32 / (sizeof(T) / 2) * i));
#else
  __builtin_memcpy(to, from, 32 * sizeof(T));
#endif
}

HYLORA_INLINE float to_float(float f) { return f; }
template <class T>
HYLORA_INLINE float to_float(T value) {
  T some[W] = {value};
  return load(some)[0];
}
template <class T>
HYLORA_INLINE T from_float(float f) {
  T some[W];
  store(some, splat(f));
  return some[0];
}

}  // namespace
}  // namespace hylora
