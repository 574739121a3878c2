// The row operations (row_calls.h) as ops, on LibTorch's stable ABI.
// hylora_kernels/backends/cpu/rows.py is their only user.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "row_calls.h"
#include "tensors.h"
#include "threads.h"

namespace hylora {
namespace {

using torch::headeronly::ScalarType;

// t's numbers if it has this dtype and lies in one piece; null without t.
template <class T>
const T* numbers_of(const std::optional<Tensor>& t, const char* name, ScalarType dtype,
                    int64_t count) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->is_contiguous() && t->numel() == count, name,
                  " must have ", count, " numbers of ", dtype, ", contiguous, got ", t->numel(),
                  " of ", t->scalar_type());
  return static_cast<const T*>(t->data_ptr());
}

// A tensor of this type with four dims, of which the last is contiguous.
const Tensor& heads_of(const Tensor& t, const char* name, Type type) {
  STD_TORCH_CHECK(t.dim() == 4 && type_of(t, name) == type && (t.size(3) <= 1 || t.stride(3) == 1),
                  name, " must have q's dtype, four dims, and numbers of a head side by side");
  return t;
}

// Strides of a tensor [sequences, rows, heads, size], or of a cache [sequences, heads, slots,
// size].
HeadStrides row_strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
HeadStrides cache_strides(const Tensor& t) { return {t.stride(0), t.stride(2), t.stride(1)}; }

// Rows of t [..., columns], as InputRows takes them apart; of its type and size if given.
InputRows rows_like(const Tensor& t, const char* name, const InputRows& x) {
  InputRows rows = rows_of(t);
  STD_TORCH_CHECK(rows.type == x.type && rows.M == x.M && rows.K == x.K, name,
                  " must have x's shape and dtype, got [", rows.M, ", ", rows.K, "] beside [", x.M,
                  ", ", x.K, "]");
  return rows;
}

// Splits parts that read or write all of t among threads.
template <class F>
void split_parts(int64_t parts, const Tensor& t, const F& work) {
  split_among_threads(parts, t.numel() * t.element_size(), work);
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v,
                 const std::optional<Tensor>& first_key, int64_t keys, int64_t window, double scale,
                 double softcap, int64_t pieces) {
  AttentionCall call{};
  call.type = type_of(q, "q");
  heads_of(q, "q", call.type), heads_of(k, "k", call.type), heads_of(v, "v", call.type);
  call.sequences = q.size(0), call.queries = q.size(1), call.heads = q.size(2);
  call.kv_heads = k.size(1), call.head_size = q.size(3), call.value_size = v.size(3);
  call.keys = keys, call.window = window, call.pieces = pieces;
  call.scale = float(scale), call.softcap = float(softcap);
  const bool fits = k.size(0) == call.sequences && v.size(0) == call.sequences &&
                    v.size(1) == call.kv_heads && k.size(3) == call.head_size;
  STD_TORCH_CHECK(fits && call.kv_heads > 0 && call.heads % call.kv_heads == 0,
                  "k and v must be caches [", call.sequences, ", kv_heads, slots, size] for q's ",
                  call.heads, " heads, got ", call.kv_heads, " and ", v.size(1));
  STD_TORCH_CHECK(keys >= call.queries && keys <= k.size(2) && keys <= v.size(2),
                  "keys must be in [", call.queries, ", ", std::min(k.size(2), v.size(2)),
                  "], got ", keys);
  STD_TORCH_CHECK(window >= 0 && softcap >= 0 && pieces >= 1,
                  "window and softcap must be 0 or more, pieces 1 or more");
  call.first_key = numbers_of<int64_t>(first_key, "first_key", ScalarType::Long, call.sequences);
  for (int64_t i = 0; call.first_key && i < call.sequences; i++)
    STD_TORCH_CHECK(call.first_key[i] >= 0, "first_key must be 0 or more, got ", call.first_key[i]);
  Tensor out = new_tensor(q, {call.sequences, call.queries, call.heads, call.value_size});
  call.q = q.data_ptr(), call.q_strides = row_strides(q);
  call.k = k.data_ptr(), call.k_strides = cache_strides(k);
  call.v = v.data_ptr(), call.v_strides = cache_strides(v);
  call.out = out.data_ptr(), call.out_strides = row_strides(out);
  std::vector<float> partials(pieces > 1 ? partial_numbers(call) : 0);
  call.partials = partials.data();
  const Kernels& kernel = kernels();
  const int64_t bytes =
      call.sequences * call.kv_heads * keys * (call.head_size + call.value_size) * q.element_size();
  split_among_threads(attention_parts(call), bytes,
                      [&](int64_t begin, int64_t end) { kernel.attention(call, begin, end); });
  if (pieces > 1) kernel.join_attention(call, 0, join_parts(call));
  return out;
}

