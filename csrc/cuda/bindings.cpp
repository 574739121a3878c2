// The ops of the cuda backend, on LibTorch's stable ABI. Every check of a tensor is here or in
// tensors.h; the kernels see the structs of call.h. Results and workspace come in as tensors,
// allocated by the caller.
//
// One library serves torch with and without CUDA, since it needs no CUDA library to load. In the
// emulator's build (tests/cuda_emulator) the same ops serve tensors on the CPU.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "tensors.h"

#if !defined(HYLORA_NO_CUDA) && !defined(HYLORA_EMULATION)
// From the static runtime, whose headers only nvcc is sure to find.
extern "C" int cudaDriverGetVersion(int*);
extern "C" int cudaRuntimeGetVersion(int*);
#endif

namespace hylora {
namespace {

using cuda::Like;
using cuda::Maybe;
using cuda::new_tensor;
using cuda::shape_of;
using cuda::type_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ------------------------------------------------------------ what the library holds

// The architectures with machine code, as in "80 90"; "" if there are no kernels.
std::string archs() {
#if defined(HYLORA_CUDA_ARCHS)
  return HYLORA_CUDA_ARCHS;
#else
  return "";
#endif
}

// The reason why a GPU of this architecture can't be served, or "". An architecture without machine
// code is served by the PTX of the oldest one.
std::string lacks(int64_t arch) {
#if defined(HYLORA_EMULATION)
  return "";
#elif defined(HYLORA_NO_CUDA)
  return "the library has no CUDA kernels: " HYLORA_NO_CUDA;
#else
  if (arch >= cuda::kLeastArch) return "";
  return "serves GPUs from sm_" + std::to_string(cuda::kLeastArch) + " on, got sm_" +
         std::to_string(arch);
#endif
}

// The reason why the driver can't run the kernels, or "".
std::string driver_lacks() {
#if !defined(HYLORA_NO_CUDA) && !defined(HYLORA_EMULATION)
  int driver = 0, runtime = 0;
  cudaDriverGetVersion(&driver);
  cudaRuntimeGetVersion(&runtime);
  auto version = [](int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  };
  if (driver / 1000 < runtime / 1000)
    return "the kernels were built with CUDA " + version(runtime) + ", the driver knows " +
           version(driver) + ": update it, or build the library with an older nvcc";
#endif
  return "";
}

// ------------------------------------------------------------ launches

#if !defined(HYLORA_NO_CUDA)
// The stream that torch works in. The function that returns it is in torch's CUDA library, which a
// CPU build lacks. torch doesn't load that library globally, so it is opened by name.
void* stream_of(const Tensor& t) {
  if (!t.is_cuda()) return nullptr;
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto current = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    if (void* library = found ? nullptr : dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY))
      found = dlsym(library, name);
    return reinterpret_cast<Function>(found);
  }();
  STD_TORCH_CHECK(current, "this torch has no CUDA: aoti_torch_get_current_cuda_stream is missing");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current(t.get_device_index(), &stream));
  return stream;
}
#endif

// how: a Plan, or the number of multiprocessors where a call needs none.
template <class Call, class How>
void launch(const Call& call, const How& how, const Tensor& on, int64_t arch) {
  const std::string reason = lacks(arch);
  STD_TORCH_CHECK(reason.empty(), reason);
#if !defined(HYLORA_NO_CUDA)
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (on.is_cuda()) guard.emplace(on.get_device_index());
  const char* error = cuda::launch(call, how, stream_of(on));
  STD_TORCH_CHECK(!*error, "the CUDA launch failed: ", error);
#endif
}

