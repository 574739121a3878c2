// Each primitive of csrc/cuda/primitives.h by itself, what it takes and gives at places of its own:
// backends/cuda/test_gate.py looks for them in the PTX.
#include "cuda/primitives.h"

using namespace hylora::cuda;

template <class T>
DEVICE void multiply(float* d, const uint32_t* a, const uint32_t* b) {
  float sums[4] = {d[0], d[1], d[2], d[3]};
  const uint32_t left[4] = {a[0], a[1], a[2], a[3]};
  mma<T>(sums, left, b[0], b[1]);
  for (int i = 0; i < 4; i++)
    d[4 + i] = sums[i];
}

extern "C" {

__global__ void mma_bf16(float* d, const uint32_t* a, const uint32_t* b) {
  multiply<bf16>(d, a, b);
}
__global__ void mma_fp16(float* d, const uint32_t* a, const uint32_t* b) {
  multiply<fp16>(d, a, b);
}
__global__ void ldmatrix_plain(uint32_t* d) {
  uint32_t r[4];
  ldmatrix(r, shared_memory());
  for (int i = 0; i < 4; i++)
    d[i] = r[i];
}
__global__ void ldmatrix_turned(uint32_t* d) {
  uint32_t r[4];
  ldmatrix_transposed(r, shared_memory());
  for (int i = 0; i < 4; i++)
    d[i] = r[i];
}
__global__ void cp_async(const void* from, int bytes) {
  copy_async(shared_memory(), from, bytes);
  commit();
  wait<2>();
}
__global__ void pack_bf16(uint32_t* d, const float* from) { d[0] = pack<bf16>(from[0], from[1]); }
__global__ void pack_fp16(uint32_t* d, const float* from) { d[0] = pack<fp16>(from[0], from[1]); }
__global__ void load_once(uint32_t* d, const Chunk* from) {
  const Chunk c = read_once(from);
  for (int i = 0; i < 4; i++)
    d[i] = c.word[i];
}
__global__ void load_two_once(uint32_t* d, const Words<2>* from) {
  const Words<2> w = read_once(from);
  d[0] = w.word[0], d[1] = w.word[1];
}
__global__ void load_one_once(uint32_t* d, const Words<1>* from) { d[0] = read_once(from).word[0]; }
__global__ void minus_bf16(uint32_t* d, const uint32_t* a, const uint32_t* b) {
  d[0] = minus<bf16>(a[0], b[0]);
}
__global__ void minus_fp16(uint32_t* d, const uint32_t* a, const uint32_t* b) {
  d[0] = minus<fp16>(a[0], b[0]);
}
__global__ void choose(uint32_t* d, const uint32_t* from) {
  d[0] = and_or(from[0], from[1], from[2]);
}
__global__ void load_fresh(uint32_t* d, const Chunk* from) {
  const Chunk c = read_fresh(from);
  for (int i = 0; i < 4; i++)
    d[i] = c.word[i];
}
__global__ void ticket(int32_t* d, int32_t* counter) { d[0] = add_relaxed(counter, 3); }
__global__ void publish(int32_t* counter) { add_release(counter, 3); }
__global__ void arrive(int32_t* d, int32_t* counter) { d[0] = add_acquire_release(counter, 3); }
__global__ void look(int32_t* d, const int32_t* counter) { d[0] = load_acquire(counter); }
}
