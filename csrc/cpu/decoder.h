// A decoder's blocks as one call: what a step of a language model computes between the embedding of
// its tokens and the next ones.
//
//     hidden += attention(norm(hidden)), hidden += mlp(norm(hidden)) for each block
//     logits = head(norm(hidden))
//
// A plan says what each block is made of; it holds pointers to weights that others keep. Numbers
// between two operations are of the plan's type, as the model's own modules round them.
#pragma once
#include "row_calls.h"

namespace hylora {

// A norm of rows, or of each head of a row; `exists` false: numbers pass as they are.
struct DecoderNorm {
  bool exists;
  Norm norm;
  bool rounds_first;
  int64_t width;
  float eps;
  const float *weight, *bias;
};

// Layers that read the same rows; their outputs stand side by side in rows of `width`.
struct DecoderLayers {
  static constexpr int64_t kMost = 4;
  int64_t count, width;
  LayerCall calls[kMost];
};

// Heads in a row of the projections: the first begins at `column`, the others `stride` apart. The
// norm is of each head, or of all of them as one row.
struct DecoderHeads {
  int64_t count, size, column, stride;
  DecoderNorm norm;
};

struct DecoderBlock {
  DecoderNorm attention_norm;  // of the block's input
  DecoderLayers projections;
  DecoderHeads q, k, v;
  Pairs pairs;
  int64_t rotary_size;     // 0: none
  const float *cos, *sin;  // [positions][rotary_size / 2]
  int64_t window;          // 0: no limit
  float scale, softcap;    // softcap 0: none
  LayerCall output;
  DecoderNorm attention_post_norm;  // of attention's output
  float attention_scale;            // of what is added to hidden

  // Sequential: the MLP reads hidden with attention's output. Parallel: it reads the block's input,
  // and without a norm of its own what attention_norm has made of it.
  bool parallel;
  DecoderNorm mlp_norm;
  DecoderLayers up;
  Activation activation;
  int64_t inner;                   // columns that the activation makes
  int64_t gate_column, up_column;  // of a row of `up`; up_column -1: not gated
  LayerCall down;
  DecoderNorm mlp_post_norm;
  float mlp_scale;

  int64_t cached_before;  // numbers that all blocks before this one cache for a token
};

// hidden by token: rows of a layer's matrix, or `rows` [words][width] if that is given. Neither:
// the caller makes hidden.
struct DecoderEmbedding {
  int64_t words;
  Panels panels;
  const void* rows;
  float scale;  // what rows are multiplied by
};

struct DecoderPlan {
  uint64_t magic;
  Type type;
  int64_t width;      // of hidden
  int64_t positions;  // rows of the tables cos and sin; 0: no block has any
  int64_t cached;     // numbers that all blocks cache for a token
  DecoderNorm final_norm;
  LayerCall head;
  float logit_scale, logit_softcap;
  DecoderEmbedding embedding;
  int64_t count;  // of blocks

  const DecoderBlock* blocks() const { return reinterpret_cast<const DecoderBlock*>(this + 1); }
};

// One step: the next token of each of `rows` sequences. The cache holds, for each block, keys
// [sequences][heads][capacity][size] and then values; all sequences write to `slot`.
struct DecoderStep {
  int64_t rows;
  const int64_t* tokens;  // [rows], or null and
  const void* x;          // [rows, width]: embedded tokens, or hidden in front of part0
  char* cache;
  int64_t sequences, capacity, slot;
  const int64_t* positions;   // [rows], for rotary embeddings
  const int64_t* first_keys;  // [rows]: the first slot that is no padding
  int64_t part0, part1;       // parts to run: the blocks, and part `count`, final norm and head
  void* hidden;               // [rows, width] out, without the head
  void* logits;               // [rows, head.N] out, with it
  int64_t* likeliest;         // [rows] out, with it
};

// Kinds of work of a step, and the nanoseconds that all steps of this process so far spent in each,
// as the thread that calls sees them. Telling them takes a thousandth of a step.
enum class Work { linears, attention, norms, others };
constexpr int64_t kWorks = 4;
int64_t nanoseconds_of(Work work);

// Bytes of memory that run_decoder needs.
int64_t decoder_memory(const DecoderPlan& plan, const DecoderStep& step, int64_t threads);

// Computes the step with at most `threads` threads.
void run_decoder(const DecoderPlan& plan, const DecoderStep& step, int64_t threads, char* memory);

}  // namespace hylora
