// Products by quantised panels (quantized_panels.h). Where rows are fixed point, codes are
// multiplied as integers, which is exact; every group of 64 k is then one step in float:
//
//     y += scale_x scale_W (sum_k x_k code_k - zero sum_k x_k)
//
// Few rows multiply codes as they are read. For many, a panel is widened first, once for all row
// tiles of a block (block.h): into 16-bit numbers, code - zero, or, where rows are no fixed point,
// into a panel of the call's type.
#pragma once
#include "../quantized_panels.h"
#include "tile.h"

namespace hylora {
namespace {

HYLORA_INLINE VU splat_bits(uint32_t bits) {
#if defined(__AVX512F__)
  return (VU)_mm512_set1_epi32(int(bits));
#elif defined(__AVX2__)
  return (VU)_mm256_set1_epi32(int(bits));
#else
  return VU{bits, bits, bits, bits};
#endif
}

// sum + the products of both 16-bit halves of each lane.
HYLORA_INLINE VI multiply_add(VI sum, VU codes, VU numbers) {
#if defined(__AVX512VNNI__)
  return (VI)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, (__m512i)numbers);
#elif defined(__AVX512BW__)
  return sum + (VI)_mm512_madd_epi16((__m512i)codes, (__m512i)numbers);
#elif defined(__AVX2__)
  return sum + (VI)_mm256_madd_epi16((__m256i)codes, (__m256i)numbers);
#elif defined(__SSE2__)
  return sum + (VI)_mm_madd_epi16((__m128i)codes, (__m128i)numbers);
#else
  const VI a = reinterpret_cast<VI>(codes), b = reinterpret_cast<VI>(numbers);
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// The same at this place: left to itself g++ makes many products first and then adds them, and has
// to spill them to the stack (AVX2, 4 bits: 7.6 GB/s out of memory instead of 14).
HYLORA_INLINE void add_products(VI& sum, VU codes, VU numbers) {
  sum = multiply_add(sum, codes, numbers);
#if defined(__AVX512F__)
  asm("" : "+v"(sum));
#elif defined(__SSE2__)
  asm("" : "+x"(sum));
#endif
}

// Calls work(Int<i>()) for i in [kBegin, kEnd), in steps of kStep.
template <int kBegin, int kEnd, int kStep = 1, class F>
HYLORA_INLINE void unrolled(const F& work) {
  if constexpr (kBegin < kEnd) {
    work(Int<kBegin>());
    unrolled<kBegin + kStep, kEnd, kStep>(work);
  }
}

typedef uint16_t Halves __attribute__((vector_size(4 * W), aligned(2)));

// The codes of pair J, in the halves of a lane, of W rows; `lanes` are those of half a unit.
template <int kBits, int J, int kUp = 0>
HYLORA_INLINE VU codes_of_pair(const char* lanes) {
  constexpr Piece piece = piece_at(kBits, J, kUp);
  constexpr int down = piece.shift - kUp;
  const Halves lane = *reinterpret_cast<const Halves*>(lanes + piece.lane * 128);
  VU codes = reinterpret_cast<VU>(down >= 0 ? lane >> (down & 15) : lane << (-down & 15));
  // The last bits of a half have nothing behind them, and nothing before them if they are first.
  constexpr bool is_masked = piece.shift + piece.width < 16 || (kUp > 0);
  if constexpr (is_masked) codes &= ((1u << piece.width) - 1) * 0x10001 << kUp;
  if constexpr (kUp + piece.width < kBits)
    codes |= codes_of_pair<kBits, J, kUp + piece.width>(lanes);
  return codes;
}

// W bytes as integers.
HYLORA_INLINE VI zeros_at(const char* bytes) {
#if defined(__AVX512F__)
  return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
  return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
  typedef uint8_t VB __attribute__((vector_size(W), aligned(1)));
  return __builtin_convertvector(*reinterpret_cast<const VB*>(bytes), VI);
#endif
}

// Scales and zero points of the W rows of vector i.
template <int kBits>
struct UnitScales {
  V scale;
  VI zero;

