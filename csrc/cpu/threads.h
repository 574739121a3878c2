// The kernels on torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "call.h"

namespace hylora {

// Waking another thread pays from this many bytes of weights for each thread on.
constexpr int64_t kBytesPerThread = 256 << 10;

// The kernels of the instruction set in use. Throws the reason if HYLORA_ISA can't be followed.
const Kernels& kernels();

// Computes a layer.
void run_layer(const LayerCall& call);

// Runs N stages one after another. Stage s has parts[s] parts; a thread takes the next part that
// no other has taken. A thread that the system suspends before it takes a part delays no other: a
// stage only waits for parts that have been started. All stages run in one fork and join, which
// cost about 10 us.
template <size_t N, class F>
void in_stages(const int64_t (&parts)[N], const F& run_part) {
  const int64_t most = *std::max_element(parts, parts + N);
  if (most <= 1) {
    for (size_t stage = 0; stage < N; stage++)
      if (parts[stage]) run_part(stage, 0);
    return;
  }
  std::atomic<int64_t> next[N] = {}, done[N] = {};
  torch::stable::parallel_for(0, most, 1, [&](int64_t, int64_t) {
    for (size_t stage = 0; stage < N; stage++) {
      for (int64_t i; (i = next[stage].fetch_add(1)) < parts[stage];) {
        run_part(stage, i);
        done[stage].fetch_add(1, std::memory_order_release);
      }
      for (int spins = 0; done[stage].load(std::memory_order_acquire) < parts[stage]; spins++)
        if (spins > 1000) std::this_thread::yield();
    }
  });
}

// Calls part(i, parts) for i in [0, parts), at least once.
template <class F>
void in_parallel(int64_t parts, const F& part) {
  in_stages({std::max<int64_t>(parts, 1)},
            [&](size_t, int64_t i) { part(i, std::max<int64_t>(parts, 1)); });
}

// Calls work(begin, end) on parts of [0, count), one for each thread that `bytes` are worth.
template <class F>
void split_among_threads(int64_t count, int64_t bytes, const F& work) {
  const int64_t useful = std::max<int64_t>(1, bytes / kBytesPerThread);
  const int64_t threads = torch::stable::get_num_threads();
  in_parallel(std::min({threads, useful, count}),
              [&](int64_t i, int64_t parts) { work(count * i / parts, count * (i + 1) / parts); });
}

}  // namespace hylora
