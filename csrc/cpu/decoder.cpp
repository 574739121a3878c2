// Runs a decoder's step, stage by stage, in one team (decoder.h).
#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <type_traits>

#include "group.h"
#include "kernels/panels.h"
#include "threads.h"

namespace hylora {
namespace {

// A thread takes at least so many numbers of a row operation: fewer are done before another thread
// has taken notice.
constexpr int64_t kNumbersPerPiece = 4096;
constexpr int64_t kAlignment = 64;

int64_t size_of(Type type) { return type == Type::fp32 ? 4 : 2; }

std::atomic<int64_t> g_nanoseconds[kWorks];

// Adds the time between two laps to a kind of work.
class LapTimer {
 public:
  void lap(Work work) {
    const auto now = Clock::now();
    spent_[int64_t(work)] += now - last_;
    last_ = now;
  }
  ~LapTimer() {
    for (int64_t i = 0; i < kWorks; i++)
      g_nanoseconds[i].fetch_add(std::chrono::nanoseconds(spent_[i]).count(),
                                 std::memory_order_relaxed);
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point last_ = Clock::now();
  Clock::duration spent_[kWorks] = {};
};

// Where the rows between two operations lie.
struct Rows {
  char* data;
  int64_t stride;
};

struct Buffers {
  Rows hidden, normed, projections, attended, branch, other_branch, up;
  float* partials;
  ArgmaxCall::Best* best;
  int64_t bytes;
};

AttentionCall attention_call(const DecoderPlan& plan, const DecoderBlock& block,
                             const DecoderStep& step) {
  AttentionCall call{};
  call.type = plan.type;
  call.sequences = step.rows, call.queries = 1;
  call.heads = block.q.count, call.kv_heads = block.k.count;
  call.head_size = block.k.size, call.value_size = block.v.size;
  call.keys = step.slot + 1, call.first_key = step.first_keys, call.window = block.window;
  call.scale = block.scale, call.softcap = block.softcap;
  return call;
}

int64_t argmax_pieces(const DecoderPlan& plan, int64_t threads) {
  return smaller(threads, larger(1, plan.head.N / kNumbersPerPiece));
}

Buffers buffers_of(const DecoderPlan& plan, const DecoderStep& step, int64_t threads, char* at) {
  int64_t projections = 0, attended = 0, up = 0, partials = 0;
  for (int64_t i = step.part0; i < smaller(step.part1, plan.count); i++) {
    const DecoderBlock& block = plan.blocks()[i];
    projections = larger(projections, block.projections.width);
    attended = larger(attended, block.q.count * block.v.size);
    up = larger(up, block.up.width);
    AttentionCall call = attention_call(plan, block, step);
    call.pieces = attention_pieces(call, threads);
    if (call.pieces > 1) partials = larger(partials, partial_numbers(call));
  }
  char* const begin = at;
  auto take = [&](int64_t bytes) {
    char* taken = at;
    at += round_up(bytes, kAlignment);
    return taken;
  };
  auto rows = [&](int64_t width) {
    return Rows{take(step.rows * width * size_of(plan.type)), width};
  };
  Buffers b{};
  b.hidden = rows(plan.width), b.normed = rows(plan.width), b.projections = rows(projections);
  b.attended = rows(attended), b.branch = rows(plan.width), b.other_branch = rows(plan.width);
  b.up = rows(up);
  b.partials = reinterpret_cast<float*>(take(partials * int64_t(sizeof(float))));
  b.best = reinterpret_cast<ArgmaxCall::Best*>(
      take(step.rows * argmax_pieces(plan, threads) * int64_t(sizeof(ArgmaxCall::Best))));
  b.bytes = at - begin;
  return b;
}

class Run {
 public:
  Run(const DecoderPlan& plan, const DecoderStep& step, int64_t threads, char* memory)
      : plan_(plan), step_(step), kernels_(kernels()), team_(threads), threads_(threads),
        b_(buffers_of(plan, step, threads, memory)), size_(size_of(plan.type)) {}