void layer(const Tensor& x, const Tensor& W1, const Maybe& W1a, const Tensor& W2, const Maybe& W2a,
           const Maybe& bias, const Maybe& pivots, const Maybe& others, double alpha,
           bool transposed, int64_t multiprocessors, int64_t arch, const Tensor& y, const Tensor& h,
           const Maybe& h_a, const Maybe& partial, const Tensor& counters) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && W1.dim() == 2 && (!W1a || W1a->dim() == 2),
                  "x, y, W1 and W1a must be matrices");
  STD_TORCH_CHECK(W1a.has_value() == W2a.has_value(), "W1a and W2a must come together");
  STD_TORCH_CHECK(pivots.has_value() == others.has_value(), "pivots and others must come together");
  const Like like{x, "x"};
  cuda::LayerCall d{};
  d.type = type_of(x, "x"), d.transposed = transposed, d.alpha = float(alpha);
  d.M = x.size(0), d.K = x.size(1), d.N = y.size(1);
  d.rank = W1.size(transposed), d.lora_rank = W1a ? W1a->size(transposed) : 0;
  STD_TORCH_CHECK(d.M && d.K && d.N && d.rank, "no dimension may be empty, got x ", shape_of(x),
                  ", W1 ", shape_of(W1), " and y ", shape_of(y));
  int64_t depth = d.K, width = d.N, y_stride;
  if (pivots) {
    (transposed ? depth : width) -= d.rank;
    d.others_count = transposed ? depth : width;
    STD_TORCH_CHECK(d.others_count > 0, "pivots must be fewer than the outputs, got ", d.rank);
    d.pivots = static_cast<int32_t*>(like.piece(*pivots, "pivots", ScalarType::Int, d.rank));
    d.others =
        static_cast<int64_t*>(like.piece(*others, "others", ScalarType::Long, d.others_count));
  }
  // Weights are checked as they are stored: [outputs, inputs] forward, the transpose of it
  // backward.
  auto weight = [&](const Tensor& t, const char* name, int64_t outputs, int64_t inputs,
                    int64_t* stride) {
    return transposed ? like.matrix(t, name, inputs, outputs, stride)
                      : like.matrix(t, name, outputs, inputs, stride);
  };
  d.x = like.matrix(x, "x", d.M, d.K, &d.x_stride);
  d.W1 = weight(W1, "W1", d.rank, depth, &d.w1_stride);
  d.W2 = weight(W2, "W2", width, d.rank, &d.w2_stride);
  if (W1a) {
    d.W1a = weight(*W1a, "W1a", d.lora_rank, d.K, &d.w1a_stride);
    d.W2a = weight(*W2a, "W2a", d.N, d.lora_rank, &d.w2a_stride);
  }
  d.bias = like.piece_or_null(bias, "bias", d.N);
  d.h_a = like.piece_or_null(h_a, "h_a", d.M * d.lora_rank);
  d.y = like.matrix(y, "y", d.M, d.N, &y_stride);
  STD_TORCH_CHECK(y.is_contiguous(), "y must lie in one piece");
  d.y_stride = d.N;
  const cuda::Plan plan = cuda::plan(d, int(multiprocessors), int(arch));
  d.h = like.piece(h, "h", x.scalar_type(), d.M * plan.h_columns, true);
  like.workspace(partial, counters, plan, &d.partial, &d.counters);
  launch(d, plan, x, arch);
}

// x [..., K] -> y [..., N], a whole layer packed for inference in one launch: P [rank + lora_rank,
// K]; Q [N, rank], in the pivoted form [others, rank]; aB [N, lora_rank] or none. The result and
// the workspace are allocated here, since each tensor that Python makes costs the host a
// microsecond.
Tensor packed_layer(const Tensor& given, const Tensor& P, const Tensor& Q, const Maybe& aB,
                    const Maybe& bias, const Maybe& pivots, const Maybe& others,
                    const Tensor& counters, int64_t N, int64_t rank, int64_t lora_rank,
                    int64_t multiprocessors, int64_t arch) {
  const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t dims = x.dim(), width = pivots ? N - rank : N;
  STD_TORCH_CHECK(dims >= 1, "x must be [..., K] with at least one dim");
  STD_TORCH_CHECK(aB.has_value() == (lora_rank > 0), "aB must come with lora_rank ", lora_rank);
  STD_TORCH_CHECK(pivots.has_value() == others.has_value(), "pivots and others must come together");
  std::vector<int64_t> sizes(dims);
  cuda::LayerCall d{};
  d.type = type_of(x, "x"), d.alpha = 1.0f;
  d.M = 1, d.K = x.size(dims - 1), d.N = d.y_stride = N, d.rank = rank, d.lora_rank = lora_rank;
  for (int64_t i = 0; i < dims - 1; i++)
    d.M *= sizes[i] = x.size(i);
  sizes[dims - 1] = N;
  STD_TORCH_CHECK(d.M && d.K && rank > 0 && width > 0, "no dimension may be empty, got x ",
                  shape_of(x), ", rank ", rank, " and ", width, " outputs");
  const Like like{x, "x"};
  d.x = x.data_ptr(), d.x_stride = d.K;
  d.W1 = like.matrix(P, "P", rank + lora_rank, d.K, &d.w1_stride);
  d.W2 = like.matrix(Q, "Q", width, rank, &d.w2_stride);
  if (aB) {
    d.W1a = static_cast<const char*>(d.W1) + 2 * rank * d.w1_stride, d.w1a_stride = d.w1_stride;
    d.W2a = like.matrix(*aB, "aB", N, lora_rank, &d.w2a_stride);
  }
  if (pivots) {
    d.others_count = width;
    d.pivots = static_cast<int32_t*>(like.piece(*pivots, "pivots", ScalarType::Int, rank));
    d.others = static_cast<int64_t*>(like.piece(*others, "others", ScalarType::Long, width));
  }
  d.bias = like.piece_or_null(bias, "bias", N);
  const cuda::Plan plan = cuda::plan(d, int(multiprocessors), int(arch));
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const Tensor y = new_tensor(x, sizes, dtype);
  // One workspace for the split sums, which need the alignment more, and then h.
  const int64_t h_floats = (d.M * plan.h_columns + 1) / 2;
  const Tensor workspace =
      new_tensor(x, {plan.partial_floats + h_floats}, aoti_torch_dtype_float32());
  d.y = y.data_ptr(), d.partial = static_cast<float*>(workspace.data_ptr());
  d.h = d.partial + plan.partial_floats;
  d.counters =
      static_cast<int32_t*>(like.piece(counters, "counters", ScalarType::Int, plan.counters, true));
  launch(d, plan, x, arch);
  return y;
}

