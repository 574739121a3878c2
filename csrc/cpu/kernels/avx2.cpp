// The kernels for AVX2, FMA, F16C.
#if defined(__AVX2__)
#include "engine.h"

namespace hylora {

const Kernels& kernels_avx2() {
  static const Kernels table = kernels_with<Fma<bf16>>();
  return table;
}

}  // namespace hylora
#endif
