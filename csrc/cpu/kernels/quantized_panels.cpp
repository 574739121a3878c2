// Quantised panels where speed does not matter (quantized_panels.h).
#include "../quantized_panels.h"

#include "vector.h"

namespace hylora {
namespace {

// Calls work(first bit in a code, width, byte, first bit in the byte) for each part of code i of 64
// in QuantizedPlanes: a plane of w bits has it in byte i % (8 w).
template <class F>
void for_each_plane(int bits, int i, const F& work) {
  const int low = bits == 8 ? 8 : bits >= 4 ? 4 : 2;
  work(0, low, i % (8 * low), i / (8 * low) * low);
  if (const int high = bits - low) work(low, high, 8 * low + i % (8 * high), i / (8 * high) * high);
}

uint32_t mask(int width) { return (1u << width) - 1; }

// Code i of [8 bits] bytes.
uint8_t code_at(int bits, const uint8_t* planes, int i) {
  uint32_t code = 0;
  for_each_plane(bits, i, [&](int done, int width, int byte, int shift) {
    code |= (planes[byte] >> shift & mask(width)) << done;
  });
  return uint8_t(code);
}

// 64 codes -> [8 bits] bytes.
void put_planes(int bits, const uint8_t* codes, uint8_t* planes) {
  __builtin_memset(planes, 0, size_t(8 * bits));
  for (int i = 0; i < kGroup; i++)
    for_each_plane(bits, i, [&](int done, int width, int byte, int shift) {
      planes[byte] |= uint8_t((codes[i] >> done & mask(width)) << shift);
    });
}

// Calls work(code of 64, piece, its lane of the row's 2 bits, its shift in the lane).
template <class F>
void for_each_piece(int bits, const F& work) {
  for (int i = 0; i < kGroup; i++)
    for (int up = 0; up < bits;) {
      const Piece piece = piece_at(bits, i % 32 / 2, up);
      work(i, piece, i / 32 * bits + piece.lane, piece.shift + i % 2 * 16);
      up += piece.width;
    }
}

// Bits of a group's planes on their way to its lanes: bits [from, from + width) of a byte become
// bits [to, to + width) of a lane.
struct Move {
  uint8_t byte, from, mask, lane, to;
};

// All moves of a group of 64 codes. Worked out once for a matrix: for each group again, packing
// took 9.6 ms instead of 1.7 (1536x576 at 4 bits).
class Moves {
 public:
  explicit Moves(int bits) {
    for_each_piece(bits, [&](int i, const Piece& piece, int lane, int shift) {
      for_each_plane(bits, i, [&](int done, int width, int byte, int from) {
        const int begin = done > piece.up ? done : piece.up;
        const int end = smaller(done + width, piece.up + piece.width);
        if (begin < end)
          moves_[count_++] = {uint8_t(byte), uint8_t(from + begin - done),
                              uint8_t(mask(end - begin)), uint8_t(lane),
                              uint8_t(shift + begin - piece.up)};
      });
    });
  }

  // [8 bits] bytes -> one row of a unit's lanes, which are 128 bytes apart.
  void put(int bits, const uint8_t* planes, char* unit, int64_t row) const {
    uint32_t lanes[16] = {};
    for (const Move* move = moves_; move < moves_ + count_; move++)
      lanes[move->lane] |= uint32_t(planes[move->byte] >> move->from & move->mask) << move->to;
    for (int lane = 0; lane < 2 * bits; lane++)
      __builtin_memcpy(unit + lane * 128 + row * 4, &lanes[lane], 4);
  }

