#include "threads.h"

#include <torch/headeronly/util/Exception.h>

#include "kernels/isa.h"

namespace hylora {
namespace {

// Rows that a thread takes at a time: enough to make up for the weights it fetches once more.
constexpr int64_t kRowsPerPart = 512;

}  // namespace

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

void run(const Dual& d) {
  if (d.M == 0 || d.N == 0) return;
  const Kernels& k = kernels();
  const int64_t threads = torch::stable::get_num_threads();
  if (d.M > kFewRows) {
    const int64_t used = std::min(threads, d.M / 32);
    const int64_t parts = used > 1 ? std::max(used, d.M / kRowsPerPart / used * used) : 1;
    in_parallel(parts, [&](int64_t i, int64_t) {
      const int64_t end = i + 1 == parts ? d.M : d.M * (i + 1) / parts / 32 * 32;
      k.rows(d, d.M * i / parts / 32 * 32, end);
    });
    return;
  }
  const int64_t size = d.type == Type::fp32 ? 4 : 2;
  const int64_t bytes =
      size * (d.first.n * d.first.k + d.second.n * d.second.k + d.ra * (d.K + d.N));
  const int64_t useful = std::min(threads, std::max<int64_t>(1, bytes / kBytesPerThread));
  const int64_t weaves = d.order.panels && !d.sorts_input;
  // Panels, and in the last stage rows.
  const int64_t items[4] = {d.first.n ? first_panels(d) : 0, weaves, second_panels(d),
                            weaves ? d.M : 0};
  int64_t parts[4];
  for (int stage = 0; stage < 4; stage++)
    parts[stage] = std::min(useful, items[stage]);
  void* block = scratch(1, k.block_bytes(d));
  k.prepare(d, block);
  in_stages(parts, [&](size_t stage, int64_t i) {
    if (stage == 1) return k.between(d, block);
    const int64_t begin = items[stage] * i / parts[stage];
    const int64_t end = items[stage] * (i + 1) / parts[stage];
    (stage == 0 ? k.first : stage == 2 ? k.second : k.weave)(d, block, begin, end);
  });
}

}  // namespace hylora
