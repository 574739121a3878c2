// Small kernels with known results, or faults, for the tests of the emulator.
#pragma once
#include "primitives.h"

namespace hylora::cuda {

struct Toy {
  const uint32_t* in;
  uint32_t* out;
  int32_t* counters;
};

// One mma: every lane's a[4] and b[2] give its d[4].
template <class T>
void toy_mma(const Toy toy) {
  const int lane = thread_index();
  const uint32_t* in = toy.in + 6 * lane;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float d[4] = {};
  mma<T>(d, a, in[4], in[5]);
  memcpy(toy.out + 4 * lane, d, 16);
}

// One ldmatrix of four 8 x 8 matrices, 32 rows of 16 bytes.
template <bool TRANSPOSED>
void toy_ldmatrix(const Toy toy) {
  const int lane = thread_index();
  auto* rows = reinterpret_cast<uint32_t (*)[4]>(shared_memory());
  for (int i = 0; i < 4; i++)
    rows[lane][i] = toy.in[4 * lane + i];
  synchronize();
  uint32_t r[4];
  if (TRANSPOSED)
    ldmatrix_transposed(r, rows[lane]);
  else
    ldmatrix(r, rows[lane]);
  for (int i = 0; i < 4; i++)
    toy.out[4 * lane + i] = r[i];
}

inline void toy_ends_before_barrier(const Toy) {
  if (thread_index() != 5) synchronize();
}

inline void toy_waits_for_lane(const Toy toy) {
  const uint32_t a[4] = {};
  float d[4] = {};
  if (thread_index() != 5) mma<bf16>(d, a, 0, 0);
  toy.out[thread_index()] = uint32_t(d[0]);
}

inline void toy_diverges(const Toy toy) {
  uint32_t r[4];
  if (thread_index() < 16)
    ldmatrix(r, shared_memory());
  else
    ldmatrix_transposed(r, shared_memory());
  toy.out[thread_index()] = r[0];
}

inline void toy_polls_for_ever(const Toy toy) {
  while (load_acquire(toy.counters) == 0) {
  }
}

inline void toy_misaligned(const Toy toy) {
  uint32_t r[4];
  ldmatrix(r, shared_memory() + 8);
  toy.out[thread_index()] = r[0];
}

inline void toy_leaves_copies(const Toy toy) {
  copy_async(shared_memory() + 16 * thread_index(), toy.in + 4 * thread_index(), 16);
  commit();
}

// NaN unless it is waited for; zeros past `bytes`.
template <bool WAITS>
void toy_copies(const Toy toy) {
  auto* to = reinterpret_cast<uint32_t*>(shared_memory()) + 4 * thread_index();
  copy_async(to, toy.in + 4 * thread_index(), 10);
  commit();
  if (WAITS) wait<0>();
  for (int i = 0; i < 4; i++)
    toy.out[4 * thread_index() + i] = to[i];
  wait<0>();
}

// One block hands a word to another, with or without saying so in a way that orders memory.
template <bool RELEASES>
void toy_hands_over(const Toy toy) {
  if (block_index() == 0) {
    if (thread_index() == 0) toy.out[0] = 7;
    if (RELEASES && thread_index() == 0) add_release(toy.counters, 1);
    if (!RELEASES && thread_index() == 0) add_relaxed(toy.counters, 1);
  } else if (thread_index() == 0) {
    while (load_acquire(toy.counters) == 0) {
    }
    toy.out[1] = read_fresh(toy.out);
  }
}

// The same within a block, with or without a barrier.
template <bool SYNCHRONIZES>
void toy_passes_on(const Toy toy) {
  auto* words = reinterpret_cast<uint32_t*>(shared_memory());
  words[thread_index()] = uint32_t(thread_index());
  if (SYNCHRONIZES) synchronize();
  toy.out[thread_index()] = words[31 - thread_index()];
}

using ToyKernel = void (*)(Toy);
struct NamedToy {
  const char* name;
  ToyKernel kernel;
};
inline const NamedToy kToys[] = {{"mma_bf16", toy_mma<bf16>},
                                 {"mma_fp16", toy_mma<fp16>},
                                 {"ldmatrix", toy_ldmatrix<false>},
                                 {"ldmatrix_transposed", toy_ldmatrix<true>},
                                 {"ends_before_barrier", toy_ends_before_barrier},
                                 {"waits_for_lane", toy_waits_for_lane},
                                 {"diverges", toy_diverges},
                                 {"polls_for_ever", toy_polls_for_ever},
                                 {"misaligned", toy_misaligned},
                                 {"leaves_copies", toy_leaves_copies},
                                 {"copies", toy_copies<true>},
                                 {"copies_unwaited", toy_copies<false>},
                                 {"hands_over", toy_hands_over<true>},
                                 {"hands_over_relaxed", toy_hands_over<false>},
                                 {"passes_on", toy_passes_on<true>},
                                 {"passes_on_at_once", toy_passes_on<false>}};

}  // namespace hylora::cuda
