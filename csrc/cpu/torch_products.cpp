#include "torch_products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include "threads.h"

namespace hylora {
namespace {

using torch::stable::Tensor;

// Of six layers of two plain products' speed (MKL's), K = 224 to 2048: at 512 rows 0.85 to 0.96
// this way and 0.88 to 1.02 by our own, at 1024 0.92 to 0.97 and 0.84 to 0.97, at 2048 0.95 to 0.98
// and 0.82 to 0.98.
constexpr int64_t kRowsForTorch = 1024;
// Weights unpacked at a time: enough columns for a product, little enough to stay in L3.
constexpr int64_t kUnpackedBytes = 8 << 20;
// Scratch is kept, so the number of rows must not decide how large it grows.
constexpr int64_t kRowsAtATime = 4096;

Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t column_stride = 1) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<float*>(data), 2, sizes, strides, 0, aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out [M, n] = a [M, k] W^T + bias; rows of W are unpacked into `memory`.
void product(int64_t M, const float* a, int64_t lda, const Panels& W, const float* bias, float* out,
             int64_t ldout, float* memory) {
  const Kernels& kernel = kernels();
  const int64_t chunk = std::max<int64_t>(kUnpackedBytes / 4 / W.k / 32, 1) * 32;
  const int64_t threads = torch::stable::get_num_threads();
  const Tensor left = matrix(a, M, W.k, lda);
  for (int64_t n0 = 0; n0 < W.n; n0 += chunk) {
    const int64_t n = std::min(chunk, W.n - n0), panels = ceil_div(n, 32);
    const Pack rows{Type::fp32,
                    memory,
                    n,
                    W.k,
                    W.k,
                    1,
                    const_cast<float*>(static_cast<const float*>(W.data)) + n0 * W.k};
    in_parallel(std::min(threads, panels), [&](int64_t i, int64_t parts) {
      kernel.unpack(rows, panels * i / parts, panels * (i + 1) / parts);
    });
    const Tensor right = matrix(memory, W.k, n, 1, W.k), to = matrix(out + n0, M, n, ldout);
    if (bias) {
      const Tensor added = matrix(bias + n0, M, n, 0);
      TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(to.get(), added.get(), left.get(), right.get(), 1, 1));
    } else {
      TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
    }
  }
}

}  // namespace

bool torch_is_faster(const Dual& d) {
  const bool multiplies_and_adds = d.type == Type::fp32 && d.products == 0;
  const bool is_pair = !d.order.panels && !d.first_tail.n;
  return multiplies_and_adds && is_pair && d.M >= kRowsForTorch;
}

void through_torch(const Dual& d) {
  const int64_t r = d.first.n, longest = std::max(d.second.k, r ? d.K : 0);
  const int64_t weights = std::max<int64_t>(kUnpackedBytes / 4, longest * 32);
  const int64_t most = at_most(d.M, kRowsAtATime);
  float* memory = static_cast<float*>(scratch(0, size_t(weights + most * r) * sizeof(float)));
  float* h = memory + weights;
  const float* bias = static_cast<const float*>(d.bias);
  for (int64_t m0 = 0; m0 < d.M; m0 += most) {
    const int64_t rows = std::min(most, d.M - m0);
    const float* x = static_cast<const float*>(d.x) + m0 * d.ldx;
    float* y = static_cast<float*>(d.y) + m0 * d.N;
    if (!r) {
      product(rows, x, d.ldx, d.second, bias, y, d.N, memory);
      continue;
    }
    product(rows, x, d.ldx, d.first, nullptr, h, r, memory);
    for (int64_t m = 0; m < rows && d.ra && d.alpha != 1.0f; m++)
      for (int64_t c = d.tail_at; c < r; c++)
        h[m * r + c] *= d.alpha;
    product(rows, h, r, d.second, bias, y, d.N, memory);
  }
}

}  // namespace hylora
