// Tensors taken apart (tensors.h).
#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "quantized_panels.h"

namespace hylora {

Type type_of(const Tensor& t, const char* name) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
  case ScalarType::BFloat16:
    return Type::bf16;
  case ScalarType::Half:
    return Type::fp16;
  case ScalarType::Float:
    return Type::fp32;
  default:
    break;
  }
  STD_TORCH_CHECK(false, name, " must be bfloat16, float16 or float32");
}

Tensor new_tensor(const Tensor& t, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;)
    strides[i] = stride, stride *= std::max<int64_t>(sizes[i], 1);
  int32_t dtype;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(),
                                                  strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

int64_t numbers_in_panels(Type type, int64_t n, int64_t k) {
  return round_up(n, 32) * (type == Type::bf16 ? round_up(k, 32) : k);
}

Panels panels_of(const Tensor& t, Type type, const char* name, int64_t n, int64_t k) {
  if (t.scalar_type() == torch::headeronly::ScalarType::Byte) {
    for (const int bits : kBitWidths)
      if (t.is_contiguous() && t.numel() == ceil_div(n, 32) * panel_bytes(bits, k))
        return {t.data_ptr(), n, k, bits};
    STD_TORCH_CHECK(false, name, " must be the quantised panels of [", n, ", ", k, "], got ",
                    t.numel(), " bytes");
  }
  STD_TORCH_CHECK(type_of(t, name) == type && t.is_contiguous(), name,
                  " must have x's dtype and lie in one piece");
  const int64_t wanted = numbers_in_panels(type, n, k);
  STD_TORCH_CHECK(t.numel() == wanted, name, " must be the panels of [", n, ", ", k, "], ", wanted,
                  " numbers, got ", t.numel());
  return {t.data_ptr(), n, k, 0};
}

InputRows rows_of(const Tensor& x) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1, "x must be [..., K] with at least one dim");
  InputRows rows{x, type_of(x, "x"), nullptr, 1, x.size(dims - 1), 0, {}};
  rows.sizes.resize(dims);
  bool regular = rows.K <= 1 || x.stride(dims - 1) == 1;
  rows.stride = rows.K;
  int64_t expected = -1;  // the stride that makes the next outer dim continue the rows
  for (int64_t i = dims - 2; i >= 0; i--) {
    const int64_t size = rows.sizes[i] = x.size(i);
    rows.M *= size;
    if (size == 1) continue;
    const int64_t stride = x.stride(i);
    if (expected < 0)
      rows.stride = stride;
    else
      regular = regular && stride == expected;
    expected = stride * size;
  }
  rows.sizes[dims - 1] = rows.K;
  if (!regular) {
    rows.tensor = torch::stable::contiguous(x);
    rows.stride = rows.K;
  }
  rows.data = rows.tensor.data_ptr();
  return rows;
}

}  // namespace hylora