  HYLORA_MEMBER UnitScales(const char* unit, int i) {
    const char* scales = unit + code_bytes(kBits);
    scale = load(reinterpret_cast<const fp16*>(scales) + i * W);
    if constexpr (kBits == 8)
      zero = VI{} + 128;
    else
      zero = zeros_at(scales + 64 + i * W);
  }
};

// Adds the products of MR rows of fixed point and a unit to a tile's sums.
template <int kBits, int MR>
HYLORA_INLINE void multiply_unit(const char* unit, const FixedGroup* group, int limbs, float* to,
                                 int r0) {
  // Sums that the registers hold beside codes, a mask and numbers.
  constexpr int kSums = W == 16 ? 16 : 8;
  constexpr int kVectors = MR * P <= kSums ? P : kSums / MR;
  // One row takes all whole pairs of a lane together: the lane is loaded once.
  constexpr int kFit = 16 / kBits, kWhole = kFit * kBits, kTogether = MR == 1 ? kFit : 1;
  // One row has two sums, whose additions would wait for one another, so each is kept as several.
  // Of 4 bits, the pairs in the middle of halves are multiplied where they lie: `second` is 16
  // times and `third` 256 times as large (at most 16 * 15 * 256 * 2^15 < 2^31), and two shifts are
  // saved.
  constexpr int kChains = W == 16 && MR == 1 ? 2 : 1;
  constexpr bool kInPlace = kChains == 2 && kBits == 4;
  for (int i0 = 0; i0 < P; i0 += kVectors) {
    VI sums[MR][kVectors] = {}, second[kVectors] = {}, third[kVectors] = {};
    for (int half = 0; half < 2; half++) {
      const char* lanes = unit + half * kBits * 128 + i0 * W * 4;
      const char* numbers = reinterpret_cast<const char*>(group->numbers + half * 32);
      const auto add_pairs = [&](auto first, auto count) HYLORA_LAMBDA {
        constexpr int kFirst = decltype(first)::value, kCount = decltype(count)::value;
        VU both[MR][kCount];
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
          for (int j = 0; j < kCount; j++) {
            uint32_t two;
            __builtin_memcpy(&two, numbers + r * sizeof(FixedGroup) + 4 * (kFirst + j), 4);
            both[r][j] = splat_bits(two);
          }
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++)
          unrolled<0, kCount>([&](auto j) HYLORA_LAMBDA {
            constexpr int J = decltype(j)::value;
            if constexpr (kInPlace && J % 4 > 0 && J % 4 < 3) {
              const VU lane = *reinterpret_cast<const VUu*>(lanes + kFirst / 4 * 128 + i * W * 4);
              add_products((J == 1 ? second : third)[i], lane & splat_bits(0xf000f << 4 * J),
                           both[0][J]);
            } else {
              const VU pair = codes_of_pair<kBits, kFirst + J>(lanes + i * W * 4);
#pragma GCC unroll 8
              for (int r = 0; r < MR; r++)
                add_products(kChains == 2 && !kInPlace && (kFirst + J) % 2 ? second[i] : sums[r][i],
                             pair, both[r][J]);
            }
          });
      };
      unrolled<0, kWhole, kTogether>([&](auto j) HYLORA_LAMBDA { add_pairs(j, Int<kTogether>()); });
      unrolled<kWhole, 16>([&](auto j) HYLORA_LAMBDA { add_pairs(j, Int<1>()); });
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      const UnitScales<kBits> of(unit, i0 + i);
      if constexpr (kInPlace) second[i] = (second[i] >> 4) + (third[i] >> 8);
      if constexpr (kChains == 2) sums[0][i] += second[i];
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++) {
        const FixedGroup& fixed = group[r];
        const VI dot = sums[r][i] - of.zero * fixed.sum;
        float* at = to + tile_at((r0 + r) >> limbs / 2, i0 + i);
        store(at, fma(__builtin_convertvector(dot, V) * of.scale, splat(fixed.scale), load(at)));
      }
    }
  }
}