  void operator()() {
    const size_t bytes = size_t(step_.rows * plan_.width * size_);
    step_.tokens ? embed() : void(std::memcpy(b_.hidden.data, step_.x, bytes));
    const DecoderNorm* first = norm_before(step_.part0);
    if (first) norm(*first, b_.hidden, b_.normed);
    for (int64_t i = step_.part0; i < smaller(step_.part1, plan_.count); i++)
      run_block(plan_.blocks()[i], i + 1 < step_.part1 ? norm_before(i + 1) : nullptr);
    if (step_.part1 > plan_.count)
      run_head();
    else
      std::memcpy(step_.hidden, b_.hidden.data, bytes);
  }

 private:
  // The norm that a part reads hidden through; null behind the last part.
  const DecoderNorm* norm_before(int64_t part) const {
    return part < plan_.count    ? &plan_.blocks()[part].attention_norm
           : part == plan_.count ? &plan_.final_norm
                                 : nullptr;
  }

  void embed() {
    const DecoderEmbedding& embedding = plan_.embedding;
    const int64_t bytes = plan_.width * size_;
    for (int64_t i = 0; i < step_.rows; i++) {
      char* const to = b_.hidden.data + i * bytes;
      if (embedding.rows)
        std::memcpy(to, static_cast<const char*>(embedding.rows) + step_.tokens[i] * bytes,
                    size_t(bytes));
      else
        copy_panel_row(plan_.type, embedding.panels, step_.tokens[i], to);
    }
    if (embedding.scale != 1) scale(b_.hidden, plan_.width, embedding.scale);
  }

  // `next` is the norm that reads hidden behind this block.
  void run_block(const DecoderBlock& block, const DecoderNorm* next) {
    const Rows input = normed(block.attention_norm);
    layers(block.projections, input, b_.projections);
    const int64_t bytes = step_.capacity * step_.sequences * size_;
    char* const keys = step_.cache + block.cached_before * bytes;
    char* const values = keys + block.k.count * block.k.size * bytes;
    place_heads(block, keys, values);
    attend(block, keys, values);
    layer(block.output, b_.attended, b_.branch);
    norm(block.attention_post_norm, b_.branch, b_.branch);
    if (block.parallel) {
      const Rows mlp_input = block.mlp_norm.exists ? b_.other_branch : input;
      norm(block.mlp_norm, b_.hidden, b_.other_branch);
      run_mlp(block, mlp_input, b_.other_branch);
      add(b_.branch, block.attention_scale, nullptr);
      add(b_.other_branch, block.mlp_scale, next);
    } else {
      add(b_.branch, block.attention_scale, &block.mlp_norm);
      run_mlp(block, normed(block.mlp_norm), b_.branch);
      add(b_.branch, block.mlp_scale, next);
    }
  }

  void run_mlp(const DecoderBlock& block, const Rows& input, const Rows& output) {
    layers(block.up, input, b_.up);
    Rows inner{b_.up.data + block.gate_column * size_, block.up.width};
    ActivationCall call{};
    call.type = plan_.type, call.activation = block.activation;
    call.rows = step_.rows, call.columns = block.inner;
    call.x = inner.data, call.ldx = inner.stride;
    if (block.up_column >= 0)
      call.up = b_.up.data + block.up_column * size_, call.ldup = block.up.width;
    call.y = inner.data, call.ldy = inner.stride;
    stage(kernels_.activation, call, column_parts(call), kColumnsPerPart);
    layer(block.down, inner, output);
    norm(block.mlp_post_norm, output, output);
  }

  // Rotary embeddings and norms of q, in place, and of k into the cache; v into the cache.
  void place_heads(const DecoderBlock& block, char* keys, char* values) {
    head_norm(block.q);
    head_norm(block.k);
    rotate(block, block.q, block.rotary_size, nullptr);
    rotate(block, block.k, block.rotary_size, keys);
    rotate(block, block.v, 0, values);
  }

  void head_norm(const DecoderHeads& heads) {
    const Rows rows = columns(b_.projections, heads.column);
    const int64_t numbers = heads.count * heads.size;
    if (heads.norm.exists) norm(heads.norm, rows, rows, numbers / heads.norm.width);
  }

