// What one launch is: pointers, sizes and strides, and the plan the host makes for it. Plain C++:
// nothing of CUDA, nothing of torch, the same for nvcc, for the library and for the emulator.
#pragma once
#include <cstdint>

namespace hylora::cuda {

enum class Type : int32_t { bf16, fp16 };

// y [M, N] = x [W1; W1a]^T [W2, W2a]^T + bias, the adapter's part of the middle times alpha.
//   forward    W1 = SVh, W1a = A, W2 = U, W2a = B: rows are contiguous along the contraction
//   backward   (transposed) x is dy, W1 = U^T, W1a = B^T, W2 = SVh^T, W2a = A^T, given as what is
//              stored: U [K, r], B [K, ra], SVh [r, N], A [ra, N]; the contraction runs down
//              columns
//   pivoted    forward: y[:, pivots] = h, y[:, others] = h W2^T; W2 is [others, r]
//              backward: h = x[:, pivots] + x[:, others] W1^T; W1 is stored as [others, r]
struct Dataflow {
  Type type;
  bool transposed;
  const void *x, *W1, *W1a, *W2, *W2a, *bias;  // W1a and W2a, bias may be null
  void *y, *h;                                 // y [M, N]; h: workspace [M, Plan::h_columns]
  void* h_a;              // [M, lora_rank] out, times alpha if transposed; or null
  float* partial;         // workspace, 16-byte aligned as h is
  int32_t* counters;      // all zero before a launch, and after it
  const int32_t* pivots;  // [rank] ascending, or null
  const int64_t* others;  // [others_count] ascending, or null
  int64_t M, K, N, rank, lora_rank, others_count;
  int64_t x_stride, w1_stride, w1a_stride, w2_stride, w2a_stride;  // of rows as stored
  float alpha;
};

// dA [lora_rank, K] = dh_a^T x, dB [N, lora_rank] = alpha dy^T h_a, db [N] = the sum of dy's rows.
// dA may be null, then dh_a and x are; dB may be null, then h_a, dy and db are; db may be null.
struct Thin {
  Type type;
  const void *dh_a, *x, *h_a, *dy;  // dh_a, h_a [M, lora_rank] in one piece
  void *dA, *dB, *db;
  float* partial;
  int32_t* counters;
  int64_t M, K, N, lora_rank, x_stride, dy_stride;
  float alpha;
};

struct Plan {
  int kernel;        // a Kernel
  int split;         // parts of a contraction that different blocks add up
  int64_t programs;  // blocks launched
  int64_t h_columns, partial_floats, counters;  // of the workspace
  int threads;
  int64_t shared_bytes;
};

enum Kernel : int { kTile64, kTile128, kDecode, kThin };

// One tile of a product: rows of x by columns of the result, `depth` of the contraction at a time,
// `stages` of them on their way from memory. `residents` blocks of it share a multiprocessor, so
// that a thread has 65536 / (residents * 32 * warps) registers: 170, 128, 85 and 170.
struct Tile {
  int rows, columns, depth, stages, warps, residents;
};
// 64 x 64 fills a device from M = 17 on; 128 x 128 reads half as much where it fills it too. Three
// stages are 48 KiB: two blocks on the multiprocessors with the least shared memory.
constexpr Tile kTiles[] = {
    {64, 64, 64, 3, 4, 3}, {128, 128, 32, 3, 8, 2}, {16, 16, 32, 0, 8, 3}, {32, 128, 32, 4, 4, 3}};
constexpr int64_t kDecodeRows = kTiles[kDecode].rows;

// The least architecture: asynchronous copies and bf16 tensor cores.
constexpr int kLeastArch = 80;

// The plan for a device of `multiprocessors`, arch as in sm_90.
Plan plan(const Dataflow&, int multiprocessors, int arch);
Plan plan(const Thin&, int multiprocessors, int arch);
// The same by numbers of one's own: workspace and block sizes that go with them.
Plan plan_as(const Dataflow&, Kernel, int split, int64_t programs);
Plan plan_as(const Thin&, int split);

// "" or the error's words.
const char* launch(const Dataflow&, const Plan&, void* stream);
const char* launch(const Thin&, const Plan&, void* stream);

}  // namespace hylora::cuda
