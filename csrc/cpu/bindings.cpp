// The ops of the cpu backend, on LibTorch's stable ABI. They check their arguments and fill a call
// struct; kernels see pointers and strides. hylora_kernels/backends/cpu/ is their only user.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "fingerprint.h"
#include "group.h"
#include "kernels/isa.h"
#include "kernels/panels.h"
#include "packed_layer.h"
#include "quantized_panels.h"
#include "threads.h"

namespace hylora {
namespace {

using torch::headeronly::ScalarType;

// bias [N], contiguous; `copy` keeps a copy alive if one is needed.
const void* bias_of(const std::optional<Tensor>& bias, Type type, int64_t n, Tensor& copy) {
  if (!bias) return nullptr;
  STD_TORCH_CHECK(bias->numel() == n && type_of(*bias, "bias") == type, "bias must be [", n,
                  "] of x's dtype");
  copy = torch::stable::contiguous(*bias);
  return copy.data_ptr();
}

// A new y [..., width] for the rows of x.
Tensor new_output(const InputRows& x, int64_t width) {
  std::vector<int64_t> sizes = x.sizes;
  sizes.back() = width;
  return new_tensor(x.tensor, sizes);
}

// Completes the call with x, y [..., N] and the bias. The caller keeps bias_copy until it has run.
void complete(LayerCall& call, const InputRows& x, void* y, int64_t ldy,
              const std::optional<Tensor>& bias, Tensor& bias_copy, int64_t limb_products) {
  call.x = x.data, call.M = x.M, call.ldx = x.stride;
  call.y = y, call.ldy = ldy;
  call.bias = bias_of(bias, call.type, call.N, bias_copy);
  call.limb_products = int(limb_products);
}

// Computes the call on x with the bias into a new y [..., N].
Tensor apply(LayerCall& call, const InputRows& x, const std::optional<Tensor>& bias,
             int64_t limb_products) {
  Tensor y = new_output(x, call.N), bias_copy = y;
  complete(call, x, y.data_ptr(), call.N, bias, bias_copy, limb_products);
  run_group(&call, 1);
  return y;
}

std::tuple<Tensor, Tensor>
layer(const Tensor& x, const Tensor& shrink, const std::optional<Tensor>& adapter_shrink,
      const Tensor& expand, const std::optional<Tensor>& adapter_expand,
      const std::optional<Tensor>& bias, const std::optional<Tensor>& pivot_table, int64_t r,
      int64_t ra, int64_t n, double alpha, bool emit_h_a, bool backward, int64_t limb_products) {
  InputRows rows = rows_of(x);
  const LayerWeights weights{shrink, adapter_shrink, expand, adapter_expand, pivot_table, r, ra,
                             n,      alpha};
  LayerCall call = call_of(weights, rows.type, rows.K, backward);
  Tensor h_a = new_tensor(x, {emit_h_a ? rows.M : 0, ra});
  call.h_a = emit_h_a && ra ? h_a.data_ptr() : nullptr;
  Tensor y = apply(call, rows, bias, limb_products);
  return {y, h_a};
}

Tensor pack_layer_op(const Tensor& like, const Tensor& shrink,
                     const std::optional<Tensor>& adapter_shrink, const Tensor& expand,
                     const std::optional<Tensor>& adapter_expand,
                     const std::optional<Tensor>& pivot_table, int64_t k, int64_t r, int64_t ra,
                     int64_t n, double alpha) {
  return pack_layer(
      like, {shrink, adapter_shrink, expand, adapter_expand, pivot_table, r, ra, n, alpha}, k);
}

LayerCall call_on_packed(const InputRows& x, const Tensor& layer) {
  const LayerCall call = call_of_packed(layer);
  STD_TORCH_CHECK(x.K == call.K && x.type == call.type, "x must be [..., ", call.K,
                  "] of the layer's dtype, got ", x.K, " columns");
  return call;
}

LayerCall call_on_matrix(const InputRows& x, const Tensor& panels, int64_t n) {
  LayerCall call{};
  call.type = x.type, call.K = x.K, call.N = n;
  call.expand = panels_of(panels, call.type, "panels", n, x.K);
  return call;
}

Tensor packed_layer(const Tensor& x, const Tensor& layer, const std::optional<Tensor>& bias,
                    int64_t n, int64_t limb_products) {
  const InputRows rows = rows_of(x);
  LayerCall call = call_on_packed(rows, layer);
  STD_TORCH_CHECK(n == call.N, "n must be the layer's ", call.N, ", got ", n);
  return apply(call, rows, bias, limb_products);
}

Tensor linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t n,
              int64_t limb_products) {
  const InputRows rows = rows_of(x);
  LayerCall call = call_on_matrix(rows, panels, n);
  return apply(call, rows, bias, limb_products);
}

// biases and limb_products may be empty: none, and 0.
Tensor packed_group(const Tensor& x, const std::vector<Tensor>& weights,
                    const std::vector<int64_t>& matrix_outputs,
                    const std::vector<std::optional<Tensor>>& biases,
                    const std::vector<int64_t>& limb_products, int64_t width) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(matrix_outputs.size() == count && (biases.empty() || biases.size() == count) &&
                      (limb_products.empty() || limb_products.size() == count),
                  "matrix_outputs, biases and limb_products must have one value for each of the ",
                  count, " weights");
  const InputRows rows = rows_of(x);
  std::vector<LayerCall> calls;
  int64_t columns = 0;
  for (size_t i = 0; i < count; i++) {
    calls.push_back(matrix_outputs[i] ? call_on_matrix(rows, weights[i], matrix_outputs[i])
                                      : call_on_packed(rows, weights[i]));
    columns += calls[i].N;
  }
  STD_TORCH_CHECK(columns <= width, "width must be at least the members' ", columns,
                  " outputs, got ", width);
  Tensor y = new_output(rows, width);
  char* to = static_cast<char*>(y.data_ptr());
  std::vector<Tensor> bias_copies(biases.size(), y);
  for (size_t i = 0; i < count; i++) {
    const int64_t products = limb_products.empty() ? 0 : limb_products[i];
    if (biases.empty())
      complete(calls[i], rows, to, width, std::nullopt, y, products);
    else
      complete(calls[i], rows, to, width, biases[i], bias_copies[i], products);
    to += calls[i].N * y.element_size();
  }
  run_group(calls.data(), int64_t(count));
  return y;
}

