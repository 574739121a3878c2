// The kernels for AMX-BF16: bf16 in AMX tiles; fp16 and fp32 with many rows too, as bf16 limbs.
#if defined(__AMX_BF16__)
#define HYLORA_LIMBS
#include "amx.h"
#include "engine.h"

namespace hylora {

const Kernels& kernels_amx_bf16() {
  static const Kernels table = kernels_with<Amx<1>, Amx<1, true>>();
  return table;
}

}  // namespace hylora
#endif
