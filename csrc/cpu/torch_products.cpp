#include "torch_products.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/tensor.h>

#include "quantized_panels.h"
#include "threads.h"

namespace hylora {
namespace {

using torch::stable::Tensor;

// Measured on six layers, K = 224 to 2048, as speed relative to two MKL products on weights that
// are not packed:
//
//     rows     unpacked for MKL     by the kernels
//      512        0.85 - 0.96         0.88 - 1.02
//     1024        0.92 - 0.97         0.84 - 0.97
//     2048        0.95 - 0.98         0.82 - 0.98
constexpr int64_t kRowsForTorch = 1024;
// Weights unpacked at a time: enough columns for MKL to be fast, few enough to stay in L3.
constexpr int64_t kUnpackedBytes = 8 << 20;
// Rows of h kept at a time. A thread's scratch never shrinks, so its size must not grow with M.
constexpr int64_t kRowsAtATime = 4096;

// Numbers of an unpacked panel of k.
int64_t unpacked_panel(int64_t k) { return round_up(k, 32) * 32; }

Tensor matrix(const float* data, int64_t rows, int64_t columns, int64_t row_stride) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, 1};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<float*>(data), 2, sizes, strides, 0, aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out [M, n] = a [M, k] W^T + bias; columns of W^T are unpacked into `memory`.
void product(int64_t M, const float* a, int64_t lda, const Panels& W, const float* bias, float* out,
             int64_t ldout, float* memory) {
  const Kernels& kernel = kernels();
  const int64_t chunk = std::max<int64_t>(kUnpackedBytes / 4 / unpacked_panel(W.k), 1) * 32;
  const int64_t bytes = W.bits ? panel_bytes(W.bits, W.k) : W.k * 32 * int64_t(sizeof(float));
  const Tensor left = matrix(a, M, W.k, lda);
  for (int64_t n0 = 0; n0 < W.n; n0 += chunk) {
    const int64_t n = std::min(chunk, W.n - n0), panels = ceil_div(n, 32);
    Panels part = W;
    part.data = static_cast<const char*>(W.data) + n0 / 32 * bytes;
    split_among_threads(panels, n * W.k * int64_t(sizeof(float)), [&](int64_t begin, int64_t end) {
      kernel.unpack(part, begin, end, memory, panels * 32);
    });
    const Tensor right = matrix(memory, W.k, n, panels * 32), to = matrix(out + n0, M, n, ldout);
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

bool torch_products_are_faster(const LayerCall& call) {
  const bool is_fma = call.type == Type::fp32 && call.limb_products == 0;
  const bool is_pair = !call.table.panels && call.adapter != Adapter::separate;
  return is_fma && is_pair && call.M >= kRowsForTorch;
}

void run_torch_products(const LayerCall& call) {
  const int64_t h_columns = call.shrink.n;
  const int64_t longest_k = std::max(call.expand.k, h_columns ? call.K : 0);
  const int64_t weights = std::max<int64_t>(kUnpackedBytes / 4, unpacked_panel(longest_k));
  const int64_t most = std::min(call.M, kRowsAtATime);
  const size_t bytes = size_t(weights + most * h_columns) * sizeof(float);
  float* memory = static_cast<float*>(scratch(Scratch::own_work, bytes));
  float* h = memory + weights;
  const float* bias = static_cast<const float*>(call.bias);
  for (int64_t m0 = 0; m0 < call.M; m0 += most) {
    const int64_t rows = std::min(most, call.M - m0);
    const float* x = static_cast<const float*>(call.x) + m0 * call.ldx;
    float* y = static_cast<float*>(call.y) + m0 * call.ldy;
    if (!h_columns) {
      product(rows, x, call.ldx, call.expand, bias, y, call.ldy, memory);
      continue;
    }
    product(rows, x, call.ldx, call.shrink, nullptr, h, h_columns, memory);
    for (int64_t m = 0; m < rows && call.ra && call.alpha != 1.0f; m++)
      for (int64_t c = call.adapter_column; c < h_columns; c++)
        h[m * h_columns + c] *= call.alpha;
    product(rows, h, h_columns, call.expand, bias, y, call.ldy, memory);
  }
}

}  // namespace hylora
