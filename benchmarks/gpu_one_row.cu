// Where the time of one launch goes at M = 1: the same two products, y = Q (P x), with and without
// each part of the one-launch kernel. gpu_one_row.py compiles, runs and prints it.
//
// Every variant multiplies in the same way: a warp computes a number of h or y, each lane reads 16
// bytes at a time, sums are float32. They differ in how a block learns its work (a static share, or
// tickets from a queue) and that h is complete (a launch's end, a counter in global memory, or one
// counter for a cluster of blocks, whose barrier is in hardware).
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace cg = cooperative_groups;
using bf16 = __nv_bfloat16;

#define CHECK(call)                                                          \
  do {                                                                       \
    const cudaError_t error = (call);                                        \
    if (error != cudaSuccess) {                                              \
      fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error));         \
      exit(1);                                                               \
    }                                                                        \
  } while (0)

constexpr int kThreads = 256, kWarps = kThreads / 32, kCluster = 8;
constexpr int kTileRows = kWarps;  // numbers of h or y that a ticket stands for

struct Layer {
  const bf16 *x, *P, *Q;  // [K], [R, K], [N, R]; K and R multiples of 8
  bf16 *h, *y;            // [R], [N]
  int* counters;          // ticket, ready, finished: zero before and after every launch
  int K, R, N;
};

__device__ __forceinline__ void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
__device__ __forceinline__ int load_acquire(const int* at) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ __forceinline__ void add_release(int* at, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
__device__ __forceinline__ uint4 read_once(const bf16* at) {
  uint4 c;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(c.x), "=r"(c.y), "=r"(c.z), "=r"(c.w)
      : "l"(at));
  return c;
}
__device__ __forceinline__ uint4 read_fresh(const bf16* at) {  // others have just written it
  uint4 c;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(c.x), "=r"(c.y), "=r"(c.z), "=r"(c.w)
               : "l"(at)
               : "memory");
  return c;
}
__device__ __forceinline__ float dot(uint32_t a, uint32_t b) {
  const float low = __uint_as_float(a << 16) * __uint_as_float(b << 16);
  return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), low);
}

// out[row] = weight[row] . v, by the warp that calls it.
__device__ __forceinline__ void multiply(const bf16* weight, const bf16* v, bf16* out, int row,
                                         int depth) {
  const bf16* line = weight + int64_t(row) * depth;
  float sum = 0.0f;
#pragma unroll 4
  for (int k = int(threadIdx.x % 32) * 8; k < depth; k += 256) {
    const uint4 w = read_once(line + k), a = read_fresh(v + k);
    sum += dot(w.x, a.x) + dot(w.y, a.y) + dot(w.z, a.z) + dot(w.w, a.w);
  }
  for (int lane = 16; lane; lane /= 2)
    sum += __shfl_xor_sync(~0u, sum, lane);
  if (threadIdx.x % 32 == 0) out[row] = __float2bfloat16(sum);
}

// The rows of this warp's static share.
__device__ __forceinline__ void multiply_share(const bf16* weight, const bf16* v, bf16* out,
                                               int rows, int depth) {
  const int warp = int(blockIdx.x) + int(gridDim.x) * int(threadIdx.x / 32);
  for (int row = warp; row < rows; row += int(gridDim.x) * kWarps)
    multiply(weight, v, out, row, depth);
}

__device__ __forceinline__ void prefetch_share(const bf16* weight, int rows, int depth) {
  const int warp = int(blockIdx.x) + int(gridDim.x) * int(threadIdx.x / 32);
  for (int row = warp; row < rows; row += int(gridDim.x) * kWarps)
    for (int k = int(threadIdx.x % 32) * 64; k < depth; k += 2048)
      prefetch(weight + int64_t(row) * depth + k);
}

__device__ __forceinline__ void say_ready(const Layer& l) {
  __syncthreads();
  if (threadIdx.x == 0) add_release(l.counters + 1, 1);
}
__device__ __forceinline__ void wait_until_ready(const Layer& l, int count) {
  if (threadIdx.x == 0)
    while (load_acquire(l.counters + 1) < count) {
    }
  __syncthreads();
}
// The last of `count` callers resets the counters.
__device__ __forceinline__ void finish(const Layer& l, int count) {
  if (threadIdx.x != 0 || atomicAdd(l.counters + 2, 1) != count - 1) return;
  l.counters[0] = l.counters[1] = l.counters[2] = 0;
}

__global__ void __launch_bounds__(kThreads) empty(Layer) {}

__global__ void __launch_bounds__(kThreads) shrink(Layer l) {
  multiply_share(l.P, l.x, l.h, l.R, l.K);
}
__global__ void __launch_bounds__(kThreads) expand(Layer l) {
  multiply_share(l.Q, l.h, l.y, l.N, l.R);
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)
#define HAS_CLUSTERS 1
#endif

