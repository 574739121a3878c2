// Instantiates the kernels of quantised matrices and launches the one that a call takes.
#include "quantized.h"

namespace hylora::cuda {
namespace {

bool is_multiple(const void* at, int64_t stride, int bytes) {
  return (reinterpret_cast<uintptr_t>(at) | uintptr_t(stride)) % bytes == 0;
}

template <class T, int BITS, class S>
const char* launch_shape(const QuantizedCall& d, void* stream) {
  const bool runs_aligned = is_multiple(d.scales, 2 * d.groups, 2 * S::RUN) &&
                            (BITS == 8 || is_multiple(d.zeros, d.groups, S::RUN));
  const QuantizedLaunch f{d, is_multiple(d.x, 2 * d.x_stride, 16), runs_aligned};
  const int64_t blocks = (d.N + S::COLUMNS - 1) / S::COLUMNS;
  return run(quantized<T, BITS, S>, blocks, 32 * S::WARPS, sizeof(typename S::Shared), stream, f);
}

// A narrow matrix has few blocks, so that many warps share one. A wide one has enough that a block
// takes 32 rows and x is brought to fewer blocks, where a thread's registers allow it: at 8 bits or
// for more than 8 rows of x they don't. On an H200, 4 bits, one row: 2048 to 2048 takes 3.4 us as a
// narrow one and 4.8 as a wide one, 2048 to 8192 7.1 and 6.4.
template <class T, int BITS, int TILES>
const char* launch_tiles(const QuantizedCall& d, bool is_wide, void* stream) {
  constexpr int TALL = TILES == 1 && BITS < 8 ? 2 : 1;
  return is_wide ? launch_shape<T, BITS, QuantizedShape<TILES, TALL, 2, 8>>(d, stream)
                 : launch_shape<T, BITS, QuantizedShape<TILES, 1, 2, 16>>(d, stream);
}

template <class T, int BITS>
const char* launch_bits(const QuantizedCall& d, bool is_wide, void* stream) {
  return d.M <= 8 ? launch_tiles<T, BITS, 1>(d, is_wide, stream)
                  : launch_tiles<T, BITS, 2>(d, is_wide, stream);
}

template <class T>
const char* launch_as(const QuantizedCall& d, bool is_wide, void* stream) {
  switch (d.bits) {
  case 2:
    return launch_bits<T, 2>(d, is_wide, stream);
  case 3:
    return launch_bits<T, 3>(d, is_wide, stream);
  case 4:
    return launch_bits<T, 4>(d, is_wide, stream);
  case 5:
    return launch_bits<T, 5>(d, is_wide, stream);
  case 6:
    return launch_bits<T, 6>(d, is_wide, stream);
  default:
    return launch_bits<T, 8>(d, is_wide, stream);
  }
}

}  // namespace

const char* launch(const QuantizedCall& d, int multiprocessors, void* stream) {
  const bool is_wide = d.N > 16 * 2 * int64_t(multiprocessors);
  return d.type == Type::bf16 ? launch_as<bf16>(d, is_wide, stream)
                              : launch_as<fp16>(d, is_wide, stream);
}

}  // namespace hylora::cuda
