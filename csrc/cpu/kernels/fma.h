// Products by fused multiply-adds: rows of floats times panels, at any vector width.
#pragma once
#include "codes.h"

namespace hylora {
namespace {

// Pointers to number k of MR rows: one for every three rows, which lie at the pointer plus 0, 1 or
// 2 strides. So few registers hold all addresses; with one offset for each row, the compiler would
// reload them at every k.
template <class A, int MR>
struct RowPointers {
  static constexpr int kThirds = (MR + 2) / 3;
  const char* third[kThirds];
  int64_t stride;

  HYLORA_MEMBER RowPointers(const A* a, int64_t lda) : stride(lda * int64_t(sizeof(A))) {
#pragma GCC unroll 4
    for (int i = 0; i < kThirds; i++)
      third[i] = reinterpret_cast<const char*>(a + 3 * i * lda);
  }
  HYLORA_MEMBER const A* at(int r) const {
    return reinterpret_cast<const A*>(third[r / 3] + (r % 3) * stride);
  }
  HYLORA_MEMBER void advance(int count) {
#pragma GCC unroll 4
    for (int i = 0; i < kThirds; i++) {
      third[i] += count * int64_t(sizeof(A));
      asm("" : "+r"(third[i]));
    }
  }
};

// The sums of MR rows by kVectors vectors of columns, in registers. Each sum is kept as U separate
// ones, so that with few rows an addition needn't wait for the one before.
template <int MR, int U, int kVectors>
struct Sums {
  V v[U][MR][kVectors];

  HYLORA_MEMBER Sums() {
#pragma GCC unroll 4
    for (int u = 0; u < U; u++)
#pragma GCC unroll 8
      for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++)
          v[u][r][i] = V{};
  }
  HYLORA_MEMBER void add(int u, int r, V factor, const V* w) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++)
      v[u][r][i] = fma(factor, w[i], v[u][r][i]);
  }
  // to = (from or 0) + the sums. They are rows r0 and on of a tile, or of one tile for each panel.
  HYLORA_MEMBER void store_sums(const float* from, float* to, int r0) const {
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; i++) {
        const int at = i / P * 1024 + tile_at(r0 + r, i % P);
        V total = v[0][r][i];
#pragma GCC unroll 4
        for (int u = 1; u < U; u++)
          total += v[u][r][i];
        if (from) total += load(from + at);
        store(to + at, total);
      }
  }
};

// Numbers of k in an iteration of the loop below: with fewer, loop control and address arithmetic
// would slow down the multiply-adds.
constexpr int kUnrolledK = 4;

// Rows [r0, r0 + MR) times `Vectors` vectors of columns of one or two [k][32] panels. Every
// iteration prefetches `Lines` lines of each panel, `ahead` bytes on. Not inlined: together with a
// tile's other loops the compiler would run out of registers.
template <class T, int MR, int U, int Vectors, int Lines>
HYLORA_APART void fma_rows(const Term<float>& term, const float* from, float* to, int r0,
                           int64_t ahead) {
  constexpr int Wide = (Vectors + P - 1) / P;
  Sums<MR, U, Vectors> sums;
  RowPointers<float, MR> a(term.a + r0 * term.lda, term.lda);
  const T* b = static_cast<const T*>(term.b);
  auto one = [&](int u) HYLORA_LAMBDA {
    V w[Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; i++)
      w[i] = load(b + i / P * term.b_plane + u * 32 + i % P * W);
#pragma GCC unroll 8
    for (int r = 0; r < MR; r++)
      sums.add(u % U, r, splat(a.at(r)[u]), w);
  };
  const char* fetch = reinterpret_cast<const char*>(b) + ahead;
  int64_t k = 0;
  for (; k + kUnrolledK <= term.k; k += kUnrolledK) {
#pragma GCC unroll 16
    for (int line = 0; line < Wide * Lines; line++)
      __builtin_prefetch(fetch + line / Wide * 64 + line % Wide * term.b_plane * sizeof(T));
    fetch += 64 * Lines;
#pragma GCC unroll 4
    for (int u = 0; u < kUnrolledK; u++)
      one(u);
    a.advance(kUnrolledK), b += kUnrolledK * 32;
  }
  for (; k < term.k; k++) {
    one(0);
    a.advance(1), b += 32;
  }
  sums.store_sums(from, to, r0);
}

