// Reads a decoder's plan and checks that its parts fit together (decoder_plan.h).
#include "decoder_plan.h"

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>

#include "packed_layer.h"

namespace hylora {
namespace {

using torch::headeronly::ScalarType;

constexpr uint64_t kMagic = 0x6e616c705f726564;

class Reader {
 public:
  Reader(Type type, const std::vector<Tensor>& tensors, const Tensor& numbers)
      : type_(type), tensors_(tensors) {
    STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Long && numbers.is_contiguous(),
                    "numbers must be contiguous int64");
    at_ = static_cast<const int64_t*>(numbers.data_ptr()), end_ = at_ + numbers.numel();
  }

  int64_t integer() {
    STD_TORCH_CHECK(at_ < end_, "numbers must describe the whole plan");
    return *at_++;
  }

  int64_t integer(const char* name, int64_t least, int64_t most) {
    const int64_t value = integer();
    STD_TORCH_CHECK(value >= least && value <= most, name, " must be in ", least, "..", most,
                    ", got ", value);
    return value;
  }

  float number() {
    const int64_t bits = integer();
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return float(value);
  }

  const Tensor* tensor() {
    const int64_t index = integer("a tensor's index", -1, int64_t(tensors_.size()) - 1);
    return index < 0 ? nullptr : &tensors_[size_t(index)];
  }

  // Contiguous float32 of so many numbers, or null.
  const float* floats(const char* name, int64_t count) {
    const Tensor* t = tensor();
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == count &&
                        t->is_contiguous(),
                    name, " must be ", count, " contiguous numbers of float32");
    return static_cast<const float*>(t->data_ptr());
  }

  // One of the values [0, count) of an enum.
  template <class Enum>
  Enum choice(const char* name, int64_t count) {
    return Enum(integer(name, 0, count - 1));
  }

  DecoderNorm norm(int64_t width) {
    DecoderNorm norm{};
    norm.exists = integer("norm.exists", 0, 1) != 0;
    if (!norm.exists) return norm;
    norm.norm = choice<Norm>("norm", 2);
    norm.rounds_first = integer("rounds_first", 0, 1) != 0;
    norm.width = integer("norm.width", 1, width);
    STD_TORCH_CHECK(width % norm.width == 0, "norm.width must divide ", width, ", got ",
                    norm.width);
    norm.eps = number();
    norm.weight = floats("norm.weight", norm.width);
    norm.bias = floats("norm.bias", norm.width);
    return norm;
  }

  // A layer of K inputs; N: its outputs, or -1 for any number.
  LayerCall layer(int64_t K, int64_t N) {
    const bool is_matrix = integer("is_matrix", 0, 1) != 0;
    const int64_t n = integer("n", 1, INT64_MAX), limb_products = integer("limb_products", 0, 6);
    const Tensor *weights = tensor(), *bias = tensor();
    STD_TORCH_CHECK(weights, "weights must be given");
    LayerCall call{};
    if (is_matrix) {
      call.type = type_of(*weights, "weights"), call.K = K, call.N = n;
      call.expand = panels_of(*weights, call.type, "weights", n, K);
    } else {
      call = call_of_packed(*weights);
    }
    STD_TORCH_CHECK(call.type == type_ && call.K == K && call.N == n && (N < 0 || N == n),
                    "a layer must be of the plan's dtype and have ", K, " inputs and ",
                    N < 0 ? n : N, " outputs, got ", call.K, " and ", call.N);
    call.limb_products = int(limb_products);
    if (bias) {
      STD_TORCH_CHECK(bias->numel() == n && type_of(*bias, "bias") == type_ &&
                          bias->is_contiguous(),
                      "bias must be ", n, " contiguous numbers of the plan's dtype");
      call.bias = bias->data_ptr();
    }
    return call;
  }

  // Of no kind, as rows of its own, or as those of a layer that is one matrix.
  DecoderEmbedding embedding(int64_t width) {
    DecoderEmbedding embedding{};
    const int64_t kind = integer("embedding", 0, 2);
    if (kind == 1) {
      const Tensor* t = tensor();
      STD_TORCH_CHECK(t && type_of(*t, "embedding") == type_ && t->dim() == 2 &&
                          t->size(1) == width && t->is_contiguous(),
                      "embedding must be contiguous [words, ", width, "] of the plan's dtype");
      embedding.words = t->size(0), embedding.rows = t->data_ptr();
    } else if (kind == 2) {
      const LayerCall call = layer(width, -1);
      STD_TORCH_CHECK(call.shrink.n == 0, "embedding must be a layer of one matrix");
      embedding.words = call.N, embedding.panels = call.expand;
    }
    embedding.scale = number();
    return embedding;
  }

  DecoderLayers layers(int64_t K) {
    DecoderLayers layers{};
    layers.count = integer("layers.count", 1, DecoderLayers::kMost);
    for (int64_t i = 0; i < layers.count; i++) {
      layers.calls[i] = layer(K, -1);
      layers.width += layers.calls[i].N;
    }
    return layers;
  }

