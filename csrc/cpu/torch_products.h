// torch's own matrix product (MKL), for the layers where it is faster than the kernels.
#pragma once
#include "call.h"

namespace hylora {

// At this many rows of float32 without bf16 limbs, MKL gains more than unpacking the weights costs.
bool torch_products_are_faster(const LayerCall& call);

// Computes the layer with torch's product on weights that are unpacked for this call.
void run_torch_products(const LayerCall& call);

}  // namespace hylora
