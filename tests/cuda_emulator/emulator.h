// The names of csrc/cuda/primitives.h on a CPU. Everything that reads or writes the kernels' memory
// is here, compiled with the kernels, so that the sanitizers see it.
#pragma once
#include <cstring>
#include <type_traits>

#include "fibers.h"

#define DEVICE inline
#define KERNEL(threads, blocks) void
#define ARGUMENT const

namespace hylora::emulation {

// The order of the next launch, and the hash of the order that came of it.
inline Order next_order{0, 1};
inline uint64_t last_hash = 0;

inline void expect_aligned(const void* at, const char* what) {
  if (reinterpret_cast<uintptr_t>(at) % 16) fault(what);
}

}  // namespace hylora::emulation

namespace hylora::cuda {

using emulation::block_count;
using emulation::block_index;
using emulation::shared_memory;
using emulation::synchronize;
using emulation::thread_index;

DEVICE void ldmatrix_as(emulation::Together what, uint32_t (&r)[4], const void* row) {
  emulation::expect_aligned(row, "ldmatrix of a row that is not 16-byte aligned");
  const uint32_t* words = static_cast<const uint32_t*>(row);
  const uint32_t in[4] = {words[0], words[1], words[2], words[3]};
  emulation::exchange(what, in, 4, r);
}
DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  ldmatrix_as(emulation::Together::ldmatrix, r, row);
}
DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  ldmatrix_as(emulation::Together::ldmatrix_transposed, r, row);
}

template <class T>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr auto what =
      std::is_same_v<T, bf16> ? emulation::Together::mma_bf16 : emulation::Together::mma_fp16;
  const uint32_t in[6] = {a[0], a[1], a[2], a[3], b0, b1};
  uint32_t out[4];
  emulation::exchange(what, in, 6, out);
  for (int i = 0; i < 4; i++) {
    float product;
    memcpy(&product, &out[i], 4);
    d[i] += product;
  }
}

template <class T>
DEVICE T rounded(float value) {
  return {std::is_same_v<T, bf16> ? emulation::to_bf16(value) : emulation::to_fp16(value)};
}
template <class T>
DEVICE uint32_t pack(float low, float high) {
  return rounded<T>(low).bits | uint32_t(rounded<T>(high).bits) << 16;
}
DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t rest) { return (a & mask) | rest; }
DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFF) | b << 16; }
DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000); }

DEVICE float widened(bf16 value) { return emulation::from_bf16(value.bits); }
DEVICE float widened(fp16 value) { return emulation::from_fp16(value.bits); }
template <class T>
DEVICE uint32_t minus(uint32_t a, uint32_t b) {
  auto half = [](uint32_t pair, int i) { return widened(T{uint16_t(pair >> 16 * i)}); };
  return pack<T>(half(a, 0) - half(b, 0), half(a, 1) - half(b, 1));
}

// Until the copy is waited for, its place holds NaN; it is read then, not before.
DEVICE void copy_async(void* to, const void* from, int bytes) {
  emulation::expect_aligned(to, "an asynchronous copy to what is not 16-byte aligned");
  emulation::expect_aligned(from, "an asynchronous copy of what is not 16-byte aligned");
  for (int i = 0; i < 4; i++)
    static_cast<uint32_t*>(to)[i] = 0xFFFFFFFF;
  emulation::push({to, from, bytes});
}
DEVICE void commit() { emulation::commit(); }
template <int pending>
DEVICE void wait() {
  for (emulation::Copy copy; emulation::due(pending, copy);)
    for (int i = 0; i < 8; i++)
      static_cast<uint16_t*>(copy.to)[i] =
          2 * i < copy.bytes ? static_cast<const uint16_t*>(copy.from)[i] : 0;
}

template <int COUNT>
DEVICE Words<COUNT> read_once(const Words<COUNT>* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(*from))
    emulation::fault("a load of several words that are not aligned");
  return *from;
}
template <int COUNT>
DEVICE Words<COUNT> read_often(const Words<COUNT>* from) {
  return read_once(from);
}
template <int COUNT>
DEVICE uint32_t read_bytes(const uint8_t* from) {
  if (reinterpret_cast<uintptr_t>(from) % COUNT)
    emulation::fault("a load of several bytes that are not aligned");
  uint32_t found = 0;
  for (int i = 0; i < COUNT; i++)
    found |= uint32_t(from[i]) << 8 * i;
  return found;
}
template <class T>
DEVICE T read_fresh(const T* from) {
  return *from;
}
DEVICE void prefetch(const void* from) { *static_cast<const volatile char*>(from); }

// The compiler's own atomics: ThreadSanitizer knows the order each of them asks for.
DEVICE int add(int32_t* counter, int32_t value, int memory_order) {
  emulation::pause(false);
  const int before =
      memory_order == __ATOMIC_RELAXED   ? __atomic_fetch_add(counter, value, __ATOMIC_RELAXED)
      : memory_order == __ATOMIC_RELEASE ? __atomic_fetch_add(counter, value, __ATOMIC_RELEASE)
                                         : __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
  emulation::pause(true);
  return before;
}
DEVICE int add_relaxed(int32_t* counter, int32_t value) {
  return add(counter, value, __ATOMIC_RELAXED);
}
DEVICE void add_release(int32_t* counter, int32_t value) { add(counter, value, __ATOMIC_RELEASE); }
DEVICE int add_acquire_release(int32_t* counter, int32_t value) {
  return add(counter, value, __ATOMIC_ACQ_REL);
}
DEVICE int load_acquire(const int32_t* counter) {
  emulation::pause(false);
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}

template <class Arguments>
const char* run(void (*kernel)(Arguments), int64_t programs, int threads, int64_t shared_bytes,
                void*, const Arguments& arguments) {
  struct Launch {
    void (*kernel)(Arguments);
    const Arguments& arguments;
  } const launch{kernel, arguments};
  auto body = [](const void* at) {
    const Launch& l = *static_cast<const Launch*>(at);
    l.kernel(l.arguments);
  };
  emulation::last_hash = emulation::run_grid(body, &launch, int(programs), threads,
                                             size_t(shared_bytes), emulation::next_order);
  return "";
}

}  // namespace hylora::cuda
