// A launch's arguments (pointers, sizes, strides) and the plan that the host makes for it. Plain
// C++ without CUDA or torch: nvcc, the library and the emulator compile the same text.
#pragma once
#include <cstdint>

namespace hylora::cuda {

enum class Type : int32_t { bf16, fp16 };

// Both products of a layer: h [M, rank + lora_rank] = x [W1; W1a]^T, the adapter part times alpha,
// then y [M, N] = h [W2, W2a]^T + bias. K and N are x's and y's columns in either direction.
//   forward    W1 = SVh, W1a = A, W2 = U, W2a = B. The contraction runs along the rows.
//   backward   (transposed) x is dy, y is dx, W1 = U^T, W1a = B^T, W2 = SVh^T, W2a = A^T, passed as
//              they are stored: U [K, r], B [K, ra], SVh [r, N], A [ra, N]. The contraction runs
//              down the columns.
//   pivoted    forward: y[:, pivots] = h, y[:, others] = h W2^T; W2 is [others, r]
//              backward: h = x[:, pivots] + x[:, others] W1^T; W1 is stored as [others, r]
struct LayerCall {
  Type type;
  bool transposed;
  const void *x, *W1, *W1a, *W2, *W2a, *bias;  // W1a with W2a, and bias, may be null
  void *y, *h;                                 // y [M, N]; h: workspace [M, Plan::h_columns]
  void* h_a;              // result [M, lora_rank], times alpha if transposed; or null
  float* partial;         // workspace of split sums, 16-byte aligned as h is
  int32_t* counters;      // zero before and after every launch
  const int32_t* pivots;  // [rank] ascending, or null
  const int64_t* others;  // [others_count] ascending, or null
  int64_t M, K, N, rank, lora_rank, others_count;
  int64_t x_stride, w1_stride, w1a_stride, w2_stride, w2a_stride;  // of rows as stored
  int64_t y_stride;  // of y's rows: N, or more where y is a member's part of a group's
  float alpha;
};

// Layers on one x of up to 16 rows, in one launch: members differ in all but type, x, M and K. A
// dense matrix is the pivoted form without others. None is transposed.
constexpr int kMostMembers = 8;  // a launch's arguments hold no more than 4 KB
struct GroupCall {
  LayerCall members[kMostMembers];
  // The first ticket past each member's shrink tiles, then past each member's expand tiles.
  int32_t ends[2 * kMostMembers];
  int count;
};

// dA [lora_rank, K] = dh_a^T x, dB [N, lora_rank] = alpha dy^T h_a, db [N] = the sum of dy's rows.
// dA is null together with dh_a and x, dB together with h_a, dy and db; db alone may be null too.
struct AdapterGradientsCall {
  Type type;
  const void *dh_a, *x, *h_a, *dy;  // dh_a, h_a [M, lora_rank] contiguous
  void *dA, *dB, *db;
  float* partial;
  int32_t* counters;
  int64_t M, K, N, lora_rank, x_stride, dy_stride;
  float alpha;
};

// y [M, N] = x W^T + h_a B^T + bias for up to 16 rows of x. W is quantised (weights.py): codes
// [N, groups, 2 bits] words, scales [N, groups], zeros [N, groups], null at 8 bits; all contiguous.
struct QuantizedCall {
  Type type;
  int bits;  // 2, 3, 4, 5, 6 or 8
  const void *x, *codes, *scales, *zeros, *bias;
  const void *h_a, *B;  // [M, lora_rank] and [N, lora_rank], contiguous; both null at rank 0
  void* y;
  int64_t M, K, N, groups, lora_rank, x_stride;
};

constexpr int64_t kQuantizedRows = 16;  // of x, the most

// How a call is launched.
struct Plan {
  int kernel;        // a Kernel
  int split;         // parts of each shrink tile's contraction, computed by different blocks
  int64_t programs;  // blocks launched
  int64_t h_columns, partial_floats, counters;  // sizes of the workspace
  int threads;
  int64_t shared_bytes;
};

enum Kernel : int { kTile64, kTile128, kDecode, kAdapterGradients };  // kDecode of a group, too

// One tile of a product: rows of x by columns of the result. The contraction goes in steps of
// `depth`, of which `stages` are on their way from memory. `blocks_per_sm` blocks share a
// multiprocessor, which leaves a thread 65536 / (blocks_per_sm * 32 * warps) registers: 170, 128,
// 85 and 170 for the four kernels.
struct Tile {
  int rows, columns, depth, stages, warps, blocks_per_sm;
};
// 64 x 64 fills a device from M = 17 on; 128 x 128 reads half as much where it fills the device
// too. Three stages take 48 KiB, so the multiprocessors with the least shared memory hold two
// blocks.
constexpr Tile kTiles[] = {
    {64, 64, 64, 3, 4, 3}, {128, 128, 32, 3, 8, 2}, {16, 16, 32, 0, 8, 3}, {32, 128, 32, 4, 4, 3}};
constexpr int64_t kDecodeRows = kTiles[kDecode].rows;

// The oldest architecture with asynchronous copies and bf16 tensor cores.
constexpr int kLeastArch = 80;

// The plan for a device; arch as in sm_90.
Plan plan(const LayerCall&, int multiprocessors, int arch);
Plan plan(const AdapterGradientsCall&, int multiprocessors, int arch);
// Of a group; h_columns are those of all members.
Plan plan(const GroupCall&, int multiprocessors, int arch);
// The plan with a given kernel, split and number of blocks, and the workspace that goes with them.
Plan plan_as(const LayerCall&, Kernel, int split, int64_t programs);
Plan plan_as(const AdapterGradientsCall&, int split);
Plan plan_as(const GroupCall&, int split, int64_t programs);
// Gives each member its part of a plan's workspace, and counts the tiles.
void complete(GroupCall&, const Plan&, void* h, float* partial, int32_t* counters);

// Returns "" or the error's words.
const char* launch(const LayerCall&, const Plan&, void* stream);
const char* launch(const AdapterGradientsCall&, const Plan&, void* stream);
const char* launch(const GroupCall&, const Plan&, void* stream);
const char* launch(const QuantizedCall&, int multiprocessors, void* stream);

}  // namespace hylora::cuda
