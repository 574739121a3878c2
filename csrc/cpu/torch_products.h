// torch's own products where they are faster.
#pragma once
#include "call.h"

namespace hylora {

// float32 multiplied and added, so many rows that MKL wins back what unpacking costs.
bool torch_is_faster(const Dual& d);

// Both products of d, or the one, on weights unpacked for this call.
void through_torch(const Dual& d);

}  // namespace hylora
