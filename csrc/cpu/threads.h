// The kernels on torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <thread>

#include "call.h"

namespace hylora {

// Less than this for each thread and waking them costs more than they save.
constexpr int64_t kBytesPerThread = 256 << 10;

// The kernels of the level in use; throws the reason where HYLORA_ISA can't be followed.
const Kernels& kernels();

// Both products of d, or the one.
void run(const Dual& d);

// Stages one after another, each of so many parts; a thread takes the next part that nobody has. So
// one that the system holds back holds up no other, and a wait is only ever for parts that a
// running thread is at. One fork and join for all stages: they cost about 10 us.
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

template <class F>
void in_parallel(int64_t parts, const F& part) {
  in_stages({std::max<int64_t>(parts, 1)},
            [&](size_t, int64_t i) { part(i, std::max<int64_t>(parts, 1)); });
}

}  // namespace hylora