  DecoderHeads heads(int64_t width) {
    DecoderHeads heads{};
    heads.count = integer("heads.count", 1, width), heads.size = integer("heads.size", 1, width);
    heads.column = integer("heads.column", 0, width - heads.size);
    heads.stride = integer("heads.stride", heads.size, width);
    STD_TORCH_CHECK(heads.column + (heads.count - 1) * heads.stride + heads.size <= width,
                    "heads must lie in the ", width, " columns of the projections");
    heads.norm = norm(heads.count * heads.size);
    STD_TORCH_CHECK(!heads.norm.exists || heads.stride == heads.size,
                    "heads with a norm must lie side by side");
    return heads;
  }

  bool is_done() const { return at_ == end_; }

 private:
  Type type_;
  const std::vector<Tensor>& tensors_;
  const int64_t *at_, *end_;
};

DecoderBlock read_block(Reader& r, int64_t width, int64_t positions) {
  DecoderBlock b{};
  b.attention_norm = r.norm(width);
  b.projections = r.layers(width);
  b.q = r.heads(b.projections.width);
  b.k = r.heads(b.projections.width);
  b.v = r.heads(b.projections.width);
  STD_TORCH_CHECK(b.q.size == b.k.size && b.k.count == b.v.count && b.q.count % b.k.count == 0,
                  "q and k must have heads of one size, k and v so many that they divide q's");
  b.pairs = r.choice<Pairs>("pairs", 2);
  b.rotary_size = r.integer("rotary_size", 0, b.q.size);
  const int64_t angles = positions * (b.rotary_size / 2);
  b.cos = r.floats("cos", angles), b.sin = r.floats("sin", angles);
  STD_TORCH_CHECK(b.rotary_size % 2 == 0 && (b.rotary_size == 0 || (b.cos && b.sin)),
                  "rotary_size must be even and have cos and sin");
  b.window = r.integer("window", 0, INT64_MAX);
  b.scale = r.number(), b.softcap = r.number();
  b.output = r.layer(b.q.count * b.v.size, width);
  b.attention_post_norm = r.norm(width);
  b.attention_scale = r.number();
  b.parallel = r.integer("parallel", 0, 1) != 0;
  b.mlp_norm = r.norm(width);
  b.up = r.layers(width);
  b.activation = r.choice<Activation>("activation", int64_t(Activation::softcap));
  b.inner = r.integer("inner", 1, b.up.width);
  b.gate_column = r.integer("gate_column", 0, b.up.width - b.inner);
  b.up_column = r.integer("up_column", -1, b.up.width - b.inner);
  b.down = r.layer(b.inner, width);
  b.mlp_post_norm = r.norm(width);
  b.mlp_scale = r.number();
  return b;
}

}  // namespace

Tensor make_decoder_plan(const Tensor& like, const std::vector<Tensor>& tensors,
                         const Tensor& numbers) {
  DecoderPlan plan{};
  plan.magic = kMagic;
  plan.type = type_of(like, "like");
  Reader r(plan.type, tensors, numbers);
  plan.width = r.integer("width", 1, INT64_MAX);
  plan.positions = r.integer("positions", 0, INT64_MAX);
  plan.count = r.integer("count", 1, INT64_MAX);
  std::vector<DecoderBlock> blocks;
  for (int64_t i = 0; i < plan.count; i++) {
    blocks.push_back(read_block(r, plan.width, plan.positions));
    DecoderBlock& block = blocks.back();
    block.cached_before = plan.cached;
    plan.cached += block.k.count * (block.k.size + block.v.size);
  }
  plan.final_norm = r.norm(plan.width);
  plan.head = r.layer(plan.width, -1);
  plan.logit_scale = r.number(), plan.logit_softcap = r.number();
  plan.embedding = r.embedding(plan.width);
  STD_TORCH_CHECK(r.is_done(), "numbers must describe the plan and nothing else");

  static_assert(sizeof(DecoderPlan) % 8 == 0 && sizeof(DecoderBlock) % 8 == 0);
  const size_t size = blocks.size() * sizeof(DecoderBlock);
  Tensor memory = new_tensor(numbers, {int64_t(sizeof plan + size) / 8});
  char* at = static_cast<char*>(memory.data_ptr());
  std::memcpy(at, &plan, sizeof plan);
  std::memcpy(at + sizeof plan, blocks.data(), size);
  return memory;
}

const DecoderPlan& decoder_plan_of(const Tensor& tensor) {
  const auto* plan = static_cast<const DecoderPlan*>(tensor.data_ptr());
  STD_TORCH_CHECK(tensor.numel() * tensor.element_size() >= int64_t(sizeof *plan) &&
                      plan->magic == kMagic,
                  "plan must be cpu_decoder_plan's result");
  return *plan;
}

}  // namespace hylora