// The same two as dependent launches: the second begins, and brings its weights into L2, while the
// first runs.
__global__ void __launch_bounds__(kThreads) shrink_early(Layer l) {
#ifdef HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");  // the layer before has read h
#endif
  multiply_share(l.P, l.x, l.h, l.R, l.K);
}
__global__ void __launch_bounds__(kThreads) expand_early(Layer l) {
  prefetch_share(l.Q, l.N, l.R);
#ifdef HAS_CLUSTERS
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  multiply_share(l.Q, l.h, l.y, l.N, l.R);
}

template <bool WORKS>
__device__ __forceinline__ void by_tickets(const Layer& l) {
  __shared__ int shared_ticket;
  const int shrinks = (l.R + kTileRows - 1) / kTileRows, warp = int(threadIdx.x / 32);
  const int tiles = shrinks + (l.N + kTileRows - 1) / kTileRows;
  while (true) {
    __syncthreads();
    if (threadIdx.x == 0) shared_ticket = atomicAdd(l.counters, 1);
    __syncthreads();
    const int ticket = shared_ticket;
    if (ticket >= tiles) break;
    if (!WORKS) continue;
    if (ticket < shrinks) {
      const int row = ticket * kTileRows + warp;
      if (row < l.R) multiply(l.P, l.x, l.h, row, l.K);
      say_ready(l);
    } else {
      const int row = (ticket - shrinks) * kTileRows + warp;
      if (row < l.N)
        for (int k = int(threadIdx.x % 32) * 64; k < l.R; k += 2048)
          prefetch(l.Q + int64_t(row) * l.R + k);
      wait_until_ready(l, shrinks);
      if (row < l.N) multiply(l.Q, l.h, l.y, row, l.R);
    }
  }
  finish(l, int(gridDim.x));
}
__global__ void __launch_bounds__(kThreads) tickets_alone(Layer l) { by_tickets<false>(l); }
__global__ void __launch_bounds__(kThreads) tickets(Layer l) { by_tickets<true>(l); }

// All blocks run at a time, so each has a static share of either phase.
template <bool PREFETCHES>
__device__ __forceinline__ void by_share(const Layer& l) {
  if (PREFETCHES) prefetch_share(l.Q, l.N, l.R);
  multiply_share(l.P, l.x, l.h, l.R, l.K);
  say_ready(l);
  wait_until_ready(l, int(gridDim.x));
  multiply_share(l.Q, l.h, l.y, l.N, l.R);
  finish(l, int(gridDim.x));
}
__global__ void __launch_bounds__(kThreads) shares(Layer l) { by_share<false>(l); }
__global__ void __launch_bounds__(kThreads) shares_prefetched(Layer l) { by_share<true>(l); }

// The same, and only the first block of a cluster counts and waits in global memory.
__global__ void __launch_bounds__(kThreads) clusters(Layer l) {
#ifdef HAS_CLUSTERS
  const cg::cluster_group cluster = cg::this_cluster();
  const bool leads = cluster.block_rank() == 0;
  prefetch_share(l.Q, l.N, l.R);
  multiply_share(l.P, l.x, l.h, l.R, l.K);
  __threadfence();
  cluster.sync();
  if (leads && threadIdx.x == 0) {
    add_release(l.counters + 1, 1);
    while (load_acquire(l.counters + 1) < int(gridDim.x) / kCluster) {
    }
  }
  cluster.sync();
  multiply_share(l.Q, l.h, l.y, l.N, l.R);
  if (leads) finish(l, int(gridDim.x) / kCluster);
#endif
}

// The flag without work: what counting and waiting alone cost.
__global__ void __launch_bounds__(kThreads) flag_alone(Layer l) {
  say_ready(l);
  wait_until_ready(l, int(gridDim.x));
  finish(l, int(gridDim.x));
}

struct Variant {
  const char* name;
  std::vector<void (*)(Layer)> kernels;
  bool computes, is_early, has_clusters;
};

void launch(void (*kernel)(Layer), Layer layer, int blocks, bool is_early, bool has_clusters,
            cudaStream_t stream) {
  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config{};
  config.gridDim = has_clusters ? blocks / kCluster * kCluster : blocks;
  config.blockDim = kThreads, config.stream = stream, config.attrs = attributes;
  if (is_early) {
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  if (has_clusters) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = kCluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    config.numAttrs = 1;
  }
  CHECK(cudaLaunchKernelEx(&config, kernel, layer));
}

// Microseconds of one pass of a variant in a graph of `layers.size()` passes, the least of rounds.
float time_of(const Variant& v, const std::vector<Layer>& layers, int blocks, int rounds) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (const Layer& layer : layers)
    for (auto* kernel : v.kernels)
      launch(kernel, layer, blocks, v.is_early, v.has_clusters, stream);
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&replay, graph, 0));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  float least = 1e30f;
  for (int round = 0; round < rounds; round++) {
    float ms;
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(replay, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (round) least = fminf(least, ms);  // the first one loads code
  }
  CHECK(cudaGraphExecDestroy(replay));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  CHECK(cudaStreamDestroy(stream));
  return 1e3f * least / float(layers.size());
}

std::vector<bf16> random_numbers(size_t count, float scale) {
  std::vector<bf16> numbers(count);
  uint32_t state = 12345;
  for (bf16& number : numbers) {
    state = state * 1664525u + 1013904223u;
    number = __float2bfloat16((float(state >> 8) / float(1 << 23) - 1.0f) * scale);
  }
  return numbers;
}