Tensor adapter_gradients(const Tensor& a, const Tensor& b, double scale, bool sums) {
  AdapterGradients call{};
  call.type = type_of(b, "b");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) &&
                      type_of(a, "a") == call.type,
                  "a and b must be [M, ra] and [M, n] of one dtype");
  const Tensor rows_a = a.stride(1) == 1 ? a : torch::stable::contiguous(a);
  const Tensor rows_b = b.stride(1) == 1 ? b : torch::stable::contiguous(b);
  call.a = rows_a.data_ptr(), call.b = rows_b.data_ptr();
  call.lda = rows_a.stride(0), call.ldb = rows_b.stride(0);
  call.M = a.size(0), call.ra = a.size(1), call.n = b.size(1);
  call.scale = float(scale), call.sums = sums;
  Tensor c = new_tensor(b, {call.ra + sums, call.n});
  call.c = c.data_ptr();
  const Kernels& k = kernels();
  split_among_threads(ceil_div(call.n, 32), call.M * call.n * 2, [&](int64_t begin, int64_t end) {
    k.adapter_gradients(call, begin * 32, std::min(end * 32, call.n));
  });
  return c;
}

Tensor pack(const Tensor& W) {
  STD_TORCH_CHECK(W.dim() == 2, "W must be [n, k]");
  Packing packing{type_of(W, "W"), W.data_ptr(), W.size(0), W.size(1),
                  W.stride(0),     W.stride(1),  nullptr};
  Tensor panels = new_tensor(W, {numbers_in_panels(packing.type, packing.n, packing.k)});
  packing.panels = panels.data_ptr();
  want_huge_pages(packing.panels, size_t(panels.numel()) * panels.element_size());
  const Kernels& k = kernels();
  split_among_threads(ceil_div(packing.n, 32), packing.n * packing.k * 2,
                      [&](int64_t begin, int64_t end) { k.pack(packing, begin, end); });
  return panels;
}

