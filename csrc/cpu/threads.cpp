// Which kernels run (threads.h).
#include "threads.h"

#include <torch/headeronly/util/Exception.h>

#include "kernels/isa.h"

namespace hylora {

const Kernels& kernels() {
  const IsaChoice& choice = isa_chosen();
  STD_TORCH_CHECK(!choice.error, choice.error ? choice.error : "");
  static const Kernels table = [&]() -> Kernels {
    switch (choice.isa) {
#if defined(__x86_64__)
#if !defined(HYLORA_NO_AMX_BF16)
    case Isa::amx_bf16:
      return kernels_amx_bf16();
#endif
#if !defined(HYLORA_NO_AVX512_BF16)
    case Isa::avx512_bf16:
      return kernels_avx512_bf16();
#endif
#if !defined(HYLORA_NO_AVX512)
    case Isa::avx512:
      return kernels_avx512();
#endif
#if !defined(HYLORA_NO_AVX2)
    case Isa::avx2:
      return kernels_avx2();
#endif
#endif
    default:
      return kernels_scalar();
    }
  }();
  return table;
}

}  // namespace hylora