// A unit whose codes are 16-bit numbers, less their zero points.
struct alignas(64) WidenedUnit {
  uint32_t pairs[32][32];  // [pair of k][row of W], a number in each half
  float scales[32];
};

template <int kBits>
HYLORA_INLINE void widen_unit(const char* unit, WidenedUnit* to) {
  for (int i = 0; i < P; i++) {
    const UnitScales<kBits> of(unit, i);
    store(to->scales + i * W, of.scale);
    const Halves zeros = reinterpret_cast<Halves>(of.zero | of.zero << 16);
    const char* lanes = unit + i * W * 4;
    for (int half = 0; half < 2; half++, lanes += kBits * 128)
      unrolled<0, 16>([&](auto j) HYLORA_LAMBDA {
        constexpr int J = decltype(j)::value;
        const Halves codes = reinterpret_cast<Halves>(codes_of_pair<kBits, J>(lanes));
        *reinterpret_cast<VUu*>(to->pairs[half * 16 + J] + i * W) =
            reinterpret_cast<VU>(codes - zeros);
      });
  }
}

// Units [unit, unit + count) of a quantised panel.
template <int kBits>
HYLORA_APART void widen_units(const char* panel, int64_t unit, int64_t count, WidenedUnit* to) {
  for (int64_t u = 0; u < count; u++)
    widen_unit<kBits>(panel + (unit + u) * unit_bytes(kBits), to + u);
}

// Adds the products of MR rows of fixed point and a unit to a tile's sums. The registers hold the
// sums of 6 rows beside two vectors of numbers, so that 8 loads feed 12 products of 16 or 32.
template <int MR>
HYLORA_APART void multiply_widened(const WidenedUnit& unit, const FixedGroup* group, int limbs,
                                   float* to, int r0) {
  constexpr int kVectors = 2, kUnrolled = 4;
  for (int i0 = 0; i0 < P; i0 += kVectors) {
    VI sums[MR][kVectors] = {};
    const char* numbers = reinterpret_cast<const char*>(group->numbers);
    for (int pair = 0; pair < 32; pair += kUnrolled) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnrolled; u++) {
        VU codes[kVectors];
#pragma GCC unroll 2
        for (int i = 0; i < kVectors; i++)
          codes[i] = *reinterpret_cast<const VUu*>(unit.pairs[pair + u] + (i0 + i) * W);
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
          uint32_t two;
          __builtin_memcpy(&two, numbers + r * sizeof(FixedGroup) + 4 * (pair + u), 4);
          const VU both = splat_bits(two);
#pragma GCC unroll 2
          for (int i = 0; i < kVectors; i++)
            add_products(sums[r][i], codes[i], both);
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; i++) {
      const V scale = load(unit.scales + (i0 + i) * W);
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++) {
        const V product = __builtin_convertvector(sums[r][i], V) * scale;
        float* y = to + tile_at((r0 + r) >> limbs / 2, i0 + i);
        store(y, fma(product, splat(group[r].scale), load(y)));
      }
    }
  }
}

// to += `rows` rows times `count` units, as many at a time as the registers hold.
HYLORA_APART void multiply_widened_units(const FixedRows& fixed, const WidenedUnit* units,
                                         int64_t count, float* to, int rows) {
  const int numbers = rows * fixed.limbs;
  for (int64_t g = 0; g < count; g++) {
    int r = 0;
    auto rows_of = [&](auto mr) HYLORA_LAMBDA {
      constexpr int MR = decltype(mr)::value;
      // 8 rows are taken as 4 and 4, not as 6 and 2.
      for (; numbers - r >= MR && !(MR == 6 && numbers - r == 8); r += MR)
        multiply_widened<MR>(units[g], fixed.at(0, g) + r, fixed.limbs, to, r);
    };
    if constexpr (W == 16) rows_of(Int<8>());
    rows_of(Int<6>()), rows_of(Int<4>()), rows_of(Int<2>()), rows_of(Int<1>());
  }
}