int64_t fingerprint(const Tensor& W) {
  STD_TORCH_CHECK(W.dim() == 2, "W must be [n, k]");
  const bool in_order = W.stride(0) == 1 || W.stride(1) == 1;
  const Tensor dense = in_order ? W : torch::stable::contiguous(W);
  const int along = dense.stride(1) == 1 ? 1 : 0;  // numbers side by side
  const int64_t size = W.element_size();
  return fingerprint_of(dense.data_ptr(), W.size(1 - along), W.size(along) * size,
                        dense.stride(1 - along) * size);
}

// W [n, k] out of its panels; `like` gives the dtype.
Tensor unpacked(const Tensor& like, Type type, const Panels& panels) {
  Tensor W = new_tensor(like, {panels.n, panels.k});
  char* to = static_cast<char*>(W.data_ptr());
  for (int64_t row = 0; row < panels.n; row++)
    copy_panel_row(type, panels, row, to + row * panels.k * W.element_size());
  return W;
}

Tensor unpack(const Tensor& panels, int64_t n, int64_t k) {
  const Type type = type_of(panels, "panels");
  return unpacked(panels, type, panels_of(panels, type, "panels", n, k));
}

Tensor unpack_part(const Tensor& layer, int64_t part) {
  STD_TORCH_CHECK(part >= 0 && part < 4, "part must be in 0..3, got ", part);
  const LayerCall call = call_of_packed(layer);
  const Panels* parts[4] = {&call.shrink, &call.adapter_shrink, &call.expand, &call.adapter_expand};
  return unpacked(layer, call.type, *parts[part]);
}

// W[ids]; `like` gives the dtype.
Tensor rows_at(const Tensor& like, Type type, const Panels& panels, const Tensor& ids) {
  const int64_t n = panels.n, k = panels.k;
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids must be int64");
  const Tensor contiguous_ids = torch::stable::contiguous(ids);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < ids.dim(); i++)
    sizes.push_back(ids.size(i));
  sizes.push_back(k);
  Tensor out = new_tensor(like, sizes);
  const auto* id = static_cast<const int64_t*>(contiguous_ids.data_ptr());
  for (int64_t i = 0; i < ids.numel(); i++) {
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < n, "ids must be in [0, ", n, "), got ", id[i]);
    copy_panel_row(type, panels, id[i],
                   static_cast<char*>(out.data_ptr()) + i * k * out.element_size());
  }
  return out;
}

Tensor rows(const Tensor& panels, int64_t n, int64_t k, const Tensor& ids) {
  const Type type = type_of(panels, "panels");
  return rows_at(panels, type, panels_of(panels, type, "panels", n, k), ids);
}

Tensor packed_rows(const Tensor& layer, int64_t k, const Tensor& ids) {
  const LayerCall call = call_of_packed(layer);
  STD_TORCH_CHECK(call.shrink.n == 0 && k == call.K, "layer must be one matrix of ", k, " columns");
  return rows_at(layer, call.type, call.expand, ids);
}

// A quantised matrix's tensors as the plain code takes them.
QuantizedPlanes planes_of(const Tensor& codes, const Tensor& scales,
                          const std::optional<Tensor>& zeros, int64_t bits, int64_t k,
                          bool packed_zeros) {
  STD_TORCH_CHECK(std::count(std::begin(kBitWidths), std::end(kBitWidths), bits) == 1,
                  "bits must be 2, 3, 4, 5, 6 or 8, got ", bits);
  const int64_t n = codes.size(0), groups = ceil_div(k, kGroup);
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Byte && codes.is_contiguous() &&
                      codes.numel() == n * groups * 8 * bits,
                  "codes must be contiguous uint8 [n, ", groups, ", ", 8 * bits, "]");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Half && scales.is_contiguous() &&
                      scales.numel() == n * groups,
                  "scales must be contiguous float16 [", n, ", ", groups, "]");
  STD_TORCH_CHECK(zeros.has_value() == (bits < 8), "zeros must be given, but not for 8 bits");
  const int64_t count = packed_zeros ? ceil_div(n * groups, kGroup) * 8 * bits : n * groups;
  STD_TORCH_CHECK(!zeros || (zeros->scalar_type() == ScalarType::Byte && zeros->is_contiguous() &&
                             zeros->numel() == count),
                  "zeros must be ", count, " contiguous numbers of uint8");
  return {int(bits),
          n,
          k,
          static_cast<uint8_t*>(codes.data_ptr()),
          static_cast<uint16_t*>(scales.data_ptr()),
          zeros ? static_cast<uint8_t*>(zeros->data_ptr()) : nullptr};
}

