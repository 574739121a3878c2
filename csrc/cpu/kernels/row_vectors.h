// Rows of any length in steps of one vector, for the operations of row_calls.h.
#pragma once
#include "../row_calls.h"
#include "vector.h"

namespace hylora {
namespace {

// Loads or stores the first `count` numbers of a vector, all if count >= W, none if it is below 1;
// memory behind them isn't touched. The other lanes are loaded as zeros.
#if defined(__AVX512F__)
HYLORA_INLINE uint32_t first_lanes(int64_t count) {
  return count >= 32 ? 0xffffffff : count > 0 ? (1u << count) - 1 : 0;
}
HYLORA_INLINE V load(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(__mmask16(first_lanes(count)), p);
}
template <class T>
HYLORA_INLINE V load(const T* p, int64_t count) {
  return widen(_mm256_maskz_loadu_epi16(__mmask16(first_lanes(count)), p), T());
}
#else
template <class T>
HYLORA_INLINE V load(const T* p, int64_t count) {
  if (count >= W) return load(p);
  T whole[W] = {};
  for (int64_t i = 0; i < count; i++)
    whole[i] = p[i];
  return load(whole);
}
#endif
template <class T>
HYLORA_INLINE void store(T* p, V v, int64_t count) {
  if (count >= W) return store(p, v);
  T whole[W];
  store(whole, v);
  for (int64_t i = 0; i < count; i++)
    p[i] = whole[i];
}

// 2 W numbers as two vectors, in the order that takes the fewest instructions: of bf16 the even and
// the odd numbers (one instruction for each vector), of others the first half and the second.
template <class T>
HYLORA_INLINE V load_half(const T* p, int half) {
  return load(p + half * W);
}
HYLORA_INLINE V load_half(const bf16* p, int half) {
  const VU pairs = *reinterpret_cast<const VUu*>(p);
  return bits_as_float(half ? pairs & 0xffff0000 : pairs << 16);
}
template <class T>
HYLORA_INLINE V load_half(const T* p, int half, int64_t count) {
  if (count >= 2 * W) return load_half(p, half);
#if defined(__AVX512F__)
  if constexpr (!__is_same(T, bf16)) return load(p + half * W, count - half * W);
  const VU pairs = (VU)_mm512_maskz_loadu_epi16(first_lanes(count), p);
  return bits_as_float(half ? pairs & 0xffff0000 : pairs << 16);
#else
  T whole[2 * W] = {};
  for (int64_t i = 0; i < count; i++)
    whole[i] = p[i];
  return load_half(whole, half);
#endif
}
template <class T>
HYLORA_INLINE void store_halves(T* p, V a, V b) {
  store(p, a), store(p + W, b);
}
HYLORA_INLINE void store_halves(bf16* p, V a, V b) {
  *reinterpret_cast<VUu*>(p) = bf16_bits(a) | bf16_bits(b) << 16;
}
template <class T>
HYLORA_INLINE void store_halves(T* p, V a, V b, int64_t count) {
  if (count >= 2 * W) return store_halves(p, a, b);
  T whole[2 * W];
  store_halves(whole, a, b);
  for (int64_t i = 0; i < count; i++)
    p[i] = whole[i];
}

// The numbers as they are when stored as T.
template <class T>
HYLORA_INLINE V rounded(V v) {
  if constexpr (__is_same(T, float)) return v;
  T stored[W];
  store(stored, v);
  return load(stored);
}

HYLORA_INLINE float sum_of_lanes(V v) {
  float sum = 0;
  for (int i = 0; i < W; i++)
    sum += v[i];
  return sum;
}

// Lanes [begin, end) of the vector whose lane 0 has number `first`.
HYLORA_INLINE VU lanes_in(int64_t first, int64_t begin, int64_t end) {
  VU lane;
  for (int i = 0; i < W; i++)
    lane[i] = uint32_t(i);
  // Unsigned, a lane before `from` wraps round to a great number.
  const int64_t from = begin > first ? begin - first : 0;
  const int64_t count = end - first - from;
  if (count <= 0) return VU{};
  return reinterpret_cast<VU>(lane - uint32_t(from) < uint32_t(count < W ? count : W));
}

// The columns of a row that a part of an ActivationCall or AddCall covers.
struct Columns {
  int64_t row, first, count;

  template <class Call>
  HYLORA_MEMBER Columns(const Call& call, int64_t part) {
    const int64_t parts = ceil_div(call.columns, kColumnsPerPart);
    row = part / parts, first = part % parts * kColumnsPerPart;
    count = smaller(kColumnsPerPart, call.columns - first);
  }
};

template <class T, class Data>
HYLORA_INLINE T* head_at(Data* data, const HeadStrides& strides, int64_t sequence, int64_t row,
                         int64_t head) {
  return static_cast<T*>(data) + sequence * strides.sequence + row * strides.row +
         head * strides.head;
}

}  // namespace
}  // namespace hylora
