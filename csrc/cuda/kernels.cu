// Instantiates the kernels and launches the one that a plan names.
#include "adapter_gradients.h"
#include "decode.h"
#include "group.h"
#include "layer.h"

namespace hylora::cuda {
namespace {

// True if 16-byte loads reach every row.
bool is_aligned(const void* at, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(at) | uintptr_t(2 * stride)) % 16 == 0;
}

LayerLaunch launch_of(const LayerCall& d, const Plan& p) {
  return {d,
          p.split,
          is_aligned(d.x, d.x_stride),
          is_aligned(d.W1, d.w1_stride),
          is_aligned(d.W1a, d.w1a_stride),
          is_aligned(d.W2, d.w2_stride),
          is_aligned(d.W2a, d.w2a_stride)};
}

template <class T>
const char* launch_as(const LayerLaunch& f, const Plan& p, void* stream) {
  auto* kernel = f.d.transposed ? layer<T, kTile64, true> : layer<T, kTile64, false>;
  if (p.kernel == kTile128)
    kernel = f.d.transposed ? layer<T, kTile128, true> : layer<T, kTile128, false>;
  if (p.kernel == kDecode) kernel = decode<T>;
  return run(kernel, p.programs, p.threads, p.shared_bytes, stream, f);
}

}  // namespace

const char* launch(const LayerCall& d, const Plan& p, void* stream) {
  const LayerLaunch f = launch_of(d, p);
  return d.type == Type::bf16 ? launch_as<bf16>(f, p, stream) : launch_as<fp16>(f, p, stream);
}

const char* launch(const AdapterGradientsCall& t, const Plan& p, void* stream) {
  const AdapterGradientsLaunch f{t, p.split, is_aligned(t.x, t.x_stride),
                                 is_aligned(t.dy, t.dy_stride),
                                 is_aligned(t.dh_a, t.lora_rank) && is_aligned(t.h_a, t.lora_rank)};
  auto* kernel = t.type == Type::bf16 ? adapter_gradients<bf16> : adapter_gradients<fp16>;
  return run(kernel, p.programs, p.threads, p.shared_bytes, stream, f);
}

const char* launch(const GroupCall& g, const Plan& p, void* stream) {
  GroupLaunch f{};
  f.count = g.count;
  for (int i = 0; i < g.count; i++)
    f.members[i] = launch_of(g.members[i], p);
  for (int i = 0; i < 2 * g.count; i++)
    f.ends[i] = g.ends[i];
  auto* kernel = g.members[0].type == Type::bf16 ? decode_group<bf16> : decode_group<fp16>;
  return run(kernel, p.programs, p.threads, p.shared_bytes, stream, f);
}

}  // namespace hylora::cuda
