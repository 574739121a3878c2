// The ops of the cpu room, on LibTorch's stable ABI: every check of a tensor is here, the kernels
// see pointers and strides. Shapes and meanings stand in hylora_kernels/backends/cpu/.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "kernels/isa.h"
#include "kernels/panels.h"
#include "threads.h"
#include "torch_products.h"

namespace hylora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& t, const char* name) {
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

int64_t panel_count(Type type, int64_t n, int64_t k) {
  return ceil_div(n, 32) * 32 * (type == Type::bf16 ? round_up(k, 32) : k);
}

Tensor empty_like_type(const Tensor& t, const std::vector<int64_t>& sizes) {
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

Panels panels_of(const Tensor& t, Type type, const char* name, int64_t n, int64_t k) {
  STD_TORCH_CHECK(type_of(t, name) == type && t.is_contiguous(), name,
                  " must have x's dtype and lie in one piece");
  STD_TORCH_CHECK(t.numel() == panel_count(type, n, k), name, " must be the panels of [", n, ", ",
                  k, "], ", panel_count(type, n, k), " numbers, got ", t.numel());
  return {t.data_ptr(), n, k};
}

// x [..., K] as rows: K apart if need be, else as they lie.
struct Rows {
  Tensor held;
  const void* data;
  int64_t M = 1, K, ld;
  std::vector<int64_t> sizes;
};

Rows rows_of(const Tensor& x) {
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1, "x must be [..., K] with at least one dim");
  Rows rows{x, nullptr, 1, x.size(dims - 1), 0, {}};
  rows.sizes.resize(dims);
  bool regular = rows.K <= 1 || x.stride(dims - 1) == 1;
  rows.ld = rows.K;
  int64_t expected = -1;  // what the next outer dim's stride must be
  for (int64_t i = dims - 2; i >= 0; i--) {
    const int64_t size = rows.sizes[i] = x.size(i);
    rows.M *= size;
    if (size == 1) continue;
    const int64_t stride = x.stride(i);
    if (expected < 0)
      rows.ld = stride;
    else
      regular = regular && stride == expected;
    expected = stride * size;
  }
  rows.sizes[dims - 1] = rows.K;
  if (!regular) {
    rows.held = torch::stable::contiguous(x);
    rows.ld = rows.K;
  }
  rows.data = rows.held.data_ptr();
  return rows;
}

Order order_of(const std::optional<Tensor>& table, int64_t n, int64_t r) {
  if (!table) return {};
  const int64_t words = ceil_div(n, 32) * int64_t(sizeof(OrderPanel) / 4);
  STD_TORCH_CHECK(table->numel() == words, "order must be cpu_order(pivots, ", n, ") of ", r,
                  " pivots: ", words, " numbers, got ", table->numel());
  return {static_cast<const OrderPanel*>(table->data_ptr()), n, r};
}

enum Flags : int64_t { kEmit = 1, kScaled = 2, kInput = 4 };

// The weights of one pair of products, checked. K is what x holds a row; x and y come later.
Dual weights_of(Type type, int64_t K, const Tensor& first, const std::optional<Tensor>& first_tail,
                const Tensor& second, const std::optional<Tensor>& second_tail,
                const std::optional<Tensor>& order, int64_t r, int64_t ra, int64_t n, double alpha,
                int64_t flags) {
  Dual d{};
  const bool tails = first_tail.has_value(), joined = ra > 0 && !tails;
  const bool sorts = order && flags & kInput, weaves = order && !sorts;
  STD_TORCH_CHECK(second_tail.has_value() == (tails || (joined && weaves)),
                  "both tails must be given or neither, and of a joined adapter that is woven the "
                  "second");
  STD_TORCH_CHECK(r >= 1 && ra >= 0 && n >= 0, "r must be positive, ra and n not negative");
  STD_TORCH_CHECK(!(joined && sorts), "backward, the pivoted form takes its adapter as tails");
  const int64_t r32 = ceil_div(r, 32), middle = joined ? r + ra : r, outputs = sorts ? K : n;
  const int64_t others = order ? outputs - r : 0;
  STD_TORCH_CHECK(others >= 0, "r must be at most the ", outputs, " outputs, got ", r);
  d.type = type, d.K = K, d.N = n, d.ra = ra;
  d.order = order_of(order, outputs, r);
  d.sorts_input = sorts;
  d.first = panels_of(first, type, "first", middle, sorts ? others : K);
  d.second = panels_of(second, type, "second", weaves ? others : n, middle);
  if (tails) {
    d.first_tail = panels_of(*first_tail, type, "first_tail", ra, sorts ? 32 * r32 + others : K);
    d.second_tail =
        panels_of(*second_tail, type, "second_tail", weaves ? 32 * r32 + others : n, ra);
  } else if (joined && weaves) {
    d.second_tail = panels_of(*second_tail, type, "second_tail", r, r % 32 + ra);
  }
  d.tail_at = joined ? r : 32 * r32, d.alpha = float(alpha);
  d.emit_scaled = flags & kScaled;
  return d;
}

// bias [N] as it lies in memory; `held` keeps a copy alive where one was needed.
const void* bias_of(const std::optional<Tensor>& bias, Type type, int64_t n, Tensor& held) {
  if (!bias) return nullptr;
  STD_TORCH_CHECK(bias->numel() == n && type_of(*bias, "bias") == type, "bias must be [", n,
                  "] of x's dtype");
  held = torch::stable::contiguous(*bias);
  return held.data_ptr();
}

// d on x: y [..., N].
Tensor apply(Dual& d, const Tensor& x, Rows& rows, const std::optional<Tensor>& bias,
             int64_t products) {
  Tensor held = x;
  d.bias = bias_of(bias, d.type, d.N, held);
  rows.sizes.back() = d.N;
  Tensor y = empty_like_type(x, rows.sizes);
  d.x = rows.data, d.M = rows.M, d.ldx = rows.ld, d.y = y.data_ptr(), d.products = int(products);
  if (torch_is_faster(d))
    through_torch(d);
  else
    run(d);
  return y;
}

std::tuple<Tensor, Tensor> dual(const Tensor& x, const Tensor& first,
                                const std::optional<Tensor>& first_tail, const Tensor& second,
                                const std::optional<Tensor>& second_tail,
                                const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& order, int64_t r, int64_t ra,
                                int64_t n, double alpha, int64_t flags, int64_t products) {
  Rows rows = rows_of(x);
  Dual d = weights_of(type_of(x, "x"), rows.K, first, first_tail, second, second_tail, order, r, ra,
                      n, alpha, flags);
  Tensor tail = empty_like_type(x, {flags & kEmit ? rows.M : 0, ra});
  d.tail = flags & kEmit && ra ? tail.data_ptr() : nullptr;
  Tensor y = apply(d, x, rows, bias, products);
  return {y, tail};
}

// One layer as one tensor: a Dual, its pointers counted from the tensor's start, then what they
// point to, each at a multiple of 64 bytes. A call with two tensors costs half of one with six.
constexpr int64_t kHeader = int64_t(sizeof(Dual) + 63) / 64 * 64;

struct Part {
  const void** at;  // where the Dual points to it
  const Tensor* from;
};

Tensor join(const Tensor& first, const std::optional<Tensor>& first_tail, const Tensor& second,
            const std::optional<Tensor>& second_tail, const std::optional<Tensor>& order, int64_t k,
            int64_t r, int64_t ra, int64_t n, double alpha) {
  Dual d = weights_of(type_of(first, "first"), k, first, first_tail, second, second_tail, order, r,
                      ra, n, alpha, 0);
  std::vector<Part> parts = {{&d.first.data, &first}, {&d.second.data, &second}};
  if (first_tail) parts.push_back({&d.first_tail.data, &*first_tail});
  if (second_tail) parts.push_back({&d.second_tail.data, &*second_tail});
  const void* table = d.order.panels;
  if (order) parts.push_back({&table, &*order});
  auto bytes = [](const Part& part) {
    return round_up(part.from->numel() * int64_t(part.from->element_size()), 64);
  };
  int64_t size = kHeader;
  for (const Part& part : parts)
    size += bytes(part);
  Tensor whole = empty_like_type(first, {size / int64_t(first.element_size())});
  char* base = static_cast<char*>(whole.data_ptr());
  want_huge_pages(base, size_t(size));
  int64_t offset = kHeader;
  for (const Part& part : parts) {
    std::memcpy(base + offset, part.from->data_ptr(),
                size_t(part.from->numel()) * part.from->element_size());
    *part.at = reinterpret_cast<const void*>(offset);
    offset += bytes(part);
  }
  d.order.panels = static_cast<const OrderPanel*>(table);
  std::memcpy(base, &d, sizeof d);
  return whole;
}

Dual joined_dual(const Tensor& whole) {
  const char* base = static_cast<const char*>(whole.data_ptr());
  Dual d;
  std::memcpy(&d, base, sizeof d);
  auto moved = [&](const void* offset) -> const void* {
    return offset ? base + reinterpret_cast<intptr_t>(offset) : nullptr;
  };
  for (Panels* panels : {&d.first, &d.first_tail, &d.second, &d.second_tail})
    panels->data = moved(panels->data);
  d.order.panels = static_cast<const OrderPanel*>(moved(d.order.panels));
  return d;
}

Tensor joined(const Tensor& x, const Tensor& whole, const std::optional<Tensor>& bias, int64_t n,
              int64_t products) {
  Dual d = joined_dual(whole);
  Rows rows = rows_of(x);
  STD_TORCH_CHECK(rows.K == d.K && type_of(x, "x") == d.type, "x must be [..., ", d.K,
                  "] of the layer's dtype, got ", rows.K, " columns");
  STD_TORCH_CHECK(n == d.N, "n must be the layer's ", d.N, ", got ", n);
  return apply(d, x, rows, bias, products);
}

// The panels numbered as join takes them: 0 first, 1 first_tail, 2 second, 3 second_tail.
Tensor part(const Tensor& whole, int64_t which) {
  const Dual d = joined_dual(whole);
  STD_TORCH_CHECK(which >= 0 && which < 4, "which must be in 0..3, got ", which);
  const Panels panels[4] = {d.first, d.first_tail, d.second, d.second_tail};
  const Panels& one = panels[which];
  Tensor out = empty_like_type(whole, {one.data ? panel_count(d.type, one.n, one.k) : 0});
  if (one.data) std::memcpy(out.data_ptr(), one.data, size_t(out.numel()) * out.element_size());
  return out;
}

Tensor linear(const Tensor& x, const Tensor& panels, const std::optional<Tensor>& bias, int64_t n,
              int64_t products) {
  Rows rows = rows_of(x);
  Dual d{};
  d.type = type_of(x, "x"), d.K = rows.K, d.N = n;
  d.second = panels_of(panels, d.type, "panels", n, rows.K);
  return apply(d, x, rows, bias, products);
}

Tensor thin(const Tensor& a, const Tensor& b, double scale, bool sums) {
  Thin t{};
  t.type = type_of(b, "b");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) &&
                      type_of(a, "a") == t.type,
                  "a and b must be [M, ra] and [M, n] of one dtype");
  Tensor rows_a = a.stride(1) == 1 ? a : torch::stable::contiguous(a);
  Tensor rows_b = b.stride(1) == 1 ? b : torch::stable::contiguous(b);
  t.a = rows_a.data_ptr(), t.b = rows_b.data_ptr();
  t.M = a.size(0), t.ra = a.size(1), t.n = b.size(1), t.lda = rows_a.stride(0),
  t.ldb = rows_b.stride(0);
  t.scale = float(scale), t.sums = sums;
  Tensor c = empty_like_type(b, {t.ra + sums, t.n});
  t.c = c.data_ptr();
  const Kernels& k = kernels();
  const int64_t panels = ceil_div(t.n, 32);
  const int64_t useful = std::max<int64_t>(1, t.M * t.n * 2 / kBytesPerThread);
  const int64_t threads = torch::stable::get_num_threads();
  in_parallel(std::min({threads, useful, panels}), [&](int64_t i, int64_t parts) {
    k.thin(t, panels * i / parts * 32, std::min(panels * (i + 1) / parts * 32, t.n));
  });
  return c;
}

