// The row operations' entries of the Kernels table, for every type of numbers.
#pragma once
#include "attention.h"
#include "norm.h"
#include "rotary.h"

namespace hylora {
namespace {

// A function that calls `by<T>` with the call's type T.
#define HYLORA_BY_TYPE(Call, by)                                                                   \
  [](const Call& call, int64_t begin, int64_t end) {                                               \
    if (call.type == Type::bf16) return by<bf16>(call, begin, end);                                \
    if (call.type == Type::fp16) return by<fp16>(call, begin, end);                                \
    by<float>(call, begin, end);                                                                   \
  }

inline void add_row_kernels(Kernels& table) {
  table.attention = HYLORA_BY_TYPE(AttentionCall, attention_by);
  table.join_attention = HYLORA_BY_TYPE(AttentionCall, join_attention_by);
  table.norm = HYLORA_BY_TYPE(NormCall, norm_by);
  table.rotary = HYLORA_BY_TYPE(RotaryCall, rotary_by);
  table.activation = HYLORA_BY_TYPE(ActivationCall, activation_by);
  table.add = HYLORA_BY_TYPE(AddCall, add_by);
  table.argmax = HYLORA_BY_TYPE(ArgmaxCall, argmax_by);
  table.join_argmax = join_argmax;
}

#undef HYLORA_BY_TYPE

}  // namespace
}  // namespace hylora