// A pair of weights of each of W columns: 32-bit lanes hold those of an even and of the next, odd
// k, so a shift widens one and a mask the other.
struct WidenedPair {
  V even, odd;
  HYLORA_MEMBER explicit WidenedPair(const bf16* lanes) {
    const VU both = *reinterpret_cast<const VUu*>(lanes);
    even = bits_as_float(both << 16);
    odd = bits_as_float(both & 0xffff0000u);
  }
};

// The same for a bf16 panel, in the order of memory: 32 k by 16 columns, 1 KB, lie side by side.
// The processor's own prefetchers follow one stream further than prefetch instructions reach, which
// wait for a place among the lines under way to L1 (Zen 4, M = 1 out of DRAM: 24 GB/s. Two streams,
// 1 KB apart, with prefetches: 10. A dot product: 27).
template <int MR, int U>
HYLORA_APART void fma_rows_paired(const Term<float>& term, const float* from, float* to, int r0) {
  constexpr int kHalf = 16 / W;  // vectors in half a row of a panel
  Sums<MR, U, kHalf> sums[2];
  RowPointers<float, MR> a(term.a + r0 * term.lda, term.lda);
  const bf16* b = static_cast<const bf16*>(term.b);
  for (int64_t k = 0; k < term.k; k += 32, b += 1024) {
    const int64_t pairs = ceil_div(smaller(term.k - k, 32), 2);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      RowPointers<float, MR> at = a;
      const bf16* line = b + half * 512;
      auto one = [&](int u) HYLORA_LAMBDA {
        V even[kHalf], odd[kHalf];
#pragma GCC unroll 4
        for (int i = 0; i < kHalf; i++) {
          const WidenedPair pair(line + u * 32 + i * W * 2);
          even[i] = pair.even, odd[i] = pair.odd;
        }
#pragma GCC unroll 8
        for (int r = 0; r < MR; r++) {
          sums[half].add(0, r, splat(at.at(r)[2 * u]), even);
          sums[half].add(U - 1, r, splat(at.at(r)[2 * u + 1]), odd);
        }
      };
      int64_t pair = 0;
      for (; pair + kUnrolledK <= pairs; pair += kUnrolledK) {
#pragma GCC unroll 4
        for (int u = 0; u < kUnrolledK; u++)
          one(u);
        at.advance(2 * kUnrolledK), line += 32 * kUnrolledK;
      }
      for (; pair < pairs; pair++) {
        one(0);
        at.advance(2), line += 32;
      }
    }
    a.advance(32);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++)
    sums[half].store_sums(from ? from + half * 256 : nullptr, to + half * 256, r0);
}

// Numbers [0, k) of a bf16 panel as floats, [k][32].
HYLORA_APART void widen_panel(const bf16* b, int64_t k, float* to) {
  for (int64_t k0 = 0; k0 < k; k0 += 32, b += 1024, to += 1024)
    for (int half = 0; half < 2; half++)
      for (int64_t pair = 0; pair < ceil_div(smaller(k - k0, 32), 2); pair++)
#pragma GCC unroll 4
        for (int i = 0; i < 16 / W; i++) {
          const WidenedPair both(b + half * 512 + pair * 32 + i * W * 2);
          store(to + pair * 64 + half * 16 + i * W, both.even);
          store(to + pair * 64 + 32 + half * 16 + i * W, both.odd);
        }
}

// Multiplies floats, which x and h are converted to, by panels of T.
template <class T>
struct Fma {
  using A = float;
  static constexpr int kPlanes = 1;
  static constexpr bool kTiles = false;
  static constexpr bool kPaired = sizeof(T) == 2 && __is_same(T, bf16);
  // One instruction makes twice as many products of 16-bit integers as of floats, and of a float32
  // each product is two.
#if defined(__SSE2__)
  static constexpr bool kFixedPoint = sizeof(T) == 2;
#else
  static constexpr bool kFixedPoint = false;
#endif
  // With two panels the sums of 6 rows fit the registers, and 10 loads feed 24 multiply-adds; with
  // one, 8 rows need 10 loads for 16 (1.08x).
  static constexpr int kPanelsPerTile = kPaired || W < 16 ? 1 : 2;
  static constexpr int64_t kStretch = 96;     // numbers of k that are summed in one chain
  static constexpr int64_t kChunkBlocks = 8;  // k-blocks a pass over a block of rows sums
  static constexpr int64_t kRows = 192;       // rows of a block

