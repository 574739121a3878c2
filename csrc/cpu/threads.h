// Which kernels run, and how calls are split among as many threads as torch has.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

#include "call.h"
#include "team.h"

namespace hylora {

// Waking another thread pays from this many bytes of weights for each thread on.
constexpr int64_t kBytesPerThread = 256 << 10;

// The kernels of the instruction set in use. Throws the reason if HYLORA_ISA can't be followed.
const Kernels& kernels();

// Calls run_part(i) for each i in [0, parts) on torch's own threads, for work that is long beside a
// fork and a join. Torch's threads spin for milliseconds after each of torch's products, so threads
// of our own would wait for their cores: in a prompt of 512 tokens, where products of both follow
// one another, two threads made 290 tokens a second, and 460 without the spinning.
template <class F>
void on_torch_threads(int64_t threads, int64_t parts, const F& run_part) {
  if (is_forked_child()) return Team(threads).stage(parts, run_part);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(threads, parts), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1)) < parts;)
      run_part(i);
  });
}

// Calls work(begin, end) on parts of [0, count), one for each thread that `bytes` are worth.
template <class F>
void split_among_threads(int64_t count, int64_t bytes, const F& work) {
  const int64_t useful = std::max<int64_t>(1, bytes / kBytesPerThread);
  const int64_t most = std::min<int64_t>({torch::stable::get_num_threads(), useful, count});
  const int64_t parts = std::max<int64_t>(most, 1);
  on_torch_threads(parts, parts,
                   [&](int64_t i) { work(count * i / parts, count * (i + 1) / parts); });
}

}  // namespace hylora
