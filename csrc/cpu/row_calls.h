// The calls of what stands between the layers of a decoder block: norms, rotary embeddings,
// attention over a cache, activations, sums, and the choice of a token. Pointers, sizes and
// strides, nothing of torch.
//
// Numbers are of the call's type; every operation computes in float32 and rounds its result once,
// but where a model's own order of rounding is an option. Sizes and strides count numbers, not
// bytes. A call is made of parts that are independent of one another: the functions of the Kernels
// table do parts [begin, end), so that one thread does all of them or several share them, and the
// parts of different calls that belong to one head can follow one another in one thread.
#pragma once
#include "call.h"

namespace hylora {

// Where number 0 of a head lies in [sequences][rows][heads][size]; a head's numbers lie side by
// side. A column range of a projection's output [M, ldy] with T rows a sequence is
// {T * ldy, ldy, size}; slot 0 of a cache [sequences][heads][capacity][size] is
// {heads * capacity * size, size, capacity * size}.
struct HeadStrides {
  int64_t sequence, row, head;
};

// Softmax(scale q K^T) V for a few queries of each sequence over a cache of keys and values.
//
// Slots of the cache are numbered from 0, and slots [0, keys) are written; the queries' own keys
// are the last of them: query i stands at slot keys - queries + i. It sees the slots up to its own,
// from first_key[sequence] on (left padding lies before it), and at most `window` of them. Slots
// that no query sees are never read. A query that sees none gives zeros.
//
// heads / kv_heads query heads in a row share a KV head; they are done together, so that keys and
// values are read once. A part is one sequence's KV head and one of the `pieces` that its keys are
// cut into; part = (sequence * kv_heads + kv_head) * pieces + piece. With more than one piece, each
// leaves its sums in `partials`, and `join_attention` makes `out` of them.
struct AttentionCall {
  Type type;
  int64_t sequences, queries;  // queries: of each sequence
  int64_t heads, kv_heads;     // heads: a multiple of kv_heads
  int64_t head_size;           // of q and k
  int64_t value_size;          // of v and out
  int64_t keys;
  const int64_t* first_key;  // [sequences], or null: 0
  int64_t window;            // 0: no limit
  float scale;
  float softcap;  // scores become softcap * tanh(score / softcap); 0: they don't
  const void* q;  // [sequences][queries][heads][head_size]
  HeadStrides q_strides;
  const void* k;          // [sequences][slots][kv_heads][head_size]
  HeadStrides k_strides;  // fastest if a head's slots lie side by side (row = head_size)
  const void* v;          // [sequences][slots][kv_heads][value_size]
  HeadStrides v_strides;
  void* out;  // [sequences][queries][heads][value_size]
  HeadStrides out_strides;
  int64_t pieces = 1;
  float* partials = nullptr;  // partial_numbers(call) of them, if pieces > 1
};

inline int64_t attention_parts(const AttentionCall& call) {
  return call.sequences * call.kv_heads * call.pieces;
}
// Parts of join_attention: one for each head of each query, in the order of `out`.
inline int64_t join_parts(const AttentionCall& call) {
  return call.sequences * call.queries * call.heads;
}
// A partial is its greatest score, the sum of its weights, and the weighted sum of its values.
inline int64_t numbers_of_partial(const AttentionCall& call) {
  return 2 + round_up(call.value_size, 32);
}
inline int64_t partial_numbers(const AttentionCall& call) {
  return join_parts(call) * call.pieces * numbers_of_partial(call);
}
// Pieces that give `threads` threads about the same work. A piece has at least 256 keys, since a
// shorter one takes less time than joining it.
inline int64_t attention_pieces(const AttentionCall& call, int64_t threads) {
  const int64_t heads = larger(1, call.sequences * call.kv_heads);
  if (heads % threads == 0 || heads >= 4 * threads) return 1;
  const int64_t seen = call.window ? smaller(call.keys, call.window) : call.keys;
  return larger(1, smaller(ceil_div(2 * threads, heads), seen / 256));
}

enum class Norm : int32_t {
  rms,    // x / sqrt(mean(x^2) + eps)
  layer,  // (x - mean(x)) / sqrt(var(x) + eps)
};

// y = norm(x) * weight + bias over `width` numbers: of each row, or of each head of each row. With
// a residual the row is first replaced by sum = residual + scale * x, as an AddCall computes it;
// that is for one head only. Part: one head of one row, row * heads + head. y may be x.
struct NormCall {
  Type type;
  Norm norm;
  int64_t rows, heads, width;
  float eps;
  const float* weight;  // [width] or null. Always float32, so that Gemma's 1 + weight is exact
  const float* bias;    // [width] or null
  bool rounds_first;    // norm(x) is rounded to the type before weight multiplies it (Llama)
  const void* x;
  int64_t ldx;  // rows of x are so far apart; heads lie side by side
  void* y;
  int64_t ldy;
  const void* residual = nullptr;
  int64_t ldresidual = 0;
  float scale = 1;
  void* sum = nullptr;  // may be residual
  int64_t ldsum = 0;
};
inline int64_t norm_parts(const NormCall& call) { return call.rows * call.heads; }

// Which two numbers of a head one angle turns.
enum class Pairs : int32_t {
  halves,       // i and i + rotary_size / 2
  interleaved,  // 2 i and 2 i + 1
};

// Rotary embedding of the first rotary_size numbers of each head; the others are copied. Rotary
// size 0 copies whole heads, for instance values into the cache. Part: one head of one row,
// (sequence * rows + row) * heads + head. y may be x.
struct RotaryCall {
  Type type;
  Pairs pairs;
  int64_t sequences, rows, heads, head_size, rotary_size;
  const void* x;
  HeadStrides x_strides;
  void* y;
  HeadStrides y_strides;
  const float* cos;  // [positions][rotary_size / 2], each angle once
  const float* sin;
  const int64_t* positions;  // [sequences][rows]: the row of cos and sin
};
inline int64_t rotary_parts(const RotaryCall& call) {
  return call.sequences * call.rows * call.heads;
}

enum class Activation : int32_t {
  silu,
  gelu,       // by erf
  gelu_tanh,  // gelu_new, gelu_pytorch_tanh, gelu_fast
  relu,
  softcap,  // softcap * tanh(x / softcap), of logits
};

// y = activation(x) * up, without the factor if up is null. Part: kColumnsPerPart columns of a row.
// y may be x or up.
struct ActivationCall {
  Type type;
  Activation activation;
  int64_t rows, columns;
  const void* x;
  int64_t ldx;
  const void* up;
  int64_t ldup;
  void* y;
  int64_t ldy;
  float softcap;
};

// y = a + scale * b; scale * b if a is null. A scale other than 1 rounds scale * b to the type
// before it is added, as the models that have one do. Part: kColumnsPerPart columns of a row. y may
// be a or b.
struct AddCall {
  Type type;
  int64_t rows, columns;
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb;
  float scale;
  void* y;
  int64_t ldy;
};

// The column of the greatest number of each row, the first of equals; the first NaN, if there is
// one, as torch.argmax has it. Part: `columns / pieces` of a row, row * pieces + piece. Each part
// leaves its best in `best`; `join_argmax` then takes the best of each row in rows [begin, end).
struct ArgmaxCall {
  struct Best {
    float value;
    int64_t column;
  };
  Type type;
  int64_t rows, columns, pieces;
  const void* x;
  int64_t ldx;
  Best* best;       // [rows][pieces]
  int64_t* column;  // [rows] out
};
inline int64_t argmax_parts(const ArgmaxCall& call) { return call.rows * call.pieces; }

constexpr int64_t kColumnsPerPart = 512;

// Parts of an ActivationCall or an AddCall.
template <class Call>
int64_t column_parts(const Call& call) {
  return call.rows * ceil_div(call.columns, kColumnsPerPart);
}

}  // namespace hylora