// x [..., K] of up to 16 rows -> y [..., width], several packed layers in one launch. P [R, K]; Q
// 1-D; columns int32 and others int64, the same numbers; biases none or one for each; places: the
// ten numbers of each member of group_gpu.Member.
Tensor packed_group(const Tensor& given, const Tensor& P, const Tensor& Q, const Tensor& columns,
                    const Tensor& others, const std::vector<Maybe>& biases, const Tensor& counters,
                    const std::vector<int64_t>& places, int64_t width, int64_t multiprocessors,
                    int64_t arch) {
  constexpr size_t kFields = 10;
  const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t dims = x.dim(), count = int64_t(places.size() / kFields);
  STD_TORCH_CHECK(dims >= 1, "x must be [..., K] with at least one dim");
  STD_TORCH_CHECK(places.size() % kFields == 0 && count >= 1 && count <= cuda::kMostMembers,
                  "places must be ", kFields, " numbers for each of 1 to ", cuda::kMostMembers,
                  " members, got ", places.size());
  STD_TORCH_CHECK(biases.empty() || int64_t(biases.size()) == count, "biases must be ", count,
                  " or none, got ", biases.size());
  std::vector<int64_t> sizes(dims);
  int64_t M = 1, K = x.size(dims - 1), row_stride, all_columns = 0;
  for (int64_t i = 0; i < dims - 1; i++)
    M *= sizes[i] = x.size(i);
  sizes[dims - 1] = width;
  STD_TORCH_CHECK(M >= 1 && M <= cuda::kDecodeRows && K, "x must have 1 to ", cuda::kDecodeRows,
                  " rows, got ", shape_of(x));
  const Like like{x, "x"};
  const cuda::Type type = type_of(x, "x");
  const char* p = static_cast<char*>(like.matrix(P, "P", P.size(0), K, &row_stride));
  const char* q = static_cast<char*>(like.piece(Q, "Q", x.scalar_type(), Q.numel()));
  for (int64_t i = 0; i < count; i++)
    all_columns += places[i * kFields];
  STD_TORCH_CHECK(all_columns <= width, "width must be at least the members' ", all_columns,
                  " outputs, got ", width);
  auto* pivots =
      static_cast<int32_t*>(like.piece(columns, "columns", ScalarType::Int, all_columns));
  auto* lists = static_cast<int64_t*>(like.piece(others, "others", ScalarType::Long, all_columns));
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const Tensor y = new_tensor(x, sizes, dtype);
  cuda::GroupCall g{};
  g.count = int(count);
  for (int64_t i = 0; i < count; i++) {
    const int64_t* at = &places[i * kFields];
    cuda::LayerCall& d = g.members[i];
    const int64_t is_pivoted = at[3], y_at = at[9];
    d.type = type, d.alpha = 1.0f, d.M = M, d.K = K;
    d.N = at[0], d.rank = at[1], d.lora_rank = at[2];
    d.others_count = is_pivoted ? d.N - d.rank : d.N;
    d.w2_stride = at[6], d.w2a_stride = at[8], d.y_stride = width;
    const bool is_inside = d.N > 0 && d.rank > 0 && d.lora_rank >= 0 && d.others_count >= 0 &&
                           at[4] >= 0 && at[4] + d.rank + d.lora_rank <= P.size(0) && at[5] >= 0 &&
                           d.w2_stride >= d.rank &&
                           at[5] + d.others_count * d.w2_stride <= Q.numel() && at[7] >= 0 &&
                           d.w2a_stride >= d.lora_rank && at[7] + d.N * d.w2a_stride <= Q.numel() &&
                           y_at >= 0 && y_at + d.N <= all_columns;
    STD_TORCH_CHECK(is_inside, "places of member ", i, " must lie in P ", shape_of(P), ", Q ",
                    shape_of(Q), " and ", all_columns, " columns");
    d.x = x.data_ptr(), d.x_stride = K;
    d.W1 = p + 2 * at[4] * row_stride, d.w1_stride = row_stride;
    d.W2 = q + 2 * at[5];
    if (d.lora_rank) {
      d.W1a = static_cast<const char*>(d.W1) + 2 * d.rank * row_stride, d.w1a_stride = row_stride;
      d.W2a = q + 2 * at[7];
    }
    if (is_pivoted) d.others = lists + y_at, d.pivots = pivots + y_at + d.others_count;
    if (!biases.empty()) d.bias = like.piece_or_null(biases[i], "bias", d.N);
    d.y = static_cast<char*>(y.data_ptr()) + 2 * y_at;
  }
  const cuda::Plan plan = cuda::plan(g, int(multiprocessors), int(arch));
  const int64_t h_floats = (M * plan.h_columns + 1) / 2;
  const Tensor workspace =
      new_tensor(x, {plan.partial_floats + h_floats}, aoti_torch_dtype_float32());
  auto* partial = static_cast<float*>(workspace.data_ptr());
  cuda::complete(g, plan, partial + plan.partial_floats, partial,
                 static_cast<int32_t*>(
                     like.piece(counters, "counters", ScalarType::Int, plan.counters, true)));
  launch(g, plan, x, arch);
  return y;
}

