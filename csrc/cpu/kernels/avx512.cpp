// The kernels for AVX-512 F, BW, DQ, VL.
#if defined(__AVX512BW__)
#include "engine.h"

namespace hylora {

const Kernels& kernels_avx512() {
  static const Kernels table = kernels_with<Fma<bf16>>();
  return table;
}

}  // namespace hylora
#endif