// Rows from which on a unit is widened into L1 first, and not each time a few rows pass it.
constexpr int kWidenedRows = 6;

// to += `rows` rows times a quantised panel. Each unit passes all rows while it is in
// L1, so panels are read in the order of memory.
template <int kBits>
HYLORA_APART void multiply_codes(const FixedRows& fixed, const char* unit, float* to, int rows) {
  constexpr int64_t kAhead = 4096;
  const int count = rows * fixed.limbs;
  for (int64_t g = 0; g < fixed.groups; g++, unit += unit_bytes(kBits)) {
    const FixedGroup* group = fixed.at(0, g);
    for (int64_t line = 0; line < unit_bytes(kBits); line += 64)
      __builtin_prefetch(unit + kAhead + line);
    if (count >= kWidenedRows) {
      WidenedUnit widened;
      widen_unit<kBits>(unit, &widened);
      multiply_widened_units(fixed.from(0, g), &widened, 1, to, rows);
      continue;
    }
    int r = 0;
    auto rows_of = [&](auto mr) HYLORA_LAMBDA {
      constexpr int MR = decltype(mr)::value;
      for (; count - r >= MR; r += MR)
        multiply_unit<kBits, MR>(unit, group + r, fixed.limbs, to, r);
    };
    if constexpr (W == 16) rows_of(Int<8>());
    rows_of(Int<4>()), rows_of(Int<2>()), rows_of(Int<1>());
  }
}

// A pair of k of W columns into a panel of T, whose block of 32 k begins at `to`; k are ld apart.
template <class T>
HYLORA_INLINE void put_pair(T* to, int64_t ld, int i, int j, V even, V odd) {
  store(to + 2 * j * ld + i * W, even);
  store(to + (2 * j + 1) * ld + i * W, odd);
}
HYLORA_INLINE void put_pair(bf16* to, int64_t, int i, int j, V even, V odd) {
  const int column = i * W;
  *reinterpret_cast<VUu*>(to + (column >> 4) * 512 + j * 32 + (column & 15) * 2) =
      bf16_pairs(even, odd);
}

// Blocks [block, block + count) of 32 k of a quantised panel as blocks of a panel of T, in which
// numbers of one column are ld apart.
template <int kBits, class T>
HYLORA_APART void widen_codes(const char* panel, int64_t block, int64_t count, T* to,
                              int64_t ld = 32) {
  for (int64_t b = block; b < block + count; b++, to += 32 * ld) {
    const char* unit = panel + b / 2 * unit_bytes(kBits);
    for (int i = 0; i < P; i++) {
      const UnitScales<kBits> of(unit, i);
      const char* lanes = unit + b % 2 * kBits * 128 + i * W * 4;
      unrolled<0, 16>([&](auto j) HYLORA_LAMBDA {
        constexpr int J = decltype(j)::value;
        const VU pair = codes_of_pair<kBits, J>(lanes);
        const VI even = reinterpret_cast<VI>(pair & 0xffff) - of.zero;
        const VI odd = reinterpret_cast<VI>(pair >> 16) - of.zero;
        put_pair(to, ld, i, J, __builtin_convertvector(even, V) * of.scale,
                 __builtin_convertvector(odd, V) * of.scale);
      });
    }
  }
}

// Calls work(Int<bits>()).
template <class F>
void with_bits(int bits, const F& work) {
  switch (bits) {
  case 2:
    return work(Int<2>());
  case 3:
    return work(Int<3>());
  case 4:
    return work(Int<4>());
  case 5:
    return work(Int<5>());
  case 6:
    return work(Int<6>());
  default:
    return work(Int<8>());
  }
}

}  // namespace
}  // namespace hylora
