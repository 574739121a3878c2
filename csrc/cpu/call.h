// What the binding hands to the kernels: pointers, sizes and strides, nothing of torch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hylora {

enum class Type : int32_t { bf16, fp16, fp32 };

// One weight matrix W [n, k] in panels of 32 rows of W (columns of the product), zero padded.
//   bf16         [n/32][k/32][2][16][16][2]   two AMX tiles of 16 k-pairs by 16 columns a block
//   fp16, fp32   [n/32][k][32]
struct Panels {
  const void* data = nullptr;
  int64_t n = 0, k = 0;
};

// What the 32 outputs of one panel of y are made of (pivoted form), and the other way round.
struct OrderPanel {
  uint8_t from[32];        // index after `pivot0` for a pivot, after `other0` for the others
  uint8_t pivot_at[32];    // the columns of the panel that are pivots, ascending
  uint8_t other_at[32];    // and those that are not
  uint32_t is_pivot;       // bit c: column c is a pivot
  int32_t pivot0, other0;  // pivots and others before this panel
};

// The pivoted form's table: a panel for every 32 outputs.
struct Order {
  const OrderPanel* panels = nullptr;
  int64_t n = 0, pivots = 0;
};

// y = ((x first^T) second^T) + bias, the adapter's part of the middle scaled by alpha. Columns of
// the middle: first.n of the base (padded to 32), then first_tail.n of the adapter; or both joined
// in `first`. With first.n = 0 there is no middle: y = x second^T + bias. In the pivoted form
// `second` makes the others. The adapter's part of the pivots is second_tail's: with tails the rows
// before the others', joined all it has, for the columns of the middle from the last multiple of 32
// up to tail_at on.
struct Dual {
  Type type;
  const void* x;
  int64_t M, K, ldx;
  Panels first, first_tail, second, second_tail;
  const void* bias;  // [N] or null
  void* y;           // [M, N], rows of N
  int64_t N;
  void* tail;       // [M, ra] out: the adapter's columns of the middle, or null
  int64_t ra;       // their number
  int64_t tail_at;  // where they start in the padded middle
  float alpha;
  bool emit_scaled;
  Order order;  // of y, or of x where sorts_input; order.panels null in the pair form
  bool sorts_input;
  int products;  // bf16 limb products for fp16 and fp32: 0 (FMA), 3 or 6
};

// C [ra, n] = scale * a^T b for columns [col0, col1); with sums a last row, the sum over M of b.
struct Thin {
  Type type;
  const void *a, *b;
  int64_t M, ra, n, lda, ldb;
  float scale;
  void* c;
  bool sums;
};

// To be packed, or float32 unpacked.
struct Pack {
  Type type;
  void* W;  // [n, k] with strides
  int64_t n, k, row_stride, column_stride;
  void* panels;
};

// One level's kernels. `first` and `second` work on panels [begin, end) of what `prepare` laid down
// in `block`: for few rows the threads share one block and split its panels; `rows` does everything
// for rows [m0, m1), so for many rows the threads split those. `weave` is the pivoted form's: rows
// of y, out of what `between` and `second` left in the block.
struct Kernels {
  void (*rows)(const Dual&, int64_t m0, int64_t m1);
  size_t (*block_bytes)(const Dual&);
  void (*prepare)(const Dual&, void* block);
  void (*first)(const Dual&, void* block, int64_t begin, int64_t end);
  void (*between)(const Dual&, void* block);
  void (*second)(const Dual&, void* block, int64_t begin, int64_t end);
  void (*weave)(const Dual&, void* block, int64_t row0, int64_t row1);
  void (*thin)(const Thin&, int64_t col0, int64_t col1);
  void (*pack)(const Pack&, int64_t panel0, int64_t panel1);
  void (*unpack)(const Pack&, int64_t panel0, int64_t panel1);
};

constexpr int64_t kFewRows = 64;  // up to here threads split panels, above it rows

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t at_most(int64_t a, int64_t most) { return a < most ? a : most; }

inline int64_t first_panels(const Dual& d) {
  return ceil_div(d.first.n, 32) + ceil_div(d.first_tail.n, 32);
}
inline int64_t second_panels(const Dual& d) { return ceil_div(d.second.n, 32); }

// This thread's scratch: 64-byte aligned, kept and grown, never shrunk. Two of them, since a block
// shared by several threads must not move while its owner works on a part of it.
void* scratch(int which, size_t bytes);

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx_bf16();

}  // namespace hylora