Tensor pack_quantized_op(const Tensor& codes, const Tensor& scales,
                         const std::optional<Tensor>& zeros, int64_t bits, int64_t k) {
  const QuantizedPlanes W = planes_of(codes, scales, zeros, bits, k, true);
  const int64_t panels = ceil_div(W.n, 32), bytes = panels * panel_bytes(W.bits, k);
  Tensor packed = new_tensor(codes, {bytes});
  want_huge_pages(packed.data_ptr(), size_t(bytes));
  // Each byte costs as much as reading a hundred.
  split_among_threads(panels, 100 * bytes, [&](int64_t begin, int64_t end) {
    pack_quantized(W, static_cast<char*>(packed.data_ptr()), begin, end);
  });
  return packed;
}

void unpack_quantized_op(const Tensor& layer, int64_t part, int64_t bits, Tensor codes,
                         Tensor scales, std::optional<Tensor> zeros) {
  const LayerCall call = call_of_packed(layer);
  const Panels& panels = part ? call.expand : call.shrink;
  STD_TORCH_CHECK(bits == panels.bits && codes.size(0) == panels.n, "part ", part,
                  " of the layer must be quantised to ", bits, " bits and have ", codes.size(0),
                  " rows");
  unpack_quantized(planes_of(codes, scales, zeros, bits, panels.k, false),
                   static_cast<const char*>(panels.data), 0, ceil_div(panels.n, 32));
}

Tensor pivot_table(const Tensor& pivots, int64_t n) {
  STD_TORCH_CHECK(pivots.dim() == 1 && pivots.scalar_type() == ScalarType::Int,
                  "pivots must be int32 [r]");
  const Tensor contiguous_pivots = torch::stable::contiguous(pivots);
  const auto* at = static_cast<const int32_t*>(contiguous_pivots.data_ptr());
  const int64_t r = pivots.size(0);
  for (int64_t i = 0; i < r; i++)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < n && (i == 0 || at[i] > at[i - 1]),
                    "pivots must be strictly ascending within [0, ", n, "), got ", at[i], " at ",
                    i);
  Tensor table = new_tensor(pivots, {ceil_div(n, 32) * int64_t(sizeof(PivotPanel) / 4)});
  fill_pivot_table(at, r, n, static_cast<PivotPanel*>(table.data_ptr()));
  return table;
}

std::string isa() {
  kernels();
  return isa_name(isa_chosen().isa);
}

std::string isa_reason(const std::string& name) {
  Isa level;
  STD_TORCH_CHECK(isa_parse(name.c_str(), &level),
                  "level must be one of scalar, avx2, avx512, avx512_bf16, amx_bf16, got ", name);
  const char* reason = isa_unavailable(level);
  return reason ? reason : "";
}

}  // namespace
}  // namespace hylora

