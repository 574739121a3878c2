// Tensors as the ops of bindings.cpp take and make them: their checks, and new ones.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "call.h"

namespace hylora::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline std::string shape_of(const Tensor& t) {
  std::string words = "[";
  for (int64_t i = 0; i < t.dim(); i++)
    words += (i ? ", " : "") + std::to_string(t.size(i));
  return words + "]";
}

inline Type type_of(const Tensor& t, const char* name) {
  const bool known = t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(known, name, " must be bfloat16 or float16");
  return t.scalar_type() == ScalarType::Half ? Type::fp16 : Type::bf16;
}

// Checks that tensors have the device of `first`, and returns their pointers.
struct Like {
  const Tensor& first;
  const char* name;

  void check(const Tensor& t, const char* its_name, ScalarType type) const {
    const bool here =
        t.is_cuda() == first.is_cuda() && t.get_device_index() == first.get_device_index();
    STD_TORCH_CHECK(here, its_name, " must be on the device of ", name);
    STD_TORCH_CHECK(t.scalar_type() == type, its_name, " has the wrong dtype");
  }

  // The pointer of a matrix [rows, columns] of first's dtype; sets *stride to its row stride.
  void* matrix(const Tensor& t, const char* its_name, int64_t rows, int64_t columns,
               int64_t* stride) const {
    check(t, its_name, first.scalar_type());
    const bool fits = t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
    STD_TORCH_CHECK(fits, its_name, " must be [", rows, ", ", columns, "], got ", shape_of(t));
    STD_TORCH_CHECK(columns <= 1 || t.stride(1) == 1, its_name,
                    " must be contiguous in its last dimension, got stride ", t.stride(1));
    *stride = t.stride(0);
    return t.data_ptr();
  }

  // The pointer of `count` contiguous numbers; of at least as many if it is workspace.
  void* piece(const Tensor& t, const char* its_name, ScalarType type, int64_t count,
              bool workspace = false) const {
    check(t, its_name, type);
    STD_TORCH_CHECK(t.is_contiguous(), its_name, " must lie in one piece");
    STD_TORCH_CHECK(t.numel() == count || (workspace && t.numel() > count), its_name, " must have ",
                    workspace ? "at least " : "", count, " numbers, got ", shape_of(t));
    return t.data_ptr();
  }

  // The pointer of `count` contiguous numbers of first's dtype; null without a tensor.
  void* piece_or_null(const Maybe& t, const char* its_name, int64_t count) const {
    return t ? piece(*t, its_name, first.scalar_type(), count) : nullptr;
  }

  void workspace(const Maybe& partial, const Tensor& counters, const Plan& plan, float** partial_at,
                 int32_t** counters_at) const {
    STD_TORCH_CHECK(partial || !plan.partial_floats, "partial must be given: ", plan.partial_floats,
                    " numbers");
    *partial_at = partial ? static_cast<float*>(piece(*partial, "partial", ScalarType::Float,
                                                      plan.partial_floats, true))
                          : nullptr;
    *counters_at =
        static_cast<int32_t*>(piece(counters, "counters", ScalarType::Int, plan.counters, true));
  }
};

// A contiguous tensor of `like`'s device and dtype, its values undefined.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;)
    strides[i] = stride, stride *= std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
      like.is_cuda() ? like.get_device_index() : 0, &handle));
  return Tensor(handle);
}

}  // namespace hylora::cuda
