// Which kernels run, and how a layer is split among threads.
#include "threads.h"

#include <torch/headeronly/util/Exception.h>

#include "kernels/isa.h"

namespace hylora {
namespace {

// Rows that a thread takes at a time. Each part reads all weights again; over this many rows that
// costs little.
constexpr int64_t kRowsPerPart = 512;

// How many threads a layer is worth.
int64_t useful_threads(const LayerCall& call) {
  if (call.M > kFewRows) return call.M / 32;
  const int64_t size = call.type == Type::fp32 ? 4 : 2;
  const int64_t weights =
      call.shrink.n * call.shrink.k + call.expand.n * call.expand.k + call.ra * (call.K + call.N);
  return std::max<int64_t>(1, size * weights / kBytesPerThread);
}

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
void run_many_rows(const LayerCall& call, Team& team) {
  const Kernels& k = kernels();
  const int64_t used = std::min<int64_t>(team.threads(), call.M / 32);
  const int64_t parts = used > 1 ? std::max(used, call.M / kRowsPerPart / used * used) : 1;
  team.stage(parts, [&](int64_t i) {
    const int64_t end = i + 1 == parts ? call.M : call.M * (i + 1) / parts / 32 * 32;
    k.rows(call, call.M * i / parts / 32 * 32, end);
  });
}

// Threads share one block of all rows and split its panels.
void run_few_rows(const LayerCall& call, Team& team) {
  const Kernels& k = kernels();
  void* block = scratch(Scratch::shared_block, k.block_bytes(call));
  // Calls run(call, block, begin, end) on parts of [0, items).
  const auto split = [&](int64_t items, auto run) {
    const int64_t parts = std::min({team.threads(), useful_threads(call), items});
    team.stage(parts,
               [&](int64_t i) { run(call, block, items * i / parts, items * (i + 1) / parts); });
  };
  k.prepare(call, block);
  if (call.shrink.n) split(shrink_panels(call), k.shrink);
  if (call.merges_pivots()) k.pivots(call, block);
  split(expand_panels(call), k.expand);
  if (call.merges_pivots()) split(call.M, k.merge_pivots);
}

}  // namespace

void run_layer(const LayerCall& call) {
  Team team(std::min<int64_t>(torch::stable::get_num_threads(), useful_threads(call)));
  run_layer(call, team);
}

void run_layer(const LayerCall& call, Team& team) {
  if (call.M == 0 || call.N == 0) return;
  if (call.M > kFewRows)
    run_many_rows(call, team);
  else
    run_few_rows(call, team);
}

}  // namespace hylora