  // y: null: in place, else a cache.
  void rotate(const DecoderBlock& block, const DecoderHeads& heads, int64_t rotary_size, char* y) {
    if (!y && !rotary_size) return;
    RotaryCall call{};
    call.type = plan_.type, call.pairs = block.pairs;
    call.sequences = step_.rows, call.rows = 1, call.heads = heads.count;
    call.head_size = heads.size, call.rotary_size = rotary_size;
    call.x = columns(b_.projections, heads.column).data;
    call.x_strides = {b_.projections.stride, b_.projections.stride, heads.stride};
    call.y = const_cast<void*>(call.x), call.y_strides = call.x_strides;
    if (y) {
      call.y = y + step_.slot * heads.size * size_;
      call.y_strides = cache_strides(heads);
    }
    call.cos = block.cos, call.sin = block.sin, call.positions = step_.positions;
    stage(kernels_.rotary, call, rotary_parts(call), heads.size);
  }

  void attend(const DecoderBlock& block, const char* keys, const char* values) {
    AttentionCall call = attention_call(plan_, block, step_);
    call.pieces = attention_pieces(call, threads_);
    call.partials = b_.partials;
    call.q = columns(b_.projections, block.q.column).data;
    call.q_strides = {b_.projections.stride, b_.projections.stride, block.q.stride};
    call.k = keys, call.k_strides = cache_strides(block.k);
    call.v = values, call.v_strides = cache_strides(block.v);
    call.out = b_.attended.data;
    call.out_strides = {b_.attended.stride, b_.attended.stride, block.v.size};
    stage(kernels_.attention, call, attention_parts(call), kNumbersPerPiece);
    if (call.pieces > 1)
      stage(kernels_.join_attention, call, join_parts(call), call.pieces * call.value_size);
  }

  void run_head() {
    const Rows logits{static_cast<char*>(step_.logits), plan_.head.N};
    layer(plan_.head, normed(plan_.final_norm), logits);
    if (plan_.logit_scale != 1) scale(logits, plan_.head.N, plan_.logit_scale);
    if (plan_.logit_softcap != 0) {
      ActivationCall call{};
      call.type = plan_.type, call.activation = Activation::softcap;
      call.rows = step_.rows, call.columns = plan_.head.N, call.softcap = plan_.logit_softcap;
      call.x = logits.data, call.ldx = logits.stride;
      call.y = logits.data, call.ldy = logits.stride;
      stage(kernels_.activation, call, column_parts(call), kColumnsPerPart);
    }
    ArgmaxCall call{};
    call.type = plan_.type, call.rows = step_.rows, call.columns = plan_.head.N;
    call.pieces = argmax_pieces(plan_, threads_);
    call.x = logits.data, call.ldx = logits.stride;
    call.best = b_.best, call.column = step_.likeliest;
    stage(kernels_.argmax, call, argmax_parts(call), plan_.head.N / call.pieces);
    kernels_.join_argmax(call, 0, step_.rows);
  }

  // What a norm has made of hidden: hidden itself, if there is no norm.
  Rows normed(const DecoderNorm& norm) const { return norm.exists ? b_.normed : b_.hidden; }

  void norm(const DecoderNorm& norm, const Rows& x, const Rows& y, int64_t heads = 1) {
    if (!norm.exists) return;
    NormCall call = norm_call(norm, y, heads);
    call.x = x.data, call.ldx = x.stride;
    stage(kernels_.norm, call, norm_parts(call), norm.width);
  }

  // rows *= factor
  void scale(const Rows& rows, int64_t columns, float factor) {
    AddCall call{};
    call.type = plan_.type, call.rows = step_.rows, call.columns = columns;
    call.b = rows.data, call.ldb = rows.stride, call.scale = factor;
    call.y = rows.data, call.ldy = rows.stride;
    stage(kernels_.add, call, column_parts(call), kColumnsPerPart);
  }

