#include "fingerprint.h"

#include <cstring>
#include <vector>

#include "threads.h"

namespace hylora {
namespace {

constexpr int64_t kPieceBytes = 64 << 10;  // That one thread reads at a time.
constexpr int kLanes = 8;                  // One multiplication waits for another 4 cycles.
constexpr int64_t kBlockBytes = kLanes * sizeof(uint64_t);

// For a fixed word a permutation of the state and the other way round, so no change of one is lost.
// The rotation carries the top bits, where signs are, down to where a product spreads them.
uint64_t mixed(uint64_t state, uint64_t word) {
  const uint64_t product = (state ^ word) * 0x9e3779b97f4a7c15;
  return product << 29 | product >> 35;
}

struct Lanes {
  uint64_t state[kLanes] = {1, 2, 3, 4, 5, 6, 7, 8};

  void add(const char* words) {
#pragma GCC unroll 8
    for (int lane = 0; lane < kLanes; lane++) {
      uint64_t word;
      std::memcpy(&word, words + lane * sizeof(word), sizeof(word));
      state[lane] = mixed(state[lane], word);
    }
  }
};

uint64_t of_piece(const char* piece, int64_t bytes) {
  Lanes lanes;
  const int64_t whole = bytes / kBlockBytes * kBlockBytes;
  for (int64_t at = 0; at < whole; at += kBlockBytes)
    lanes.add(piece + at);
  char rest[kBlockBytes] = {};
  std::memcpy(rest, piece + whole, bytes - whole);
  lanes.add(rest);
  uint64_t state = 0;
  for (uint64_t lane : lanes.state)
    state = mixed(state, lane);
  return state;
}

}  // namespace

int64_t fingerprint_of(const void* matrix, int64_t rows, int64_t bytes, int64_t stride) {
  if (stride == bytes) bytes *= rows, rows = 1;
  const int64_t pieces = ceil_div(bytes, kPieceBytes);
  std::vector<uint64_t> of_pieces(rows * pieces);
  split_among_threads(rows * pieces, rows * bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t first = i % pieces * kPieceBytes;
      const char* piece = static_cast<const char*>(matrix) + i / pieces * stride + first;
      of_pieces[i] = of_piece(piece, std::min(kPieceBytes, bytes - first));
    }
  });
  uint64_t state = 0;
  for (uint64_t piece : of_pieces)
    state = mixed(state, piece);
  return int64_t(state);
}

}  // namespace hylora
