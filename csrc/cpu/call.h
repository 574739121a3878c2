// The calls that the bindings hand to the kernels: pointers, sizes and strides, nothing of torch.
//
// A layer is y = x SVh^T U^T + bias + alpha (x A^T) B^T, computed as two products:
//
//     shrink    h = x [SVh; A]^T           A's columns of h are then scaled by alpha
//     expand    y = h [U, B]^T + bias
//
// M rows of x, K inputs, N outputs; the base SVh, U has rank r, the adapter A, B has rank ra. In
// the pivoted form r outputs, the pivots, equal the columns of x SVh^T, and U makes only the
// others. Sizes and strides count numbers, not bytes.
#pragma once
#include <cstddef>
#include <cstdint>

namespace hylora {

enum class Type : int32_t { bf16, fp16, fp32 };

// One weight matrix W [n, k] for products x W^T, cut into panels of 32 rows of W, zero padded.
//   bf16         [n/32][k/32][2][16][16][2]   for every 32 k two AMX tiles: 16 pairs of k, 16 rows
//   fp16, fp32   [n/32][k][32]
//   quantised    [n/32][k/64] units (quantized_panels.h), whatever the call's type is
struct Panels {
  const void* data = nullptr;
  int64_t n = 0, k = 0;
  int bits = 0;  // of a quantised matrix's codes; 0: it has numbers of the call's type
};

// The pivot table's entry for 32 outputs. Outputs are numbered within the entry; pivots and others
// are numbered within the entry too, each kind from 0.
struct PivotPanel {
  uint8_t from[32];        // output -> its number among the pivots, or among the others
  uint8_t pivot_at[32];    // pivot -> its output
  uint8_t other_at[32];    // other -> its output
  uint32_t is_pivot;       // bit c: output c is a pivot
  int32_t pivot0, other0;  // how many pivots and others all entries before this one have
};

// The pivot table says how pivots and others, each ascending, are put back in output order.
struct PivotTable {
  const PivotPanel* panels = nullptr;  // null in the pair form
  int64_t n = 0, pivots = 0;           // outputs, and pivots among them
};

// How a layer's adapter is stored.
enum class Adapter : int32_t {
  none,
  separate,  // as matrices of its own: in training every step changes them
  joined,    // in one matrix with the base's: less padding, for inference
};

// One layer on M rows. A | in h's columns stands at a multiple of 32, dots are zeros:
//
//     none       | x SVh^T ........ |
//     separate   | x SVh^T ........ | x A^T ........ |
//                                   ^ adapter_column
//     joined     | x SVh^T  x A^T ......... |
//                           ^ adapter_column
//
// Backward, x is dy, y is dx, h is dh, and the factors are transposed: shrink holds U^T and B^T,
// expand SVh^T and A^T. In the pivoted form dy's columns are first sorted into pivots (padded to a
// multiple of 32) and others; shrink multiplies the others, and the pivots are added to h.
struct LayerCall {
  Type type;
  bool backward;
  const void* x;  // [M, K], rows ldx apart
  int64_t M, K, ldx;
  void* x_block;     // few rows: the shared block of a layer on the same x, which has prepared x
                     // already; or null
  Panels shrink;     // SVh, or joined [SVh; A]; empty: a plain linear layer, y = x expand^T + bias
  Panels expand;     // U, or joined [U, B]; in the pivoted form the rows of the others
  const void* bias;  // [N] or null
  void* y;           // [M, N], rows ldy apart
  int64_t N, ldy;
  Adapter adapter;
  int64_t ra;
  float alpha;
  int64_t adapter_column;  // of h, where the adapter's ra columns start
  Panels adapter_shrink;   // separate: A
  // Separate: B; in the pivoted form its rows are sorted into pivots (padded to a multiple of 32)
  // and others. Joined in the pivoted form: B's rows of the pivots; its columns stand for h's from
  // the last multiple of 32 up to adapter_column on.
  Panels adapter_expand;
  void* h_a;          // [M, ra] out, or null: the adapter's columns of h, forward before alpha
  PivotTable table;   // of y's columns; backward of x's
  int limb_products;  // of bf16 limbs (kernels/amx.h) for fp16 and fp32: 3, 6, or 0 for FMA

