// A tile of sums, 32 rows by 32 columns: what it is summed from, and where its numbers lie.
#pragma once
#include "../call.h"
#include "fixed_point.h"

namespace hylora {
namespace {

// An integer as a type, for generic lambdas.
template <int N>
struct Int {
  static constexpr int value = N;
};

// One term of a tile's sums: up to 32 rows of `a`, lda numbers apart, times k numbers of a panel,
// or of two. With bf16 limbs the planes of each limb of `a` and of the panel are a_plane and
// b_plane apart; without, b_plane is the way to the second panel. Where the rows of a quantised
// panel are fixed point, `fixed` are the rows instead of a, b_plane counts bytes, and b are codes
// or, if is_widened, WidenedUnits (codes.h).
template <class A>
struct Term {
  const A* a;
  int64_t lda;
  const void* b;
  int64_t k;
  int64_t a_plane = 0, b_plane = 0;
  int bits = 0;  // of a quantised panel whose rows are fixed point
  bool is_widened = false;
  FixedRows fixed{};

  // The same for the rows from `row` on, `stride` numbers of `a` apart.
  Term from(int64_t row, int64_t stride) const {
    Term term = *this;
    if (bits)
      term.fixed = fixed.from(row);
    else
      term.a += row * stride;
    return term;
  }
};

// The place of row r, vector i in a 32 x 32 tile of sums. All methods keep a tile as AMX stores it,
// in four quarters of 16 x 16.
HYLORA_INLINE int tile_at(int r, int i) {
  int column = i * W;
  return (r >> 4) * 512 + (column >> 4) * 256 + (r & 15) * 16 + (column & 15);
}

// A row of a tile. `sums` points to its first number.
HYLORA_INLINE Row tile_row(const float* sums) {
  Row row;
  for (int i = 0; i < P; i++)
    row.v[i] = load(sums + tile_at(0, i));
  return row;
}

}  // namespace
}  // namespace hylora
