// The product of up to 16 rows of x with a quantised matrix, whose time is the time to read it.
//
// The matrix is the tensor cores' first operand, in tiles of 16 of its rows; x is the second. Of a
// group of 64 codes a thread holds 16 of each of its rows. A product may pair the k in any order
// that both operands share, so codes stay where their words hold them: two that lie 16 bits apart
// become two numbers by one shift, one logical operation and one subtraction, 2.5 to 3.2
// instructions a code in all. The warps of a block share the contraction, in runs of groups whose
// loads are all issued before the first product.
#pragma once
#include "decode.h"

namespace hylora::cuda {

// A group's codes lie in a plane of their LOW lowest bits and one of their HIGH others
// (reference.py, pack_bits). A low word holds four neighbours at each of its levels, LOW bits
// apart; a level's come 8 LOW codes after those of the one before. A thread of four has MINE
// neighbouring words of WORDS.
template <int BITS>
struct Planes {
  static constexpr int LOW = BITS == 8 ? 8 : BITS >= 4 ? 4 : 2, HIGH = BITS - LOW;
  static constexpr int MINE = LOW / 2, WORDS = 2 * BITS;
};

// A thread's 16 codes of one row of a group: its low words, and the high bits of each, shifted so
// that they lie where the low bits do.
template <int BITS>
struct Codes {
  Words<Planes<BITS>::MINE> low, high;
};

template <int BITS>
DEVICE Codes<BITS> read_codes(const uint32_t* group, int quarter) {
  using P = Planes<BITS>;
  using Mine = Words<P::MINE>;
  const int first = quarter * P::MINE;
  Codes<BITS> c;
  c.low = read_once(reinterpret_cast<const Mine*>(group + first));
  if constexpr (P::HIGH > 0) {
    const uint32_t* plane = group + 2 * P::LOW;
    c.high = read_once(reinterpret_cast<const Mine*>(plane + first % (2 * P::HIGH)));
#pragma unroll
    for (uint32_t& word : c.high.word)
      word >>= first / (2 * P::HIGH) * P::HIGH;
  }
  return c;
}

// Pair number `pair` of 8 of a thread's codes, minus the zero point: of four neighbours the first
// and third, or the second and fourth. Exact. offset: offset_of the zero point.
template <class T, int BITS>
DEVICE uint32_t numbers_of(const Codes<BITS>& c, int pair, uint32_t offset) {
  using P = Planes<BITS>;
  constexpr bool IS_BF16 = std::is_same_v<T, bf16>;
  constexpr uint32_t BOTH = 0x00010001u, ONES = IS_BF16 ? 0x43004300u : 0x64006400u;
  const int word = pair / 2 % P::MINE, shift = pair / 2 / P::MINE * P::LOW + pair % 2 * 8;
  const uint32_t low = c.low.word[word] >> shift;
  if constexpr (IS_BF16 && BITS == 8)
    // bfloat16 has room for seven bits: 128 + they, minus 128 with the eighth bit, 256 without.
    return minus<T>(and_or(low, 0x007F007Fu, ONES), and_or(~low, 0x00800080u, ONES));
  uint32_t numbers = and_or(low, (BOTH << P::LOW) - BOTH, ONES);
  if constexpr (P::HIGH > 0)
    numbers =
        and_or(c.high.word[word] >> shift << P::LOW, (BOTH << BITS) - (BOTH << P::LOW), numbers);
  return minus<T>(numbers, offset);
}

// What numbers_of subtracts: the zero point in the last bits of 128 as bfloat16, of 1024 as
// float16.
template <class T>
DEVICE uint32_t offset_of(uint32_t zero) {
  return (std::is_same_v<T, bf16> ? 0x43004300u : 0x64006400u) | zero | zero << 16;
}

// A thread's 16 numbers of x in the group that begins at k, paired as numbers_of pairs codes.
// WHOLE: loads of several numbers reach all of the group.
template <class T, int BITS, bool WHOLE>
DEVICE void read_x(uint32_t (&pairs)[8], const T* row, int k, int depth) {
  using P = Planes<BITS>;
  constexpr int RUN = 4 * P::MINE, LOAD = RUN < 8 ? RUN : 8;  // neighbours; of one load
  uint32_t word[8] = {};
#pragma unroll
  for (int i = 0; i < 16; i += LOAD) {
    const int at = k + i / RUN * 8 * P::LOW + thread_index() % 4 * RUN + i % RUN;
    if constexpr (WHOLE) {
      const auto found = read_often(reinterpret_cast<const Words<LOAD / 2>*>(row + at));
#pragma unroll
      for (int j = 0; j < LOAD / 2; j++)
        word[i / 2 + j] = found.word[j];
    } else {
#pragma unroll
      for (int j = 0; j < LOAD; j++)
        if (at + j < depth) word[(i + j) / 2] |= uint32_t(row[at + j].bits) << j % 2 * 16;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = low_halves(word[i], word[i + 1]);
    pairs[i + 1] = high_halves(word[i], word[i + 1]);
  }
}

// x_aligned: 16-byte loads reach every row of x. runs_aligned: one load brings all scales of a run,
// and one all zeros.
struct QuantizedLaunch {
  QuantizedCall d;
  bool x_aligned, runs_aligned;
};

// A block makes ROWS rows by COLUMNS columns of y: TILES times 8 rows of x by TALL times 16 rows of
// the matrix. It has WARPS warps; each takes RUN groups at a time.
template <int TILES_, int TALL_, int RUN_, int WARPS_>
struct QuantizedShape {
  static constexpr int TILES = TILES_, TALL = TALL_, RUN = RUN_, WARPS = WARPS_;
  static constexpr int ROWS = 8 * TILES, COLUMNS = 16 * TALL;
  struct Shared {
    float sums[WARPS][ROWS][COLUMNS];
  };
};

// A thread's 2 TALL rows of the matrix and TILES rows of x. Rows past the end repeat the last one,
// whose results are not stored twice.
template <class T, class S>
struct QuantizedLines {
  const uint32_t* codes;
  const fp16* scales;
  const uint8_t* zeros;
  int first[2 * S::TALL];  // the place of a row's first group among those of all rows
  const T* row[S::TILES];
  bool runs_aligned;
  int groups, depth;
};

// sums += the product over RUN groups from `group` on, all of which there are. WHOLE: loads of
// several numbers reach all of their x.
template <class T, int BITS, class S, int RUN, bool WHOLE>
DEVICE void add_run(float (&sums)[S::TALL][S::TILES][4], const QuantizedLines<T, S>& l, int group) {
  constexpr int LINES = 2 * S::TALL, PAIRS = (RUN + 1) / 2;
  const int quarter = thread_index() % 4;
  Codes<BITS> codes[RUN][LINES];
  float scale[RUN][LINES];
  uint32_t offset[RUN][LINES];
#pragma unroll
  for (int i = 0; i < RUN; i++)
#pragma unroll
    for (int line = 0; line < LINES; line++)
      codes[i][line] = read_codes<BITS>(
          l.codes + int64_t(l.first[line] + group + i) * Planes<BITS>::WORDS, quarter);
#pragma unroll
  for (int line = 0; line < LINES; line++) {
    const fp16* scales = l.scales + (l.first[line] + group);
    const uint8_t* zero = l.zeros + (l.first[line] + group);
    if (RUN > 1 && l.runs_aligned) {
      const auto pairs = read_once(reinterpret_cast<const Words<PAIRS>*>(scales));
      const uint32_t zeros = BITS < 8 ? read_bytes<RUN>(zero) : 0;
#pragma unroll
      for (int i = 0; i < RUN; i++) {
        scale[i][line] = widened(fp16{uint16_t(pairs.word[i / 2] >> i % 2 * 16)});
        offset[i][line] = offset_of<T>(BITS < 8 ? zeros >> 8 * i & 0xFF : 128);
      }
    } else {
#pragma unroll
      for (int i = 0; i < RUN; i++) {
        scale[i][line] = widened(scales[i]);
        offset[i][line] = offset_of<T>(BITS < 8 ? zero[i] : 128);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < RUN; i++) {
    const int k = (group + i) * 64;
    uint32_t x[S::TILES][8];
#pragma unroll
    for (int t = 0; t < S::TILES; t++)
      read_x<T, BITS, WHOLE>(x[t], l.row[t], k, l.depth);
#pragma unroll
    for (int tall = 0; tall < S::TALL; tall++) {
      float of_group[S::TILES][4] = {};
#pragma unroll
      for (int pair = 0; pair < 8; pair += 2) {
        uint32_t a[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int line = 2 * tall + j % 2;
          a[j] = numbers_of<T, BITS>(codes[i][line], pair + j / 2, offset[i][line]);
        }
#pragma unroll
        for (int t = 0; t < S::TILES; t++)
          mma<T>(of_group[t], a, x[t][pair], x[t][pair + 1]);
      }
#pragma unroll
      for (int t = 0; t < S::TILES; t++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          sums[tall][t][j] += of_group[t][j] * scale[i][2 * tall + j / 2];
    }
  }
}

// sums += h_a B^T, 16 of the adapter's ranks a warp.
template <class T, class S>
DEVICE void add_adapter(float (&sums)[S::TALL][S::TILES][4], const QuantizedCall& d, int column0) {
  const int warp = thread_index() / 32, lane = thread_index() % 32, depth = int(d.lora_rank);
#pragma unroll 1
  for (int first = 16 * warp; first < depth; first += 16 * S::WARPS) {
    const int k = first + lane % 4 * 4;
    uint32_t row[S::TILES][2];
#pragma unroll
    for (int t = 0; t < S::TILES; t++) {
      const int m = lane / 4 + 8 * t;
      read_four<T, false>(row[t], m < d.M ? as<T>(d.h_a) + m * d.lora_rank : nullptr, k, depth);
    }
#pragma unroll
    for (int tall = 0; tall < S::TALL; tall++) {
      uint32_t weight[2][2];
#pragma unroll
      for (int high = 0; high < 2; high++) {
        const int64_t column = column0 + 16 * tall + 8 * high + lane / 4;
        read_four<T, false>(weight[high],
                            column < d.N ? as<T>(d.B) + column * d.lora_rank : nullptr, k, depth);
      }
      const uint32_t a[4] = {weight[0][0], weight[1][0], weight[0][1], weight[1][1]};
#pragma unroll
      for (int t = 0; t < S::TILES; t++)
        mma<T>(sums[tall][t], a, row[t][0], row[t][1]);
    }
  }
}

template <class T, int BITS, class S>
KERNEL(32 * S::WARPS, 16 / S::WARPS)
quantized(ARGUMENT QuantizedLaunch f) {
  const QuantizedCall& d = f.d;
  auto& shared = *reinterpret_cast<typename S::Shared*>(shared_memory());
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  const int column0 = block_index() * S::COLUMNS;
  QuantizedLines<T, S> l;
  l.codes = as<uint32_t>(d.codes), l.scales = as<fp16>(d.scales), l.zeros = as<uint8_t>(d.zeros);
  l.groups = int(d.groups), l.depth = int(d.K), l.runs_aligned = f.runs_aligned;
#pragma unroll
  for (int line = 0; line < 2 * S::TALL; line++)
    l.first[line] = at_most(column0 + 8 * line + lane / 4, int(d.N) - 1) * l.groups;
#pragma unroll
  for (int t = 0; t < S::TILES; t++)
    l.row[t] = as<T>(d.x) + at_most(8 * t + lane / 4, int(d.M) - 1) * d.x_stride;
  float sums[S::TALL][S::TILES][4] = {};
#pragma unroll 1
  for (int group = warp * S::RUN; group < l.groups; group += S::WARPS * S::RUN)
    if (f.x_aligned && (group + S::RUN) * 64 <= l.depth)
      add_run<T, BITS, S, S::RUN, true>(sums, l, group);
    else
#pragma unroll 1
      for (int g = group; g < at_most(group + S::RUN, l.groups); g++)
        add_run<T, BITS, S, 1, false>(sums, l, g);
  add_adapter<T, S>(sums, d, column0);
#pragma unroll
  for (int tall = 0; tall < S::TALL; tall++)
#pragma unroll
    for (int t = 0; t < S::TILES; t++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        shared.sums[warp][8 * t + lane % 4 * 2 + j % 2][16 * tall + lane / 4 + j / 2 * 8] =
            sums[tall][t][j];
  synchronize();
  for (int i = thread_index(); i < S::ROWS * S::COLUMNS; i += 32 * S::WARPS) {
    const int64_t m = i / S::COLUMNS;
    const int mine = i % S::COLUMNS, column = column0 + mine;
    if (m >= d.M || column >= d.N) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < S::WARPS; w++)
      sum += shared.sums[w][m][mine];
    if (d.bias) sum += widened(as<T>(d.bias)[column]);
    static_cast<T*>(d.y)[m * d.N + column] = rounded<T>(sum);
  }
}

}  // namespace hylora::cuda