  bool sorts_x() const { return table.panels && backward; }
  bool merges_pivots() const { return table.panels && !backward; }
  bool is_quantized() const { return shrink.bits || expand.bits; }
};

// C [ra, n] = scale * a^T b, in columns [col0, col1). With sums C has one row more: the sum of b's
// rows. dA = dh_a^T x and dB^T = alpha h_a^T dy are such products, and db is that last row.
struct AdapterGradients {
  Type type;
  const void *a, *b;  // [M, ra] and [M, n], rows lda and ldb apart
  int64_t M, ra, n, lda, ldb;
  float scale;
  void* c;
  bool sums;
};

// W [n, k] to be packed into panels.
struct Packing {
  Type type;
  const void* W;
  int64_t n, k, row_stride, column_stride;
  void* panels;
};

struct AttentionCall;  // row_calls.h: what stands between the layers of a decoder block
struct NormCall;
struct RotaryCall;
struct ActivationCall;
struct AddCall;
struct ArgmaxCall;

// The kernels of one instruction set. With many rows threads split the rows: `rows` does the whole
// layer for rows [m0, m1). With few rows they share one block in memory of block_bytes, which
// `prepare` fills with x; then they split the panels of `shrink`, those of `expand`, and in the
// pivoted form the rows of `merge_pivots`. `between` is what one thread does between shrink and
// expand: it adds the adapter's part to the pivots, and h becomes fixed point for a quantised
// expand (kernels/fixed_point.h).
struct Kernels {
  void (*rows)(const LayerCall&, int64_t m0, int64_t m1);
  size_t (*block_bytes)(const LayerCall&);
  void (*prepare)(const LayerCall&, void* block);
  void (*shrink)(const LayerCall&, void* block, int64_t panel0, int64_t panel1);
  void (*between)(const LayerCall&, void* block);
  void (*expand)(const LayerCall&, void* block, int64_t panel0, int64_t panel1);
  void (*merge_pivots)(const LayerCall&, void* block, int64_t row0, int64_t row1);
  void (*adapter_gradients)(const AdapterGradients&, int64_t col0, int64_t col1);
  void (*pack)(const Packing&, int64_t panel0, int64_t panel1);
  // Panels of a float32 or quantised W [n, k] as columns of W^T, whose rows are ld apart and as
  // many as a multiple of 32; those behind k hold anything.
  void (*unpack)(const Panels&, int64_t panel0, int64_t panel1, float* to, int64_t ld);
  // Parts [begin, end) of a call of row_calls.h.
  void (*attention)(const AttentionCall&, int64_t begin, int64_t end);
  void (*join_attention)(const AttentionCall&, int64_t begin, int64_t end);
  void (*norm)(const NormCall&, int64_t begin, int64_t end);
  void (*rotary)(const RotaryCall&, int64_t begin, int64_t end);
  void (*activation)(const ActivationCall&, int64_t begin, int64_t end);
  void (*add)(const AddCall&, int64_t begin, int64_t end);
  void (*argmax)(const ArgmaxCall&, int64_t begin, int64_t end);
  void (*join_argmax)(const ArgmaxCall&, int64_t begin, int64_t end);
};

constexpr int64_t kFewRows = 64;  // at most so many rows: threads split panels, else rows

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Panels of 32 columns of h, and of what expand makes: y, or in the pivoted form the others.
inline int64_t shrink_panels(const LayerCall& call) {
  return ceil_div(call.shrink.n, 32) + ceil_div(call.adapter_shrink.n, 32);
}
inline int64_t expand_panels(const LayerCall& call) { return ceil_div(call.expand.n, 32); }

// A thread's own memory, 64-byte aligned; it grows and is kept until the thread ends. A block that
// several threads share and a thread's own work need memory at once, so there are two.
enum class Scratch { own_work, shared_block };
void* scratch(Scratch which, size_t bytes);

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
const Kernels& kernels_amx_bf16();

}  // namespace hylora
