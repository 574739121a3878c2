// The kernels' access to the hardware, and the only file with PTX. With HYLORA_EMULATION the CPU
// emulator of tests/cuda_emulator provides the same names, and nothing comes from CUDA.
#pragma once
#include <cstdint>

namespace hylora::cuda {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
template <int COUNT>
struct alignas(4 * COUNT) Words {
  uint32_t word[COUNT];
};
using Chunk = Words<4>;  // eight numbers, the most that one load brings

}  // namespace hylora::cuda

#ifdef HYLORA_EMULATION
#include "emulator.h"
#else
#include <cuda_runtime.h>

#include <type_traits>

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define ARGUMENT const __grid_constant__  // read in place, never copied to the stack

namespace hylora::cuda {

DEVICE int thread_index() { return int(threadIdx.x); }
DEVICE int block_index() { return int(blockIdx.x); }
DEVICE int block_count() { return int(gridDim.x); }
DEVICE void synchronize() { __syncthreads(); }

DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char all[];
  return all;
}
DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// ------------------------------------------------------------------------------- tensor cores

// Loads four 8 x 8 matrices of 16-bit numbers. Lane l gives the address of row l % 8 of matrix l /
// 8 and gets in r[i] the numbers [l / 4][2 (l % 4) + {0, 1}] of matrix i.
DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Loads their transposes: lane l gets the numbers [2 (l % 4) + {0, 1}][l / 4].
DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4, t = lane % 4, a pair's first number lowest:
//   a[0..3]  rows g, g + 8, g, g + 8; columns 2t, 2t, 2t + 8, 2t + 8 and the next
//   b0, b1   rows 2t, 2t + 8 and the next; column g
//   d[0..3]  rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
template <class T>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --------------------------------------------------------------------------------- conversion

template <class T>
DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

template <class T>
DEVICE T rounded(float value) {
  return {uint16_t(pack<T>(value, 0.0f))};
}

// a - b of both halves, rounded once.
template <class T>
DEVICE uint32_t minus(uint32_t a, uint32_t b) {
  uint32_t difference;
  if constexpr (std::is_same_v<T, bf16>)  // sm_80 has no subtraction: a - b is b times -1 plus a
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(0xBF80BF80u), "r"(a));
  else
    asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

// (a & mask) | rest in one instruction: the compiler makes two of it where both are constants.
DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t rest) {
  uint32_t found;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(found) : "r"(a), "r"(mask), "r"(rest));
  return found;
}
// The low halves of two words side by side, the first one's lowest; the high halves.
DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

DEVICE float widened(bf16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
DEVICE float widened(fp16 value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

// ------------------------------------------------------------------------------------- copies

// Copies 16 bytes to shared memory: the first `bytes` are read, the rest are zeros. The copy
// bypasses L1, so it sees what other blocks have written.
DEVICE void copy_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups are on their way.
template <int pending>
DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Reads weights: constant while the kernel runs, and needed once.
DEVICE Chunk read_once(const Chunk* from) {
  Chunk c;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
      : "l"(from));
  return c;
}

DEVICE Words<2> read_once(const Words<2>* from) {
  Words<2> w;
  asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
      : "=r"(w.word[0]), "=r"(w.word[1])
      : "l"(from));
  return w;
}
DEVICE Words<1> read_once(const Words<1>* from) {
  Words<1> w;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(w.word[0]) : "l"(from));
  return w;
}

// Reads what other blocks read as well.
template <int COUNT>
DEVICE Words<COUNT> read_often(const Words<COUNT>* from) {
  return *from;
}

// COUNT bytes at a multiple of COUNT, the first lowest.
template <int COUNT>
DEVICE uint32_t read_bytes(const uint8_t* from) {
  if constexpr (COUNT == 4) return *reinterpret_cast<const uint32_t*>(from);
  if constexpr (COUNT == 2) return *reinterpret_cast<const uint16_t*>(from);
  return *from;
}

// Reads what other blocks of the launch have written: the load bypasses L1.
DEVICE Chunk read_fresh(const Chunk* from) {
  Chunk c;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.word[0]), "=r"(c.word[1]), "=r"(c.word[2]), "=r"(c.word[3])
               : "l"(from)
               : "memory");
  return c;
}
DEVICE float read_fresh(const float* from) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
  return value;
}
template <class T>
DEVICE T read_fresh(const T* from) {
  T value;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(value.bits) : "l"(from) : "memory");
  return value;
}

DEVICE void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// ------------------------------------------------------------------------------------ counters

DEVICE int add_relaxed(int32_t* counter, int32_t value) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}
DEVICE void add_release(int32_t* counter, int32_t value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
DEVICE int add_acquire_release(int32_t* counter, int32_t value) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}
DEVICE int load_acquire(const int32_t* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// -------------------------------------------------------------------------------------- launch

// "" or the error's words.
template <class Arguments>
const char* run(void (*kernel)(Arguments), int64_t programs, int threads, int64_t shared_bytes,
                void* stream, const Arguments& arguments) {
  if (shared_bytes > (48 << 10)) {  // more than every kernel may have without asking
    const cudaError_t refused = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (refused != cudaSuccess) return cudaGetErrorString(refused);
  }
  kernel<<<unsigned(programs), threads, size_t(shared_bytes), cudaStream_t(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace hylora::cuda
#endif
