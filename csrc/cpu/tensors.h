// Tensors of LibTorch's stable ABI, checked and taken apart for the kernels.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "call.h"

namespace hylora {

using torch::stable::Tensor;

// Throws for another dtype; the error names the argument.
Type type_of(const Tensor& t, const char* name);

// A contiguous CPU tensor of t's dtype, its values undefined.
Tensor new_tensor(const Tensor& t, const std::vector<int64_t>& sizes);

// Numbers in the panels of a matrix [n, k], padding included.
int64_t numbers_in_panels(Type type, int64_t n, int64_t k);

// The panels of a matrix [n, k] that a tensor holds: of `type`, or uint8 for a quantised matrix,
// whose bits follow from its size.
Panels panels_of(const Tensor& t, Type type, const char* name, int64_t n, int64_t k);

// x [..., K] as M rows. `tensor` is x, or a contiguous copy if the rows are not evenly spaced or
// their numbers not side by side.
struct InputRows {
  Tensor tensor;
  Type type;
  const void* data;
  int64_t M = 1, K, stride;
  std::vector<int64_t> sizes;  // of x
};
InputRows rows_of(const Tensor& x);

}  // namespace hylora