Tensor pack(const Tensor& W) {
  STD_TORCH_CHECK(W.dim() == 2, "W must be [n, k]");
  Pack p{type_of(W, "W"), W.data_ptr(), W.size(0), W.size(1), W.stride(0), W.stride(1), nullptr};
  Tensor panels = empty_like_type(W, {panel_count(p.type, p.n, p.k)});
  p.panels = panels.data_ptr();
  want_huge_pages(p.panels, size_t(panels.numel()) * panels.element_size());
  const Kernels& k = kernels();
  const int64_t count = ceil_div(p.n, 32), threads = torch::stable::get_num_threads();
  const int64_t useful = std::max<int64_t>(1, p.n * p.k * 2 / kBytesPerThread);
  in_parallel(std::min({threads, useful, count}), [&](int64_t i, int64_t parts) {
    k.pack(p, count * i / parts, count * (i + 1) / parts);
  });
  return panels;
}

Tensor unpack(const Tensor& panels, int64_t n, int64_t k) {
  const Type type = type_of(panels, "panels");
  const Panels packed = panels_of(panels, type, "panels", n, k);
  Tensor W = empty_like_type(panels, {n, k});
  for (int64_t row = 0; row < n; row++)
    copy_panel_row(type, packed, row,
                   static_cast<char*>(W.data_ptr()) + row * k * W.element_size());
  return W;
}

