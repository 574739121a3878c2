// Which kernels run, and how a layer is split among threads.
#include "threads.h"

#include <torch/headeronly/util/Exception.h>

#include "kernels/isa.h"

namespace hylora {
namespace {

// Rows that a thread takes at a time. Each part reads all weights again; over this many rows that
// costs little.
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

namespace {

// Threads split the rows.
void run_many_rows(const LayerCall& call) {
  const Kernels& k = kernels();
  const int64_t used = std::min<int64_t>(torch::stable::get_num_threads(), call.M / 32);
  const int64_t parts = used > 1 ? std::max(used, call.M / kRowsPerPart / used * used) : 1;
  in_parallel(parts, [&](int64_t i, int64_t) {
    const int64_t end = i + 1 == parts ? call.M : call.M * (i + 1) / parts / 32 * 32;
    k.rows(call, call.M * i / parts / 32 * 32, end);
  });
}

// Threads share one block of all rows and split its panels.
void run_few_rows(const LayerCall& call) {
  const Kernels& k = kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t size = call.type == Type::fp32 ? 4 : 2;
  const int64_t weights =
      call.shrink.n * call.shrink.k + call.expand.n * call.expand.k + call.ra * (call.K + call.N);
  const int64_t useful = std::min(threads, std::max<int64_t>(1, size * weights / kBytesPerThread));
  const int64_t merges = call.merges_pivots();
  enum Stage : size_t { shrink, pivots, expand, merge_pivots };
  // A stage splits panels, merge_pivots rows.
  const int64_t items[4] = {call.shrink.n ? shrink_panels(call) : 0, merges, expand_panels(call),
                            merges ? call.M : 0};
  int64_t parts[4];
  for (int stage = 0; stage < 4; stage++)
    parts[stage] = std::min(useful, items[stage]);
  void* block = scratch(Scratch::shared_block, k.block_bytes(call));
  k.prepare(call, block);
  in_stages(parts, [&](size_t stage, int64_t i) {
    if (stage == pivots) return k.pivots(call, block);
    const int64_t begin = items[stage] * i / parts[stage];
    const int64_t end = items[stage] * (i + 1) / parts[stage];
    const auto run = stage == shrink ? k.shrink : stage == expand ? k.expand : k.merge_pivots;
    run(call, block, begin, end);
  });
}

}  // namespace

void run_layer(const LayerCall& call) {
  if (call.M == 0 || call.N == 0) return;
  if (call.M > kFewRows)
    run_many_rows(call);
  else
    run_few_rows(call);
}

}  // namespace hylora