// (y, residual + scale * x); without a residual the second is empty.
std::tuple<Tensor, Tensor> norm(const Tensor& x, int64_t heads, const std::optional<Tensor>& weight,
                                const std::optional<Tensor>& bias, double eps, bool centers,
                                bool rounds_first, const std::optional<Tensor>& residual,
                                double scale) {
  const InputRows rows = rows_of(x);
  STD_TORCH_CHECK(heads >= 1 && rows.K % heads == 0 && (heads == 1 || !residual),
                  "heads must divide x's ", rows.K, " columns, and be 1 with a residual, got ",
                  heads);
  NormCall call{};
  call.type = rows.type, call.norm = centers ? Norm::layer : Norm::rms;
  call.rows = rows.M, call.heads = heads, call.width = rows.K / heads;
  call.eps = float(eps), call.rounds_first = rounds_first, call.scale = float(scale);
  call.weight = numbers_of<float>(weight, "weight", ScalarType::Float, call.width);
  call.bias = numbers_of<float>(bias, "bias", ScalarType::Float, call.width);
  call.x = rows.data, call.ldx = rows.stride;
  const InputRows added = residual ? rows_like(*residual, "residual", rows) : rows;
  Tensor y = new_tensor(x, rows.sizes);
  Tensor sum = new_tensor(x, residual ? rows.sizes : std::vector<int64_t>{0});
  call.y = y.data_ptr(), call.ldy = rows.K;
  if (residual) {
    call.residual = added.data, call.ldresidual = added.stride;
    call.sum = sum.data_ptr(), call.ldsum = rows.K;
  }
  split_parts(norm_parts(call), y,
              [&](int64_t begin, int64_t end) { kernels().norm(call, begin, end); });
  return {y, sum};
}

// Into y, which may be x or a part of a cache.
void rotary(const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin,
            const Tensor& positions, bool interleaved) {
  RotaryCall call{};
  call.type = type_of(x, "x"), call.pairs = interleaved ? Pairs::interleaved : Pairs::halves;
  heads_of(x, "x", call.type), heads_of(y, "y", call.type);
  call.sequences = x.size(0), call.rows = x.size(1), call.heads = x.size(2);
  call.head_size = x.size(3);
  for (int64_t i = 0; i < 4; i++)
    STD_TORCH_CHECK(y.size(i) == x.size(i), "y must have x's shape, got ", y.size(i),
                    " instead of ", x.size(i), " in dim ", i);
  STD_TORCH_CHECK(cos.dim() == 2 && cos.size(1) * 2 <= call.head_size,
                  "cos must be [positions, rotary_size / 2] with rotary_size at most ",
                  call.head_size);
  call.rotary_size = cos.size(1) * 2;
  call.cos = numbers_of<float>(cos, "cos", ScalarType::Float, cos.numel());
  call.sin = numbers_of<float>(sin, "sin", ScalarType::Float, cos.numel());
  call.positions =
      numbers_of<int64_t>(positions, "positions", ScalarType::Long, call.sequences * call.rows);
  for (int64_t i = 0; i < call.sequences * call.rows && call.rotary_size; i++)
    STD_TORCH_CHECK(call.positions[i] >= 0 && call.positions[i] < cos.size(0),
                    "positions must be in [0, ", cos.size(0), "), got ", call.positions[i]);
  call.x = x.data_ptr(), call.x_strides = row_strides(x);
  call.y = y.data_ptr(), call.y_strides = row_strides(y);
  split_parts(rotary_parts(call), x,
              [&](int64_t begin, int64_t end) { kernels().rotary(call, begin, end); });
}

Activation activation_of(const std::string& name) {
  constexpr std::array names = {"silu", "gelu", "gelu_tanh", "relu", "softcap"};
  for (size_t i = 0; i < names.size(); i++)
    if (name == names[i]) return Activation(i);
  STD_TORCH_CHECK(false, "activation must be silu, gelu, gelu_tanh, relu or softcap, got ", name);
}