bf16* on_device(const std::vector<bf16>& numbers) {
  bf16* at;
  CHECK(cudaMalloc(&at, numbers.size() * sizeof(bf16)));
  CHECK(cudaMemcpy(at, numbers.data(), numbers.size() * sizeof(bf16), cudaMemcpyHostToDevice));
  return at;
}

// v [depth] -> weight [rows, depth] v, rounded as the kernels round.
std::vector<float> product(const std::vector<bf16>& weight, const std::vector<float>& v, int rows) {
  std::vector<float> out(rows);
  for (int row = 0; row < rows; row++) {
    double sum = 0.0;
    for (size_t k = 0; k < v.size(); k++)
      sum += double(__bfloat162float(weight[row * v.size() + k])) * v[k];
    out[row] = __bfloat162float(__float2bfloat16(float(sum)));
  }
  return out;
}

int main(int count, char** words) {
  const int K = count > 1 ? atoi(words[1]) : 2048, N = count > 2 ? atoi(words[2]) : 2048;
  const int R = count > 3 ? atoi(words[3]) : 544, passes = 32, rounds = 40;
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  const bool is_hopper = device.major >= 9;
  const auto x = random_numbers(K, 1.0f), P = random_numbers(size_t(R) * K, 0.05f);
  const auto Q = random_numbers(size_t(N) * R, 0.05f);
  std::vector<float> wide(K);
  for (int k = 0; k < K; k++)
    wide[k] = __bfloat162float(x[k]);
  const auto expected = product(Q, product(P, wide, R), N);

  // One set of weights stays in L2, `passes` of them with as many bytes as displace each other.
  const size_t bytes = sizeof(bf16) * R * size_t(K + N);
  const int copies = int(2 * size_t(device.l2CacheSize) / bytes) + 2;
  std::vector<Layer> sets;
  int* counters;
  CHECK(cudaMalloc(&counters, 3 * sizeof(int)));
  CHECK(cudaMemset(counters, 0, 3 * sizeof(int)));
  bf16 *h = on_device(std::vector<bf16>(R)), *y = on_device(std::vector<bf16>(N));
  const bf16* at_x = on_device(x);
  for (int copy = 0; copy < copies; copy++)
    sets.push_back({at_x, on_device(P), on_device(Q), h, y, counters, K, R, N});
  std::vector<Layer> cold, warm(passes, sets[0]);
  for (int pass = 0; pass < (passes > copies ? passes : copies); pass++)
    cold.push_back(sets[pass % copies]);

  const std::vector<Variant> variants = {
      {"empty kernel", {empty}, false, false, false},
      {"two empty kernels", {empty, empty}, false, false, false},
      {"queue alone", {tickets_alone}, false, false, false},
      {"flag alone", {flag_alone}, false, false, false},
      {"shrink alone", {shrink}, false, false, false},
      {"expand alone", {expand}, false, false, false},
      {"two launches", {shrink, expand}, true, false, false},
      {"two launches, the second early", {shrink_early, expand_early}, true, true, false},
      {"one launch, queue and flag", {tickets}, true, false, false},
      {"one launch, shares and flag", {shares}, true, false, false},
      {"one launch, shares, flag, prefetch", {shares_prefetched}, true, false, false},
      {"one launch, flag by cluster, prefetch", {clusters}, true, false, true},
  };
  printf("{\"card\": \"%s\", \"K\": %d, \"N\": %d, \"rank\": %d, \"bytes\": %zu, \"rows\": [",
         device.name, K, N, R, bytes);
  const char* separator = "\n";
  for (int per_sm = 1; per_sm <= 2; per_sm++)
    for (const Variant& v : variants) {
      if ((v.is_early || v.has_clusters) && !is_hopper) continue;
      const int blocks = per_sm * device.multiProcessorCount / kCluster * kCluster;
      std::vector<bf16> got(N);
      CHECK(cudaMemset(y, 0xff, N * sizeof(bf16)));
      const float when_cold = time_of(v, cold, blocks, rounds);
      const float when_warm = time_of(v, warm, blocks, rounds);
      CHECK(cudaMemcpy(got.data(), y, N * sizeof(bf16), cudaMemcpyDeviceToHost));
      double error = 0.0, norm = 0.0;
      for (int n = 0; n < N && v.computes; n++) {
        const double is = __bfloat162float(got[n]), off = is - expected[n];
        error += off * off, norm += double(expected[n]) * expected[n];
      }
      error = v.computes ? std::sqrt(error / norm) : 0.0;
      if (!(error < 0.02)) {
        fprintf(stderr, "%s is wrong: relative error %g\n", v.name, error);
        return 1;
      }
      printf("%s  {\"variant\": \"%s\", \"blocks\": %d, \"cold_us\": %.3f, \"warm_us\": %.3f}",
             separator, v.name, blocks, when_cold, when_warm);
      separator = ",\n";
    }
  printf("\n]}\n");
}