STABLE_TORCH_LIBRARY_FRAGMENT(hylora, m) {
  // W [n, k] -> its panels, one dim; back; and W[ids].
  m.def("cpu_pack(Tensor W) -> Tensor");
  m.def("cpu_fingerprint(Tensor W) -> int");
  m.def("cpu_unpack(Tensor panels, int n, int k) -> Tensor");
  m.def("cpu_rows(Tensor panels, int n, int k, Tensor ids) -> Tensor");
  // x [..., k] -> y [..., n] = x W^T + bias.
  m.def("cpu_linear(Tensor x, Tensor panels, Tensor? bias, int n, int limb_products) -> Tensor");
  // A layer (LayerCall in call.h) on panels of each matrix. h_a [M, ra] if emit_h_a, else [0, ra].
  m.def("cpu_layer(Tensor x, Tensor shrink, Tensor? adapter_shrink, Tensor expand,"
        " Tensor? adapter_expand, Tensor? bias, Tensor? pivot_table, int r, int ra, int n,"
        " float alpha, bool emit_h_a, bool backward, int limb_products)"
        " -> (Tensor y, Tensor h_a)");
  // A layer packed into one tensor of like's dtype; the call on it; and one matrix of it: part 0 is
  // shrink, 1 adapter_shrink, 2 expand, 3 adapter_expand, [0, 0] where there is none.
  m.def("cpu_pack_layer(Tensor like, Tensor shrink, Tensor? adapter_shrink, Tensor expand,"
        " Tensor? adapter_expand, Tensor? pivot_table, int k, int r, int ra, int n, float alpha)"
        " -> Tensor");
  m.def("cpu_packed_layer(Tensor x, Tensor layer, Tensor? bias, int n, int limb_products)"
        " -> Tensor");
  // Layers on the same x, computed as one: y [..., width], the members' outputs side by side; the
  // columns behind them are undefined. Each of `weights` is a packed layer, or the panels of a
  // matrix of so many outputs; matrix_outputs is 0 for a layer. biases and limb_products: for each,
  // or empty for none.
  m.def("cpu_packed_group(Tensor x, Tensor[] weights, int[] matrix_outputs, Tensor?[] biases,"
        " int[] limb_products, int width) -> Tensor");
  m.def("cpu_unpack_part(Tensor layer, int part) -> Tensor");
  // A quantised matrix (weights.QuantizedMatrix) [n, k] -> its panels, uint8; a packed layer holds
  // them as it does others. Back from one, part 0 is shrink, 1 expand; zeros is [n, groups], a zero
  // point a byte. And rows of a packed layer that is one matrix of k columns.
  m.def("cpu_pack_quantized(Tensor codes, Tensor scales, Tensor? zeros, int bits, int k)"
        " -> Tensor");
  m.def("cpu_unpack_quantized(Tensor layer, int part, int bits, Tensor(a!) codes,"
        " Tensor(b!) scales, Tensor(c!)? zeros) -> ()");
  m.def("cpu_packed_rows(Tensor layer, int k, Tensor ids) -> Tensor");
  // pivots int32 [r], ascending -> the pivot table of n outputs (PivotPanel in call.h), as int32.
  m.def("cpu_pivot_table(Tensor pivots, int n) -> Tensor");
  // a [M, ra], b [M, n] -> scale a^T b [ra, n], with sums one row more: the sum of b's rows.
  m.def("cpu_adapter_gradients(Tensor a, Tensor b, float scale, bool sums) -> Tensor");
  // The instruction set in use; why one can't be used here, or "".
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_reason(str level) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&hylora::pack));
  m.impl("cpu_fingerprint", TORCH_BOX(&hylora::fingerprint));
  m.impl("cpu_unpack", TORCH_BOX(&hylora::unpack));
  m.impl("cpu_rows", TORCH_BOX(&hylora::rows));
  m.impl("cpu_linear", TORCH_BOX(&hylora::linear));
  m.impl("cpu_layer", TORCH_BOX(&hylora::layer));
  m.impl("cpu_pack_layer", TORCH_BOX(&hylora::pack_layer_op));
  m.impl("cpu_packed_layer", TORCH_BOX(&hylora::packed_layer));
  m.impl("cpu_packed_group", TORCH_BOX(&hylora::packed_group));
  m.impl("cpu_unpack_part", TORCH_BOX(&hylora::unpack_part));
  m.impl("cpu_pack_quantized", TORCH_BOX(&hylora::pack_quantized_op));
  m.impl("cpu_unpack_quantized", TORCH_BOX(&hylora::unpack_quantized_op));
  m.impl("cpu_packed_rows", TORCH_BOX(&hylora::packed_rows));
  m.impl("cpu_pivot_table", TORCH_BOX(&hylora::pivot_table));
  m.impl("cpu_adapter_gradients", TORCH_BOX(&hylora::adapter_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&hylora::isa));
  m.impl("cpu_isa_reason", TORCH_BOX(&hylora::isa_reason));
}