void adapter_gradients(const Maybe& dh_a, const Maybe& x, const Maybe& h_a, const Maybe& dy,
                       double alpha, int64_t multiprocessors, int64_t arch, const Maybe& dA,
                       const Maybe& dB, const Maybe& db, const Maybe& partial,
                       const Tensor& counters) {
  STD_TORCH_CHECK(dh_a.has_value() == dA.has_value() && x.has_value() == dA.has_value() &&
                      h_a.has_value() == dB.has_value() && dy.has_value() == dB.has_value() &&
                      (dA || dB) && (dB || !db),
                  "dh_a, x and dA, or h_a, dy and dB, or all must be given, db with dB alone");
  const Tensor& left = dA ? *dh_a : *h_a;
  const Like like{left, dA ? "dh_a" : "h_a"};
  STD_TORCH_CHECK(left.dim() == 2 && (!x || x->dim() == 2) && (!dy || dy->dim() == 2),
                  "dh_a, x, h_a and dy must be matrices");
  cuda::AdapterGradientsCall t{};
  t.type = type_of(left, like.name), t.alpha = float(alpha);
  t.M = left.size(0), t.lora_rank = left.size(1);
  t.K = x ? x->size(1) : 0, t.N = dy ? dy->size(1) : 0;
  STD_TORCH_CHECK(t.M && t.lora_rank && (!dA || t.K) && (!dB || t.N), "no dimension may be empty");
  t.dh_a = like.piece_or_null(dh_a, "dh_a", t.M * t.lora_rank);
  t.h_a = like.piece_or_null(h_a, "h_a", t.M * t.lora_rank);
  t.dA = like.piece_or_null(dA, "dA", t.lora_rank * t.K);
  t.dB = like.piece_or_null(dB, "dB", t.N * t.lora_rank);
  t.db = like.piece_or_null(db, "db", t.N);
  if (x) t.x = like.matrix(*x, "x", t.M, t.K, &t.x_stride);
  if (dy) t.dy = like.matrix(*dy, "dy", t.M, t.N, &t.dy_stride);
  const cuda::Plan plan = cuda::plan(t, int(multiprocessors), int(arch));
  like.workspace(partial, counters, plan, &t.partial, &t.counters);
  launch(t, plan, left, arch);
}