  void begin(int) {}
  void end() {}

  // to = (from or 0) + the terms, for the first `rows` rows of the tile. Every stretch of k is
  // summed from zero and then added: rounding errors grow with the length of a chain of additions,
  // and a stretch of the panel stays in L1 while all rows pass it.
  template <class Interleave>
  void tile(const Term<float>* terms, int count, const float* from, float* to, int rows,
            int64_t columns, bool cold, Interleave&& step) {
    step();
    for (int s = 0; s < count; s++) {
      if (terms[s].bits) {
        multiply_quantized(terms[s], from, to, rows, columns);
        from = to;
        continue;
      }
      for (int64_t k = 0; k < terms[s].k; k += kStretch) {
        Term<float> piece = terms[s];
        piece.a += k;
        piece.b = static_cast<const T*>(piece.b) + k * 32;
        piece.k = piece.k - k < kStretch ? piece.k - k : kStretch;
        if constexpr (kPaired)
          paired_stretch(piece, from, to, rows);
        else if constexpr (kPanelsPerTile == 2)
          double_stretch(piece, from, to, rows, columns, cold);
        else if constexpr (W == 16)
          stretch<P, 8, 4, 2, 1>(piece, from, to, rows, cold);
        else if constexpr (W == 8)
          stretch<P, 3, 1>(piece, from, to, rows, cold);
        else
          stretch<P, 1>(piece, from, to, rows, cold);
        from = to;
      }
    }
    if (from != to) copy_sums(from, to, columns);
  }

  // to = from or 0.
  static void copy_sums(const float* from, float* to, int64_t columns) {
    for (int i = 0; i < 1024 * (columns > 32 ? kPanelsPerTile : 1); i++)
      to[i] = from ? from[i] : 0.0f;
  }

  // The term's quantised panel, or two of them, times rows of fixed point.
  static void multiply_quantized(const Term<float>& term, const float* from, float* to, int rows,
                                 int64_t columns) {
    if (from != to) copy_sums(from, to, columns);
    for (int panel = 0; panel < (columns > 32 ? kPanelsPerTile : 1); panel++, to += 1024) {
      const char* b = static_cast<const char*>(term.b) + panel * term.b_plane;
      if (term.is_widened)
        multiply_widened_units(term.fixed, reinterpret_cast<const WidenedUnit*>(b),
                               ceil_div(term.k, kGroup), to, rows);
      else
        with_bits(term.bits, [&](auto bits) {
          multiply_codes<decltype(bits)::value>(term.fixed, b, to, rows);
        });
    }
  }

  // Vectors beyond the last column are left out, since few ranks are a multiple of 64 (K = 1267,
  // r = 33, M = 1316: 2.1 ms instead of 2.5). A single panel is summed in the same groups of rows
  // as a double one, so that it gives the same bits.
  static void double_stretch(const Term<float>& term, const float* from, float* to, int rows,
                             int64_t columns, bool cold) {
    if (columns > 48) return stretch<4, 6, 4, 2, 1>(term, from, to, rows, cold);
    if (columns > 32) return stretch<3, 6, 4, 2, 1>(term, from, to, rows, cold);
    if (columns > 16) return stretch<2, 6, 4, 2, 1>(term, from, to, rows, cold);
    stretch<1, 6, 4, 2, 1>(term, from, to, rows, cold);
  }

