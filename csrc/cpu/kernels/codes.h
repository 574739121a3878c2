// Products by quantised panels (quantized_panels.h). Few rows are fixed point, and codes are
// multiplied as integers, which is exact; every group of 64 k is then one step in float:
//
//     y += scale_x scale_W (sum_k x_k code_k - zero sum_k x_k)
//
// For many rows panels are widened into those of the call's type first (block.h).
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

// sum + the products of both 16-bit halves of each lane; a code's half is never negative.
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
  const VI both = reinterpret_cast<VI>(numbers);
  const VI even = reinterpret_cast<VI>(codes & 0xffff), odd = reinterpret_cast<VI>(codes >> 16);
  return sum + even * (both << 16 >> 16) + odd * (both >> 16);
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

// The codes of pair J, in the halves of a lane, of W rows; `lanes` are those of half a unit.
template <int kBits, int J, int kUp = 0>
HYLORA_INLINE VU codes_of_pair(const char* lanes) {
  typedef uint16_t Halves __attribute__((vector_size(4 * W), aligned(2)));
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
HYLORA_INLINE void multiply_unit(const char* unit, const FixedGroup* group, const FixedRows& rows,
                                 float* to, int r0) {
  // Sums that the registers hold beside codes, a mask and numbers.
  constexpr int kSums = W == 16 ? 16 : 8;
  constexpr int kVectors = MR * P <= kSums ? P : kSums / MR;
  // One row takes all whole pairs of a lane together: the lane is loaded once.
  constexpr int kFit = 16 / kBits, kWhole = kFit * kBits, kTogether = MR == 1 ? kFit : 1;
  const int64_t row_bytes = rows.groups * int64_t(sizeof(FixedGroup));
  for (int i0 = 0; i0 < P; i0 += kVectors) {
    VI sums[MR][kVectors] = {};
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
            __builtin_memcpy(&two, numbers + r * row_bytes + 4 * (kFirst + j), 4);
            both[r][j] = splat_bits(two);
          }
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++)
          unrolled<0, kCount>([&](auto j) HYLORA_LAMBDA {
            constexpr int J = decltype(j)::value;
            const VU pair = codes_of_pair<kBits, kFirst + J>(lanes + i * W * 4);
#pragma GCC unroll 8
            for (int r = 0; r < MR; r++)
              add_products(sums[r][i], pair, both[r][J]);
          });
      };
      unrolled<0, kWhole, kTogether>([&](auto j) HYLORA_LAMBDA { add_pairs(j, Int<kTogether>()); });
      unrolled<kWhole, 16>([&](auto j) HYLORA_LAMBDA { add_pairs(j, Int<1>()); });
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      const UnitScales<kBits> of(unit, i0 + i);
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++) {
        const FixedGroup& fixed = group[r * rows.groups];
        const VI dot = sums[r][i] - of.zero * fixed.sum;
        float* at = to + tile_at((r0 + r) >> rows.limbs / 2, i0 + i);
        store(at, fma(__builtin_convertvector(dot, V) * of.scale, splat(fixed.scale), load(at)));
      }
    }
  }
}

// to += `rows` rows times a quantised panel. Each unit passes all rows while it is in
// L1, so panels are read in the order of memory.
template <int kBits>
HYLORA_APART void multiply_codes(const FixedRows& fixed, const char* unit, float* to, int rows) {
  constexpr int64_t kAhead = 4096;
  const int count = rows * fixed.limbs;
  for (int64_t g = 0; g < fixed.groups; g++, unit += unit_bytes(kBits)) {
    const FixedGroup* group = fixed.data + g;
    for (int64_t line = 0; line < unit_bytes(kBits); line += 64)
      __builtin_prefetch(unit + kAhead + line);
    int r = 0;
    auto rows_of = [&](auto mr) HYLORA_LAMBDA {
      constexpr int MR = decltype(mr)::value;
      for (; count - r >= MR; r += MR)
        multiply_unit<kBits, MR>(unit, group + r * fixed.groups, fixed, to, r);
    };
    if constexpr (W == 16) rows_of(Int<8>());
    rows_of(Int<4>()), rows_of(Int<2>()), rows_of(Int<1>());
  }
}

// A pair of k of W columns into a panel of T, whose block of 32 k begins at `to`.
template <class T>
HYLORA_INLINE void put_pair(T* to, int i, int j, V even, V odd) {
  store(to + 2 * j * 32 + i * W, even);
  store(to + (2 * j + 1) * 32 + i * W, odd);
}
HYLORA_INLINE void put_pair(bf16* to, int i, int j, V even, V odd) {
  const int column = i * W;
  *reinterpret_cast<VUu*>(to + (column >> 4) * 512 + j * 32 + (column & 15) * 2) =
      bf16_bits(even) | bf16_bits(odd) << 16;
}

// Blocks [block, block + count) of 32 k of a quantised panel as blocks of a panel of T.
template <int kBits, class T>
HYLORA_APART void widen_codes(const char* panel, int64_t block, int64_t count, T* to) {
  for (int64_t b = block; b < block + count; b++, to += 1024) {
    const char* unit = panel + b / 2 * unit_bytes(kBits);
    for (int i = 0; i < P; i++) {
      const UnitScales<kBits> of(unit, i);
      const char* lanes = unit + b % 2 * kBits * 128 + i * W * 4;
      unrolled<0, 16>([&](auto j) HYLORA_LAMBDA {
        constexpr int J = decltype(j)::value;
        const VU pair = codes_of_pair<kBits, J>(lanes);
        const VI even = reinterpret_cast<VI>(pair & 0xffff) - of.zero;
        const VI odd = reinterpret_cast<VI>(pair >> 16) - of.zero;
        put_pair(to, i, J, __builtin_convertvector(even, V) * of.scale,
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