// x [..., K] of up to 16 rows -> y [..., N] = x W^T + h_a B^T + bias. W: codes int32 [N, G, 2
// bits], scales float16 [N, G], zeros uint8 [N, G], none at 8 bits; h_a [..., lora_rank] and B [N,
// lora_rank] come together.
Tensor quantized(const Tensor& given, const Tensor& codes, const Tensor& scales, const Maybe& zeros,
                 int64_t bits, const Maybe& h_a, const Maybe& B, const Maybe& bias,
                 int64_t multiprocessors, int64_t arch) {
  const bool known = (bits >= 2 && bits <= 6) || bits == 8;
  STD_TORCH_CHECK(known, "bits must be 2, 3, 4, 5, 6 or 8, got ", bits);
  STD_TORCH_CHECK(zeros.has_value() == (bits < 8), "zeros must be given below 8 bits alone");
  STD_TORCH_CHECK(h_a.has_value() == B.has_value(), "h_a and B must come together");
  const Tensor x = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t dims = x.dim();
  STD_TORCH_CHECK(dims >= 1, "x must be [..., K] with at least one dim");
  STD_TORCH_CHECK(codes.dim() == 3, "codes must be [N, G, ", 2 * bits, "], got ", shape_of(codes));
  std::vector<int64_t> sizes(dims);
  cuda::QuantizedCall d{};
  d.type = type_of(x, "x"), d.bits = int(bits);
  d.M = 1, d.K = d.x_stride = x.size(dims - 1), d.N = codes.size(0), d.groups = codes.size(1);
  for (int64_t i = 0; i < dims - 1; i++)
    d.M *= sizes[i] = x.size(i);
  sizes[dims - 1] = d.N;
  STD_TORCH_CHECK(d.M >= 1 && d.M <= cuda::kQuantizedRows && d.K && d.N, "x must have 1 to ",
                  cuda::kQuantizedRows, " rows and the matrix some, got ", shape_of(x), " and ",
                  shape_of(codes));
  STD_TORCH_CHECK(d.groups == (d.K + 63) / 64, "codes must have ", (d.K + 63) / 64,
                  " groups in a row, got ", d.groups);
  const Like like{x, "x"};
  const int64_t groups = d.N * d.groups;
  STD_TORCH_CHECK(groups < int64_t(1) << 31, "the matrix must have fewer than 2^31 groups");
  d.x = x.data_ptr();
  d.codes = like.piece(codes, "codes", ScalarType::Int, groups * 2 * bits);
  d.scales = like.piece(scales, "scales", ScalarType::Half, groups);
  if (zeros) d.zeros = like.piece(*zeros, "zeros", ScalarType::Byte, groups);
  const int alignment = bits == 8 ? 16 : 8;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(d.codes) % alignment == 0, "codes must begin on ",
                  alignment, " bytes");
  if (B) {
    STD_TORCH_CHECK(B->dim() == 2, "B must be [", d.N, ", lora_rank], got ", shape_of(*B));
    d.lora_rank = B->size(1);
    d.B = like.piece(*B, "B", x.scalar_type(), d.N * d.lora_rank);
    d.h_a = like.piece(*h_a, "h_a", x.scalar_type(), d.M * d.lora_rank);
  }
  d.bias = like.piece_or_null(bias, "bias", d.N);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  const Tensor y = new_tensor(x, sizes, dtype);
  d.y = y.data_ptr();
  launch(d, int(multiprocessors), x, arch);
  return y;
}

// ------------------------------------------------------------ workspace sizes

// Columns of h, floats of partial, counters, threads of a block, bytes of its shared memory.
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

Sizes sizes_of(const cuda::Plan& plan) {
  return {plan.h_columns, plan.partial_floats, plan.counters, plan.threads, plan.shared_bytes};
}

Sizes layer_sizes(bool transposed, bool pivoted, int64_t M, int64_t K, int64_t N, int64_t rank,
                  int64_t lora_rank, int64_t multiprocessors, int64_t arch) {
  static const int32_t some_pivots = 0;
  cuda::LayerCall d{};
  d.transposed = transposed, d.pivots = pivoted ? &some_pivots : nullptr;
  d.M = M, d.K = K, d.N = N, d.rank = rank, d.lora_rank = lora_rank;
  d.others_count = pivoted ? (transposed ? K : N) - rank : 0;
  return sizes_of(cuda::plan(d, int(multiprocessors), int(arch)));
}

