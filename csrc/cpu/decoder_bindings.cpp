// The ops of a decoder that is computed whole. hylora_kernels/backends/cpu/decoder.py is their only
// user.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "decoder_plan.h"

namespace hylora {
namespace {

using torch::headeronly::ScalarType;

// int64 [count] in [0, end); end 0: any.
const int64_t* indices_of(const Tensor& t, const char* name, int64_t count, int64_t end) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.numel() == count && t.is_contiguous(),
                  name, " must be ", count, " contiguous numbers of int64");
  const auto* at = static_cast<const int64_t*>(t.data_ptr());
  for (int64_t i = 0; i < count && end; i++)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] < end, name, " must be in [0, ", end, "), got ", at[i]);
  return at;
}

std::tuple<Tensor, Tensor> decode(const Tensor& plan_tensor, const Tensor& x, const Tensor& cache,
                                  int64_t sequences, int64_t slot, const Tensor& positions,
                                  const Tensor& first_keys, int64_t part0, int64_t part1) {
  const DecoderPlan& plan = decoder_plan_of(plan_tensor);
  STD_TORCH_CHECK(0 <= part0 && part0 < part1 && part1 <= plan.count + 1,
                  "part0 and part1 must be a range in 0..", plan.count + 1, ", got ", part0, ", ",
                  part1);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == plan.width && type_of(x, "x") == plan.type,
                  "x must be [rows, ", plan.width, "] of the plan's dtype");
  DecoderStep step{};
  step.rows = x.size(0);
  STD_TORCH_CHECK(step.rows >= 1 && step.rows <= sequences, "x must have 1 to ", sequences,
                  " rows, the cache's sequences, got ", step.rows);
  STD_TORCH_CHECK(type_of(cache, "cache") == plan.type && cache.is_contiguous() &&
                      cache.numel() % (plan.cached * sequences) == 0,
                  "cache must be contiguous, with ", plan.cached, " numbers a token of the ",
                  sequences, " sequences");
  step.cache = static_cast<char*>(cache.data_ptr());
  step.sequences = sequences, step.capacity = cache.numel() / (plan.cached * sequences);
  step.slot = slot;
  STD_TORCH_CHECK(slot >= 0 && slot < step.capacity, "slot must be in [0, ", step.capacity,
                  "), got ", slot);
  step.positions = indices_of(positions, "positions", step.rows, plan.positions);
  step.first_keys = indices_of(first_keys, "first_keys", step.rows, slot + 1);
  step.part0 = part0, step.part1 = part1;
  const Tensor rows = torch::stable::contiguous(x);
  step.x = rows.data_ptr();
  const bool has_head = part1 > plan.count;
  Tensor y = new_tensor(x, {step.rows, has_head ? plan.head.N : plan.width});
  Tensor likeliest = new_tensor(positions, {has_head ? step.rows : 0});
  (has_head ? step.logits : step.hidden) = y.data_ptr();
  step.likeliest = static_cast<int64_t*>(likeliest.data_ptr());
  const int64_t threads = torch::stable::get_num_threads();
  Tensor memory = new_tensor(x, {decoder_memory(plan, step, threads) / int64_t(x.element_size())});
  run_decoder(plan, step, threads, static_cast<char*>(memory.data_ptr()));
  return {y, likeliest};
}

// like: int64, of any size.
Tensor decoder_nanoseconds(const Tensor& like) {
  Tensor spent = new_tensor(like, {kWorks});
  for (int64_t i = 0; i < kWorks; i++)
    static_cast<int64_t*>(spent.data_ptr())[i] = nanoseconds_of(Work(i));
  return spent;
}

}  // namespace
}  // namespace hylora

STABLE_TORCH_LIBRARY_FRAGMENT(hylora, m) {
  // A decoder's plan (decoder_plan.h), and one step of it (DecoderStep in decoder.h): y is logits
  // [rows, words] if part1 is behind the head, else hidden [rows, width].
  m.def("cpu_decoder_plan(Tensor like, Tensor[] tensors, Tensor numbers) -> Tensor");
  m.def("cpu_decode(Tensor plan, Tensor x, Tensor(a!) cache, int sequences, int slot,"
        " Tensor positions, Tensor first_keys, int part0, int part1)"
        " -> (Tensor y, Tensor likeliest)");
  // int64 [4]: nanoseconds of all steps so far, in the order of Work in decoder.h.
  m.def("cpu_decoder_nanoseconds(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CPU, m) {
  m.impl("cpu_decoder_plan", TORCH_BOX(&hylora::make_decoder_plan));
  m.impl("cpu_decode", TORCH_BOX(&hylora::decode));
  m.impl("cpu_decoder_nanoseconds", TORCH_BOX(&hylora::decoder_nanoseconds));
}