 private:
  Move moves_[4 * kGroup];  // a code has at most 8 bits, in two planes and three lanes
  int count_ = 0;
};

// One row of a unit's lanes -> 64 codes.
void get_codes(int bits, const char* unit, int64_t row, uint8_t* codes) {
  uint32_t lanes[16];
  for (int lane = 0; lane < 2 * bits; lane++)
    __builtin_memcpy(&lanes[lane], unit + lane * 128 + row * 4, 4);
  __builtin_memset(codes, 0, size_t(kGroup));
  for_each_piece(bits, [&](int i, const Piece& piece, int lane, int shift) {
    codes[i] |= uint8_t((lanes[lane] >> shift & mask(piece.width)) << piece.up);
  });
}

uint8_t zero_of(const QuantizedPlanes& W, int64_t at) {
  return code_at(W.bits, W.zeros + at / kGroup * 8 * W.bits, int(at % kGroup));
}

struct Unit {
  const char* data;
  int bits;
  uint16_t* scale(int64_t row) const {
    return reinterpret_cast<uint16_t*>(const_cast<char*>(data) + code_bytes(bits)) + row;
  }
  uint8_t* zero(int64_t row) const {
    return reinterpret_cast<uint8_t*>(const_cast<char*>(data) + code_bytes(bits) + 64) + row;
  }
};

// Calls work(unit, row in the unit, row and group of W as one index) for panels [begin, end).
template <class F>
void for_each_row(const QuantizedPlanes& W, const char* panels, int64_t begin, int64_t end,
                  const F& work) {
  const int64_t groups = ceil_div(W.k, kGroup);
  const char* data = panels + begin * panel_bytes(W.bits, W.k);
  for (int64_t panel = begin; panel < end; panel++)
    for (int64_t g = 0; g < groups; g++, data += unit_bytes(W.bits))
      for (int64_t row = panel * 32; row < smaller(panel * 32 + 32, W.n); row++)
        work(Unit{data, W.bits}, row % 32, row * groups + g);
}

template <class T>
void dequantize_row(const Panels& panels, int64_t row, T* to) {
  const char* unit = static_cast<const char*>(panels.data);
  unit += row / 32 * panel_bytes(panels.bits, panels.k);
  for (int64_t k = 0; k < panels.k; k += kGroup, unit += unit_bytes(panels.bits)) {
    const Unit one{unit, panels.bits};
    fp16 scale;
    __builtin_memcpy(&scale, one.scale(row % 32), 2);
    const float factor = to_float(scale);
    const int zero = panels.bits == 8 ? 128 : *one.zero(row % 32);
    uint8_t codes[kGroup];
    get_codes(panels.bits, unit, row % 32, codes);
    for (int64_t i = 0; i < smaller(kGroup, panels.k - k); i++)
      to[k + i] = from_float<T>(factor * float(codes[i] - zero));
  }
}

}  // namespace

void pack_quantized(const QuantizedPlanes& W, char* panels, int64_t begin, int64_t end) {
  const int64_t bytes = panel_bytes(W.bits, W.k);
  if (begin < end) __builtin_memset(panels + begin * bytes, 0, size_t((end - begin) * bytes));
  const Moves moves(W.bits);
  for_each_row(W, panels, begin, end, [&](const Unit& unit, int64_t row, int64_t at) {
    moves.put(W.bits, W.codes + at * 8 * W.bits, const_cast<char*>(unit.data), row);
    *unit.scale(row) = W.scales[at];
    if (W.zeros) *unit.zero(row) = zero_of(W, at);
  });
}

void unpack_quantized(const QuantizedPlanes& W, const char* panels, int64_t begin, int64_t end) {
  for_each_row(W, panels, begin, end, [&](const Unit& unit, int64_t row, int64_t at) {
    uint8_t codes[kGroup];
    get_codes(W.bits, unit.data, row, codes);
    put_planes(W.bits, codes, W.codes + at * 8 * W.bits);
    W.scales[at] = *unit.scale(row);
    if (W.zeros) W.zeros[at] = *unit.zero(row);
  });
}

void copy_quantized_row(Type type, const Panels& panels, int64_t row, void* to) {
  if (type == Type::bf16) return dequantize_row(panels, row, static_cast<bf16*>(to));
  if (type == Type::fp16) return dequantize_row(panels, row, static_cast<fp16*>(to));
  dequantize_row(panels, row, static_cast<float*>(to));
}

}  // namespace hylora