  // Takes `rows` in groups of Most rows while there are that many, then in groups of each of More.
  // All groups together prefetch a cold panel 8 KB ahead, each a share of the lines, so that memory
  // is busy while any of them multiplies.
  template <int Vectors, int Most, int... More>
  HYLORA_INLINE void stretch(const Term<float>& term, const float* from, float* to, int rows,
                             bool cold) {
    constexpr int kLines = kUnrolledK * int(sizeof(T)) / 2;      // of a panel in an iteration
    const bool odd_few = Most == 6 && (rows == 3 || rows == 5);  // 2 + 1 and 4 + 1
    const int groups = odd_few ? 2 : (rows + Most - 1) / Most;
    const int lines = !cold ? 0 : groups == 1 ? kLines : groups == 2 ? kLines / 2 : kLines / 4 + 1;
    const int64_t share = ceil_div(term.k, kUnrolledK) * lines * 64;
    int64_t ahead = 8192;
    int r = 0;
    auto groups_of = [&](auto mr) HYLORA_LAMBDA {
      constexpr int MR = decltype(mr)::value;
      constexpr int few = W < 16 ? 2 : 4;
      constexpr int U = MR >= few ? 1 : W < 16 || MR > 1 ? 2 : 4;
      // 8 rows are taken as 4 and 4, not as 6 and 2.
      for (; rows - r >= MR && !(MR == 6 && rows - r == 8); r += MR, ahead += share)
        if (lines == 0)
          fma_rows<T, MR, U, Vectors, 0>(term, from, to, r, ahead);
        else if (lines == kLines)
          fma_rows<T, MR, U, Vectors, kLines>(term, from, to, r, ahead);
        else if (lines == kLines / 2)
          fma_rows<T, MR, U, Vectors, kLines / 2>(term, from, to, r, ahead);
        else
          fma_rows<T, MR, U, Vectors, kLines / 4 + 1>(term, from, to, r, ahead);
    };
    groups_of(Int<Most>());
    (groups_of(Int<More>()), ...);
  }

  // Up to 4 rows, and all with AVX-512's registers, are multiplied as the panel is read.
  static void paired_stretch(const Term<float>& term, const float* from, float* to, int rows) {
    int r = 0;
    if constexpr (W == 16) {
      for (; rows - r >= 8; r += 8)
        fma_rows_paired<8, 1>(term, from, to, r);
      for (; rows - r >= 4; r += 4)
        fma_rows_paired<4, 2>(term, from, to, r);
    } else if (rows > 4) {
      return widened_stretch(term, from, to, rows);
    }
    for (; rows - r >= 2; r += 2)
      fma_rows_paired<2, W == 16 ? 2 : 1>(term, from, to, r);
    if (rows > r) fma_rows_paired<1, 2>(term, from, to, r);
  }

  // 16 registers hold few sums beside the parts of widened weights. So with more rows the stretch
  // is widened once, into L1, and taken by halves, of which the sums of 6 rows fit (Zen 4, AVX2, M
  // = 7: 7.5 GB/s out of DRAM and L3 instead of 5.4, M = 16: 3.5 instead of 2.3).
  static void widened_stretch(const Term<float>& term, const float* from, float* to, int rows) {
    alignas(64) float widened[kStretch * 32];
    widen_panel(static_cast<const bf16*>(term.b), term.k, widened);
    // Each group fetches a share of the next stretch, so that memory is busy all the time.
    const char* fetch = static_cast<const char*>(term.b) + kStretch * 32 * sizeof(bf16);
    for (int half = 0; half < 2; half++) {
      Term<float> piece = term;
      piece.b = widened + half * 16;
      const float* sums = from ? from + half * 256 : nullptr;
      int r = 0;
      auto groups_of = [&](auto mr) HYLORA_LAMBDA {
        constexpr int MR = decltype(mr)::value;
        for (; rows - r >= MR && !(MR == 6 && (rows - r == 7 || rows - r == 8)); r += MR) {
          const int64_t ahead = fetch - static_cast<const char*>(piece.b);
          fetch += ceil_div(term.k, kUnrolledK) * 64;
          fma_rows<float, MR, (MR > 3 ? 1 : 2), 16 / W, 1>(piece, sums, to + half * 256, r, ahead);
        }
      };
      groups_of(Int<6>()), groups_of(Int<4>()), groups_of(Int<3>()), groups_of(Int<1>());
    }
  }

  static HYLORA_MEMBER Row row(const float* sums) { return tile_row(sums); }
  static HYLORA_MEMBER void put(float* at, int64_t, const Row& value) { store_row(at, value); }
  static HYLORA_MEMBER Row get(const float* at, int64_t) { return load_row(at); }
};

}  // namespace
}  // namespace hylora
