// A decoder's plan (decoder.h), read from what Python says of the model.
#pragma once
#include "decoder.h"
#include "tensors.h"

namespace hylora {

// The plan as a tensor int64 of its own: pointers into `tensors`, which the caller keeps alive, and
// sizes. `numbers`, int64, describe the model in the order of the members of DecoderPlan and
// DecoderBlock; a tensor is said by its index, -1 for none, and a float by the bits of a double.
// hylora_kernels/backends/cpu/decoder.py writes them. Throws if they don't fit together.
Tensor make_decoder_plan(const Tensor& like, const std::vector<Tensor>& tensors,
                         const Tensor& numbers);

// The plan that make_decoder_plan has made.
const DecoderPlan& decoder_plan_of(const Tensor& plan);

}  // namespace hylora