  // hidden += scale * branch, and what `next` makes of it.
  void add(const Rows& branch, float scale, const DecoderNorm* next) {
    if (next && next->exists) {
      NormCall call = norm_call(*next, b_.normed, 1);
      call.x = branch.data, call.ldx = branch.stride, call.scale = scale;
      call.residual = b_.hidden.data, call.ldresidual = b_.hidden.stride;
      call.sum = b_.hidden.data, call.ldsum = b_.hidden.stride;
      return stage(kernels_.norm, call, norm_parts(call), next->width);
    }
    AddCall call{};
    call.type = plan_.type, call.rows = step_.rows, call.columns = plan_.width;
    call.a = b_.hidden.data, call.lda = b_.hidden.stride;
    call.b = branch.data, call.ldb = branch.stride, call.scale = scale;
    call.y = b_.hidden.data, call.ldy = b_.hidden.stride;
    stage(kernels_.add, call, column_parts(call), kColumnsPerPart);
  }

  NormCall norm_call(const DecoderNorm& norm, const Rows& y, int64_t heads) const {
    NormCall call{};
    call.type = plan_.type, call.norm = norm.norm, call.rounds_first = norm.rounds_first;
    call.rows = step_.rows, call.heads = heads, call.width = norm.width, call.eps = norm.eps;
    call.weight = norm.weight, call.bias = norm.bias;
    call.y = y.data, call.ldy = y.stride;
    return call;
  }

  void layers(const DecoderLayers& layers, const Rows& x, const Rows& y) {
    LayerCall calls[DecoderLayers::kMost];
    int64_t column = 0;
    for (int64_t i = 0; i < layers.count; i++) {
      calls[i] = on_rows(layers.calls[i], x, {y.data + column * size_, layers.width});
      column += calls[i].N;
    }
    run_group(calls, layers.count, team_);
    timer_.lap(Work::linears);
  }

  void layer(const LayerCall& layer, const Rows& x, const Rows& y) {
    run_layer(on_rows(layer, x, y), team_);
    timer_.lap(Work::linears);
  }

  LayerCall on_rows(const LayerCall& layer, const Rows& x, const Rows& y) const {
    LayerCall call = layer;
    call.M = step_.rows;
    call.x = x.data, call.ldx = x.stride;
    call.y = y.data, call.ldy = y.stride;
    return call;
  }

  Rows columns(const Rows& rows, int64_t first) const {
    return {rows.data + first * size_, rows.stride};
  }

  HeadStrides cache_strides(const DecoderHeads& heads) const {
    return {heads.count * step_.capacity * heads.size, heads.size, step_.capacity * heads.size};
  }

  // Parts of a row operation of so many numbers each, among the threads.
  template <class Call>
  void stage(void (*run)(const Call&, int64_t, int64_t), const Call& call, int64_t parts,
             int64_t numbers) {
    const int64_t worth = larger(1, parts * numbers / kNumbersPerPiece);
    const int64_t pieces = std::min({parts, worth, 2 * threads_});
    team_.stage(pieces,
                [&](int64_t i) { run(call, parts * i / pieces, parts * (i + 1) / pieces); });
    timer_.lap(std::is_same<Call, AttentionCall>::value ? Work::attention
               : std::is_same<Call, NormCall>::value    ? Work::norms
                                                        : Work::others);
  }

  const DecoderPlan& plan_;
  const DecoderStep& step_;
  const Kernels& kernels_;
  Team team_;
  const int64_t threads_;
  const Buffers b_;
  const int64_t size_;  // of a number
  LapTimer timer_;
};

}  // namespace

int64_t nanoseconds_of(Work work) {
  return g_nanoseconds[int64_t(work)].load(std::memory_order_relaxed);
}

int64_t decoder_memory(const DecoderPlan& plan, const DecoderStep& step, int64_t threads) {
  return buffers_of(plan, step, threads, nullptr).bytes + kAlignment;
}

void run_decoder(const DecoderPlan& plan, const DecoderStep& step, int64_t threads, char* memory) {
  Run run(plan, step, threads, memory);
  run();
}

}  // namespace hylora
