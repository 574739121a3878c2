// A layer's weights: as one tensor for each matrix, or all of them packed into one tensor.
#pragma once
#include "tensors.h"

namespace hylora {

// Panels for each matrix of LayerCall (call.h). With r = 0 the layer is one matrix, `expand` [N,
// K]. shrink and expand may be quantised; an adapter is then separate.
struct LayerWeights {
  const Tensor& shrink;
  const std::optional<Tensor>& adapter_shrink;
  const Tensor& expand;
  const std::optional<Tensor>& adapter_expand;
  const std::optional<Tensor>& pivot_table;  // cpu_pivot_table's result
  int64_t r, ra, N;
  double alpha;
};

// The call of a layer whose input has K columns. Throws if the weights don't fit together. x, y,
// bias and h_a are left to the caller.
LayerCall call_of(const LayerWeights& weights, Type type, int64_t K, bool backward);

// All weights in one tensor of their dtype, since an op on two tensors takes half the time of one
// on six (3.7 us against 8.6): a header of sizes and offsets, then the parts, each at a multiple of
// 64 bytes.
Tensor pack_layer(const Tensor& like, const LayerWeights& weights, int64_t K);

// The call of a packed layer; its weights point into the tensor.
LayerCall call_of_packed(const Tensor& layer);

}  // namespace hylora
