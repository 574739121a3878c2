// The kernels for AVX-512 with AVX512-BF16: bf16 by vdpbf16ps.
#if defined(__AVX512BF16__)
#include "engine.h"
#include "paired.h"

namespace hylora {

const Kernels& kernels_avx512_bf16() {
  static const Kernels table = kernels_with<Paired>();
  return table;
}

}  // namespace hylora
#endif
