// Which kernels run, and how calls are split among as many threads as torch has.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "call.h"
#include "team.h"

namespace hylora {

// Waking another thread pays from this many bytes of weights for each thread on.
constexpr int64_t kBytesPerThread = 256 << 10;

// The kernels of the instruction set in use. Throws the reason if HYLORA_ISA can't be followed.
const Kernels& kernels();

// Calls work(begin, end) on parts of [0, count), one for each thread that `bytes` are worth.
template <class F>
void split_among_threads(int64_t count, int64_t bytes, const F& work) {
  const int64_t useful = std::max<int64_t>(1, bytes / kBytesPerThread);
  Team team(std::min<int64_t>({torch::stable::get_num_threads(), useful, count}));
  const int64_t parts = team.threads();
  team.stage(parts, [&](int64_t i) { work(count * i / parts, count * (i + 1) / parts); });
}

}  // namespace hylora
