// The kernels for any processor: vectors of four floats, which the compiler maps to what its
// baseline has (SSE2 on x86-64).
#include "engine.h"

namespace hylora {

const Kernels& kernels_scalar() {
  static const Kernels table = kernels_with<Fma<bf16>>();
  return table;
}

}  // namespace hylora