Sizes adapter_gradients_sizes(int64_t M, int64_t K, int64_t N, int64_t lora_rank,
                              int64_t multiprocessors, int64_t arch) {
  static int32_t there = 0;
  cuda::AdapterGradientsCall t{};
  t.dA = K ? &there : nullptr, t.dB = N ? &there : nullptr;
  t.M = M, t.K = K, t.N = N, t.lora_rank = lora_rank;
  return sizes_of(cuda::plan(t, int(multiprocessors), int(arch)));
}

}  // namespace
}  // namespace hylora

#if defined(HYLORA_EMULATION)
STABLE_TORCH_LIBRARY_IMPL(hylora, CPU, m) {
  m.impl("cuda_layer", TORCH_BOX(&hylora::layer));
  m.impl("cuda_packed_layer", TORCH_BOX(&hylora::packed_layer));
  m.impl("cuda_packed_group", TORCH_BOX(&hylora::packed_group));
  m.impl("cuda_quantized", TORCH_BOX(&hylora::quantized));
  m.impl("cuda_adapter_gradients", TORCH_BOX(&hylora::adapter_gradients));
}
#else
STABLE_TORCH_LIBRARY_FRAGMENT(hylora, m) {
  m.def("cuda_layer(Tensor x, Tensor W1, Tensor? W1a, Tensor W2, Tensor? W2a, Tensor? bias,"
        " Tensor? pivots, Tensor? others, float alpha, bool transposed, int multiprocessors,"
        " int arch, Tensor(a!) y, Tensor(b!) h, Tensor(c!)? h_a, Tensor(d!)? partial,"
        " Tensor(e!) counters) -> ()");
  m.def("cuda_packed_layer(Tensor x, Tensor P, Tensor Q, Tensor? aB, Tensor? bias, Tensor? pivots,"
        " Tensor? others, Tensor(a!) counters, int N, int rank, int lora_rank, int multiprocessors,"
        " int arch) -> Tensor");
  m.def("cuda_packed_group(Tensor x, Tensor P, Tensor Q, Tensor columns, Tensor others,"
        " Tensor?[] biases, Tensor(a!) counters, int[] places, int width, int multiprocessors,"
        " int arch) -> Tensor");
  m.def(
      "cuda_quantized(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, int bits, Tensor? h_a,"
      " Tensor? B, Tensor? bias, int multiprocessors, int arch) -> Tensor");
  m.def("cuda_adapter_gradients(Tensor? dh_a, Tensor? x, Tensor? h_a, Tensor? dy, float alpha,"
        " int multiprocessors, int arch, Tensor(a!)? dA, Tensor(b!)? dB, Tensor(c!)? db,"
        " Tensor(d!)? partial, Tensor(e!) counters) -> ()");
  m.def("cuda_layer_sizes(bool transposed, bool pivoted, int M, int K, int N, int rank,"
        " int lora_rank, int multiprocessors, int arch)"
        " -> (int h_columns, int partial, int counters, int threads, int shared)");
  m.def("cuda_adapter_gradients_sizes(int M, int K, int N, int lora_rank, int multiprocessors, int "
        "arch)"
        " -> (int h_columns, int partial, int counters, int threads, int shared)");
  m.def("cuda_archs() -> str");
  m.def("cuda_lacks(int arch) -> str");
  m.def("cuda_driver_lacks() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CUDA, m) {
  m.impl("cuda_layer", TORCH_BOX(&hylora::layer));
  m.impl("cuda_packed_layer", TORCH_BOX(&hylora::packed_layer));
  m.impl("cuda_packed_group", TORCH_BOX(&hylora::packed_group));
  m.impl("cuda_quantized", TORCH_BOX(&hylora::quantized));
  m.impl("cuda_adapter_gradients", TORCH_BOX(&hylora::adapter_gradients));
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CompositeExplicitAutograd, m) {
  m.impl("cuda_layer_sizes", TORCH_BOX(&hylora::layer_sizes));
  m.impl("cuda_adapter_gradients_sizes", TORCH_BOX(&hylora::adapter_gradients_sizes));
  m.impl("cuda_archs", TORCH_BOX(&hylora::archs));
  m.impl("cuda_lacks", TORCH_BOX(&hylora::lacks));
  m.impl("cuda_driver_lacks", TORCH_BOX(&hylora::driver_lacks));
}
#endif