Tensor rows(const Tensor& panels, int64_t n, int64_t k, const Tensor& ids) {
  const Type type = type_of(panels, "panels");
  const Panels packed = panels_of(panels, type, "panels", n, k);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long, "ids must be int64");
  Tensor held = torch::stable::contiguous(ids);
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < ids.dim(); i++)
    sizes.push_back(ids.size(i));
  sizes.push_back(k);
  Tensor out = empty_like_type(panels, sizes);
  const auto* id = static_cast<const int64_t*>(held.data_ptr());
  for (int64_t i = 0; i < ids.numel(); i++) {
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < n, "ids must be in [0, ", n, "), got ", id[i]);
    copy_panel_row(type, packed, id[i],
                   static_cast<char*>(out.data_ptr()) + i * k * out.element_size());
  }
  return out;
}

Tensor order(const Tensor& pivots, int64_t n) {
  STD_TORCH_CHECK(pivots.dim() == 1 && pivots.scalar_type() == ScalarType::Int,
                  "pivots must be int32 [r]");
  Tensor held = torch::stable::contiguous(pivots);
  const auto* at = static_cast<const int32_t*>(held.data_ptr());
  const int64_t r = pivots.size(0);
  for (int64_t i = 0; i < r; i++)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < n && (i == 0 || at[i] > at[i - 1]),
                    "pivots must be strictly ascending within [0, ", n, "), got ", at[i], " at ",
                    i);
  Tensor table = empty_like_type(pivots, {ceil_div(n, 32) * int64_t(sizeof(OrderPanel) / 4)});
  fill_order(at, r, n, static_cast<OrderPanel*>(table.data_ptr()));
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
  m.def("cpu_pack(Tensor W) -> Tensor");
  m.def("cpu_unpack(Tensor panels, int n, int k) -> Tensor");
  m.def("cpu_rows(Tensor panels, int n, int k, Tensor ids) -> Tensor");
  m.def("cpu_linear(Tensor x, Tensor panels, Tensor? bias, int n, int products) -> Tensor");
  m.def("cpu_dual(Tensor x, Tensor first, Tensor? first_tail, Tensor second, Tensor? second_tail,"
        " Tensor? bias, Tensor? order, int r, int ra, int n, float alpha, int flags, int products)"
        " -> (Tensor y, Tensor tail)");
  m.def("cpu_join(Tensor first, Tensor? first_tail, Tensor second, Tensor? second_tail,"
        " Tensor? order, int k, int r, int ra, int n, float alpha) -> Tensor");
  m.def("cpu_joined(Tensor x, Tensor layer, Tensor? bias, int n, int products) -> Tensor");
  m.def("cpu_part(Tensor layer, int which) -> Tensor");
  m.def("cpu_order(Tensor pivots, int n) -> Tensor");
  m.def("cpu_thin(Tensor a, Tensor b, float scale, bool sums) -> Tensor");
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_reason(str level) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CPU, m) {
  m.impl("cpu_pack", TORCH_BOX(&hylora::pack));
  m.impl("cpu_unpack", TORCH_BOX(&hylora::unpack));
  m.impl("cpu_rows", TORCH_BOX(&hylora::rows));
  m.impl("cpu_linear", TORCH_BOX(&hylora::linear));
  m.impl("cpu_dual", TORCH_BOX(&hylora::dual));
  m.impl("cpu_join", TORCH_BOX(&hylora::join));
  m.impl("cpu_joined", TORCH_BOX(&hylora::joined));
  m.impl("cpu_part", TORCH_BOX(&hylora::part));
  m.impl("cpu_order", TORCH_BOX(&hylora::order));
  m.impl("cpu_thin", TORCH_BOX(&hylora::thin));
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&hylora::isa));
  m.impl("cpu_isa_reason", TORCH_BOX(&hylora::isa_reason));
}
