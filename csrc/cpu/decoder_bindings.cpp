// The ops of a decoder that is computed whole. hylora_kernels/backends/cpu/decoder.py is their only
// user.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

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
                                  int64_t sequences, int64_t slot,
                                  const std::optional<Tensor>& positions, const Tensor& first_keys,
                                  int64_t part0, int64_t part1) {
  const DecoderPlan& plan = decoder_plan_of(plan_tensor);
  STD_TORCH_CHECK(0 <= part0 && part0 < part1 && part1 <= plan.count + 1,
                  "part0 and part1 must be a range in 0..", plan.count + 1, ", got ", part0, ", ",
                  part1);
  const bool are_tokens = x.dim() == 1 && plan.embedding.words && part0 == 0;
  STD_TORCH_CHECK(are_tokens ||
                      (x.dim() == 2 && x.size(1) == plan.width && type_of(x, "x") == plan.type),
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
  step.first_keys = indices_of(first_keys, "first_keys", step.rows, slot + 1);
  std::vector<int64_t> counted(size_t(step.rows), slot);
  if (positions) {
    step.positions = indices_of(*positions, "positions", step.rows, plan.positions);
  } else {
    for (int64_t i = 0; i < step.rows; i++)
      counted[size_t(i)] -= step.first_keys[i];
    STD_TORCH_CHECK(!plan.positions || slot < plan.positions, "slot must be in [0, ",
                    plan.positions, "), the plan's positions, got ", slot);
    step.positions = counted.data();
  }
  step.part0 = part0, step.part1 = part1;
  const Tensor rows = torch::stable::contiguous(x);
  if (are_tokens)
    step.tokens = indices_of(rows, "tokens", step.rows, plan.embedding.words);
  else
    step.x = rows.data_ptr();
  const bool has_head = part1 > plan.count;
  Tensor y = new_tensor(cache, {step.rows, has_head ? plan.head.N : plan.width});
  Tensor likeliest = new_tensor(first_keys, {has_head ? step.rows : 0});
  (has_head ? step.logits : step.hidden) = y.data_ptr();
  step.likeliest = static_cast<int64_t*>(likeliest.data_ptr());
  const int64_t threads = torch::stable::get_num_threads();
  Tensor memory =
      new_tensor(cache, {decoder_memory(plan, step, threads) / int64_t(cache.element_size())});
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
  // [rows, words] if part1 is behind the head, else hidden [rows, width]. x may be tokens, int64
  // [rows], if the plan has an embedding. positions: by default slot - first_keys.
  m.def("cpu_decoder_plan(Tensor like, Tensor[] tensors, Tensor numbers) -> Tensor");
  m.def("cpu_decode(Tensor plan, Tensor x, Tensor(a!) cache, int sequences, int slot,"
        " Tensor? positions, Tensor first_keys, int part0, int part1)"
        " -> (Tensor y, Tensor likeliest)");
  // int64 [4]: nanoseconds of all steps so far, in the order of Work in decoder.h.
  m.def("cpu_decoder_nanoseconds(Tensor like) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hylora, CPU, m) {
  m.impl("cpu_decoder_plan", TORCH_BOX(&hylora::make_decoder_plan));
  m.impl("cpu_decode", TORCH_BOX(&hylora::decode));
  m.impl("cpu_decoder_nanoseconds", TORCH_BOX(&hylora::decoder_nanoseconds));
}
