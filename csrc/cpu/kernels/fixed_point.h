// Rows as 16-bit fixed point, multiplied by quantised panels (codes.h): products of integers
// are exact, and one instruction makes 16 or 32 of them.
//
// Every 64 numbers of a row have a scale of their own, a power of two of which the largest number
// is less than 2^15 times. So bf16 within 2^8 of the largest and fp16 within 2^5 keep their bits,
// and no error is above 2^-16 of the next power of two above the largest, far below what rounding W
// to bf16 costs. A float32 is two numbers, a high limb and 2^-15 of a low one: 30 bits.
#pragma once
#include "../call.h"
#include "vector.h"

namespace hylora {
namespace {

typedef int32_t VI __attribute__((vector_size(4 * W)));

struct FixedGroup {
  int16_t numbers[64];
  int32_t sum;  // of numbers
  float scale;  // NaN for a group that holds Inf or NaN; its numbers are 0
};

// Rows, [tile][groups][height][limbs]: as products read them, a group of all rows of a tile and
// then the next one. A number of float32 is a high limb and a low one.
struct FixedRows {
  FixedGroup* data = nullptr;
  int64_t groups = 0;
  int64_t height = 0;  // of a tile: 32, or all rows if they are fewer
  int limbs = 1;

  FixedGroup* at(int64_t r, int64_t group) const {
    return data + ((r / height * groups + group) * height + r % height) * limbs;
  }
  // From a tile's first row and a group on.
  FixedRows from(int64_t r, int64_t group = 0) const {
    return {at(r, group), groups, height, limbs};
  }
};

HYLORA_INLINE float power_of_two(int exponent) {
  const int32_t bits = (exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest; magnitudes up to 2^22.
HYLORA_INLINE VI to_integers(V v) {
  return reinterpret_cast<VI>(v + splat(0x1.8p23f)) - reinterpret_cast<VI>(splat(0x1.8p23f));
}

// Writes integers up to 2^15 into numbers [at, at + W) of a group; 2^15 itself becomes 2^15 - 1.
// Returns what was written.
HYLORA_INLINE VI put_numbers(FixedGroup* group, int at, VI v) {
  typedef int16_t VS __attribute__((vector_size(2 * W), aligned(2)));
  v = v > 32767 ? VI{} + 32767 : v;
  *reinterpret_cast<VS*>(group->numbers + at) = __builtin_convertvector(v, VS);
  return v;
}

HYLORA_INLINE int32_t sum_of(VI v) {
  int32_t sum = 0;
  for (int i = 0; i < W; i++)
    sum += v[i];
  return sum;
}

// `width` numbers, at most 64, and zeros behind them; low may be null.
template <class T>
HYLORA_APART void fix_group(const T* from, int64_t width, FixedGroup* high, FixedGroup* low) {
  const Row rows[2] = {load_row(from, int(width)), load_row(from + 32, int(width - 32))};
  VU largest{};
  for (const Row& row : rows)
    for (int i = 0; i < P; i++) {
      const VU magnitude = float_as_bits(row.v[i]) & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
  uint32_t most = 0;
  for (int i = 0; i < W; i++)
    most = largest[i] > most ? largest[i] : most;
  const int exponent = int(most >> 23);  // all numbers are below 2^(exponent - 126)
  if (most == 0 || exponent == 255) {
    *high = {};
    high->scale = exponent ? __builtin_nanf("") : 0.0f;
    if (low) *low = *high;
    return;
  }
  // From 7 on, low limbs' scale is a float; at 7 they are multiples of the smallest one. Two
  // factors, since 2^shift alone may be no float.
  const int shift = 141 - (exponent < 7 ? 7 : exponent), half = shift / 2;
  const V up = splat(power_of_two(half)), rest = splat(power_of_two(shift - half));
  VI high_sum{}, low_sum{};
  for (int part = 0; part < 2; part++)
    for (int i = 0; i < P; i++) {
      const V scaled = rows[part].v[i] * up * rest;
      const int at = part * 32 + i * W;
      const VI whole = put_numbers(high, at, to_integers(scaled));
      high_sum += whole;
      if (!low) continue;
      const V left = scaled - __builtin_convertvector(whole, V);
      low_sum += put_numbers(low, at, to_integers(left * splat(0x1p15f)));
    }
  high->sum = sum_of(high_sum);
  high->scale = power_of_two(-half) * power_of_two(half - shift);
  if (!low) return;
  low->sum = sum_of(low_sum);
  low->scale = high->scale * 0x1p-15f;
}

// Row r of the fixed point rows from k numbers.
template <class T>
void fix_row(const T* from, int64_t k, const FixedRows& to, int64_t r) {
  for (int64_t g = 0; g < ceil_div(k, 64); g++) {
    FixedGroup* high = to.at(r, g);
    fix_group(from + g * 64, smaller(k - g * 64, 64), high, to.limbs > 1 ? high + 1 : nullptr);
  }
}

}  // namespace
}  // namespace hylora