Tensor activation(const Tensor& x, const std::optional<Tensor>& up, const std::string& name,
                  double softcap) {
  const InputRows rows = rows_of(x);
  const InputRows factors = up ? rows_like(*up, "up", rows) : rows;
  Tensor y = new_tensor(x, rows.sizes);
  const ActivationCall call{
      rows.type,     activation_of(name),         rows.M,         rows.K,       rows.data,
      rows.stride,   up ? factors.data : nullptr, factors.stride, y.data_ptr(), rows.K,
      float(softcap)};
  STD_TORCH_CHECK(call.activation != Activation::softcap || softcap > 0,
                  "softcap must be above 0, got ", softcap);
  split_parts(column_parts(call), y,
              [&](int64_t begin, int64_t end) { kernels().activation(call, begin, end); });
  return y;
}

Tensor add(const std::optional<Tensor>& a, const Tensor& b, double scale) {
  const InputRows rows = rows_of(b);
  const InputRows others = a ? rows_like(*a, "a", rows) : rows;
  Tensor y = new_tensor(b, rows.sizes);
  const AddCall call{rows.type,     rows.M,    rows.K,      a ? others.data : nullptr,
                     others.stride, rows.data, rows.stride, float(scale),
                     y.data_ptr(),  rows.K};
  split_parts(column_parts(call), y,
              [&](int64_t begin, int64_t end) { kernels().add(call, begin, end); });
  return y;
}

// int64 [...] of x [..., columns].
Tensor argmax(const Tensor& x, int64_t pieces) {
  const InputRows rows = rows_of(x);
  STD_TORCH_CHECK(pieces >= 1 && pieces <= rows.K, "pieces must be in [1, ", rows.K, "], got ",
                  pieces);
  std::vector<ArgmaxCall::Best> best(size_t(rows.M * pieces));
  std::vector<int64_t> sizes = rows.sizes;
  sizes.pop_back();
  Tensor column = torch::stable::new_empty(x, sizes, ScalarType::Long);
  const ArgmaxCall call{
      rows.type, rows.M,      rows.K,      pieces,
      rows.data, rows.stride, best.data(), static_cast<int64_t*>(column.data_ptr())};
  split_parts(argmax_parts(call), x,
              [&](int64_t begin, int64_t end) { kernels().argmax(call, begin, end); });
  kernels().join_argmax(call, 0, rows.M);
  return column;
}

}  // namespace
}  // namespace hylora

STABLE_TORCH_LIBRARY_FRAGMENT(hylora, m) {
  // q [sequences, queries, heads, size], k and v [sequences, kv_heads, slots, size] -> as q.
  m.def("cpu_attention(Tensor q, Tensor k, Tensor v, Tensor? first_key, int keys, int window,"
        " float scale, float softcap, int pieces) -> Tensor");
  // x [..., heads * width] -> y and the sum with the residual.
  m.def("cpu_norm(Tensor x, int heads, Tensor? weight, Tensor? bias, float eps, bool centers,"
        " bool rounds_first, Tensor? residual, float scale) -> (Tensor y, Tensor sum)");
  // x, y [sequences, rows, heads, size]; cos, sin [positions, rotary_size / 2].
  m.def("cpu_rotary(Tensor x, Tensor(a!) y, Tensor cos, Tensor sin, Tensor positions,"
        " bool interleaved) -> ()");
  m.def("cpu_activation(Tensor x, Tensor? up, str activation, float softcap) -> Tensor");
  m.def("cpu_add(Tensor? a, Tensor b, float scale) -> Tensor");
  m.def("cpu_argmax(Tensor x, int pieces) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CPU, m) {
  m.impl("cpu_attention", TORCH_BOX(&hylora::attention));
  m.impl("cpu_norm", TORCH_BOX(&hylora::norm));
  m.impl("cpu_rotary", TORCH_BOX(&hylora::rotary));
  m.impl("cpu_activation", TORCH_BOX(&hylora::activation));
  m.impl("cpu_add", TORCH_BOX(&hylora::add));
  m.impl("cpu_argmax", TORCH_BOX(&hylora::argmax));
}
