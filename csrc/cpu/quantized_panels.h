// Quantised matrices (QuantizedMatrix in hylora_kernels/weights.py) in panels: the layout, and
// plain code for any processor where speed does not matter. kernels/codes.h reads it fast.
#pragma once
#include "call.h"

namespace hylora {

// A panel of 32 rows of W is [k/64] units, each the 32 rows of one group of 64 k:
//
//   codes    [2][bits][32 rows] lanes of 32 bits: half the group, of 32 k, is `bits` lanes of a row
//   scales   fp16 [32]
//   zeros    uint8 [32]; none at 8 bits, where every zero point is 128
//
// A lane has codes of even k in its low half and those of the odd k behind them in its high half,
// so a shift and a mask make the 16-bit numbers of a pair of k that instructions multiply. The 16
// pairs follow one another, as many in a lane as fit whole, the first in the lowest bits. At 3, 5
// and 6 bits the last pairs fill the bits that are left over at the upper end of all halves.
//
// Rows behind n have scale 0, codes behind k are as they were given.
constexpr int64_t kGroup = 64;
constexpr int kBitWidths[] = {2, 3, 4, 5, 6, 8};

// Bits [shift, shift + width) of both halves of a lane are bits [up, up + width) of a pair's codes.
struct Piece {
  int lane, shift, up, width;
};

// The piece of pair `pair`, in 0 .. 15, whose first bit is `up`.
constexpr Piece piece_at(int bits, int pair, int up) {
  const int fit = 16 / bits, left = 16 - fit * bits;
  if (pair < fit * bits) return {pair / fit, pair % fit * bits, 0, bits};
  const int at = (pair - fit * bits) * bits + up;  // among the bits left over
  const int most = left - at % left;
  return {at / left, 16 - most, up, bits - up < most ? bits - up : most};
}

constexpr int64_t code_bytes(int bits) { return 32 * kGroup / 8 * bits; }
constexpr int64_t unit_bytes(int bits) { return code_bytes(bits) + 64 + (bits == 8 ? 0 : 32); }
constexpr int64_t panel_bytes(int bits, int64_t k) {
  return ceil_div(k, kGroup) * unit_bytes(bits);
}

// A quantised matrix [n, k] as QuantizedMatrix stores it.
struct QuantizedPlanes {
  int bits;
  int64_t n, k;
  uint8_t* codes;    // [n][groups][8 bits]
  uint16_t* scales;  // fp16 [n][groups]
  uint8_t* zeros;    // [n groups / 64][8 bits]: zero points [n][groups] as planes; null at 8 bits
};

// Panels [begin, end) of W, from planes and back to them. On the way back zeros takes one zero
// point a byte, [n][groups].
void pack_quantized(const QuantizedPlanes& W, char* panels, int64_t begin, int64_t end);
void unpack_quantized(const QuantizedPlanes& W, const char* panels, int64_t begin, int64_t end);

// Row `row` of W, rounded to `type` once.
void copy_quantized_row(Type type, const Panels& panels, int64_t row, void* to);

}  // namespace hylora
