// exp, tanh and erf of vectors, to about the last bit of a float. The coefficients are polynomial
// fits over the intervals named, each with an error below 4e-8.
#pragma once
#include "vector.h"

namespace hylora {
namespace {

HYLORA_INLINE V select(VU mask, V yes, V no) {
  return bits_as_float((mask & float_as_bits(yes)) | (~mask & float_as_bits(no)));
}
HYLORA_INLINE VU is_less(V a, V b) { return reinterpret_cast<VU>(a < b); }
HYLORA_INLINE V greater_of(V a, V b) { return select(is_less(a, b), b, a); }
HYLORA_INLINE V lesser_of(V a, V b) { return select(is_less(b, a), b, a); }
HYLORA_INLINE V magnitude_of(V x) { return bits_as_float(float_as_bits(x) & 0x7fffffff); }
HYLORA_INLINE V with_sign_of(V magnitude, V x) {
  return bits_as_float(float_as_bits(magnitude) | (float_as_bits(x) & 0x80000000));
}

// c[0] + c[1] x + c[2] x^2 ...
template <int N>
HYLORA_INLINE V polynomial(V x, const float (&c)[N]) {
  V sum = splat(c[N - 1]);
#pragma GCC unroll 8
  for (int i = N - 2; i >= 0; i--)
    sum = fma(sum, x, splat(c[i]));
  return sum;
}

// e^x. Below -87.3 and above 88.3 it stays at its value there (1e-38, 2e38), so that nothing
// becomes infinite; a NaN stays one.
HYLORA_INLINE V exp(V x) {
  x = lesser_of(greater_of(x, splat(-87.3f)), splat(88.3f));
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds to the integer n, which then
  // stands in the sum's low bits; ln 2 is subtracted in two parts, the first of few bits.
  const V shifted = fma(x, splat(1.44269504f), splat(12582912.0f));
  const V n = shifted - splat(12582912.0f);
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  constexpr float c[] = {1.0f, 0.5f, 0.166664168f, 0.0416661315f, 0.0083750356f, 0.00139541388f};
  const V power = bits_as_float((float_as_bits(shifted) + 127) << 23);  // 2^n
  return fma(r * polynomial(r, c), power, power);
}

HYLORA_INLINE V tanh(V x) {
  const V size = magnitude_of(x), square = x * x;
  constexpr float c[] = {-0.333332837f, 0.133314908f, -0.0537434965f, 0.0206505787f,
                         -0.00571703678f};  // up to 0.625
  const V near_zero = fma(size * square, polynomial(square, c), size);
  const V far = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
  return with_sign_of(select(is_less(size, splat(0.625f)), near_zero, far), x);
}

HYLORA_INLINE V erf(V x) {
  const V size = lesser_of(magnitude_of(x), splat(4.0f)), square = size * size;
  constexpr float c[] = {1.12837911f,    -0.376123548f,  0.112804115f,
                         -0.0267177075f, 0.00492478907f, -0.000566015311f};  // up to 1
  const V near_zero = size * polynomial(square, c);
  // log(1 - erf(x)) / x from 1 to 4, where erf is 1
  constexpr float q[] = {-1.12869716f,    -0.634958327f,   -0.106549107f,   0.0240255091f,
                         -0.00376466033f, 0.000352332165f, -1.41338387e-05f};
  const V far = splat(1.0f) - exp(size * polynomial(size, q));
  return with_sign_of(select(is_less(size, splat(1.0f)), near_zero, far), x);
}

HYLORA_INLINE V sigmoid(V x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

}  // namespace
}  // namespace hylora
