// Any processor: four floats at a time, as the compiler sees fit (SSE2 on x86-64).
#include "engine.h"

namespace hylora {

const Kernels& kernels_scalar() {
  static const Kernels table = kernels_with<Fma<bf16>>();
  return table;
}

}  // namespace hylora
