// The memory of one block of rows: a piece of scratch, cut up.
#pragma once
#include "codes.h"
#include "pivots.h"
#include "plan.h"

namespace hylora {
namespace {

// Rows that a product reads: those of x, of h, or of the adapter's part of h. With bf16 limbs every
// limb has a plane of its own.
template <class A>
struct Rows {
  A* data = nullptr;
  int64_t stride = 0, plane = 0;
  FixedRows fixed{};  // the same as fixed point, for quantised panels

  A* at(int64_t row, int64_t column = 0) const { return data + row * stride + column; }
};

// A: what numbers are kept as; T: the tensors' type.
template <class A, class T>
struct Buffers {
  Rows<A> x;  // its copy; of a chunk, or of all
  Rows<A> h;
  Rows<A> adapter_h;  // the adapter's columns of h; the base's in the same 32 are zero
  // Pivoted form, forward. Bias and biased_pivots only if there is a bias, the latter only if h is
  // the pivots: h must stay without it.
  T *pivots = nullptr, *others = nullptr;
  int64_t pivots_stride = 0, others_stride = 0;
  T* previous_others = nullptr;  // [rows][32]: the last 32 of the group of panels before
  T *bias = nullptr, *biased_pivots = nullptr;  // bias sorted into pivots, padded, and others
  float* partial_sums = nullptr;                // of tiles between two passes over k
  float* row_max = nullptr;                     // bf16 limbs: the largest magnitude of a row of x
  bf16* limbs = nullptr;                        // of a panel of the base, then of the adapter's
  int64_t limb_plane = 0;
  T* widened = nullptr;  // quantised panels at hand, as panels of T, or as units
  WidenedUnit* widened_units = nullptr;

  // Points into `memory`, or only counts if it is null. Returns the bytes.
  size_t lay_out(const LayerCall& call, const BlockPlan& plan, const Method& method, char* memory);
};

// Hands out one piece of memory after another, each at a multiple of 64 bytes.
struct Allotter {
  char* memory;
  size_t used = 0;

  template <class Number>
  Number* get(int64_t count) {
    char* p = memory + used;
    used += size_t(round_up(count * int64_t(sizeof(Number)), 64));
    return reinterpret_cast<Number*>(p);
  }
};

// A stride of an odd number of cache lines, at least `width` numbers: rows spread over all sets of
// L1.
template <class Number>
int64_t odd_lines(int64_t width) {
  const int64_t per_line = 64 / int64_t(sizeof(Number));
  return (ceil_div(width, per_line) | 1) * per_line;
}

template <class A, class T>
size_t Buffers<A, T>::lay_out(const LayerCall& call, const BlockPlan& plan, const Method& method,
                              char* memory) {
  // x first: other layers find it at the block's start.
  Allotter memory_for{call.x_block ? static_cast<char*>(call.x_block) : memory};
  const int64_t padded = round_up(plan.rows, 32), tiles = padded / 32;
  const int64_t x_rows = plan.x == XSource::chunk_copy && method.rows_stay() ? 32 : padded;
  const int64_t other_columns = round_up(call.table.n - call.table.pivots, 32);
  const int64_t x_columns = call.sorts_x()                  ? 32 * plan.base_panels + other_columns
                            : plan.x == XSource::whole_copy ? round_up(call.K, 32)
                            : plan.x == XSource::chunk_copy ? method.chunk_blocks * 32
                                                            : 0;
  x.stride = x_columns ? odd_lines<A>(x_columns) : 0;
  x.plane = x_rows * x.stride;
  x.data = memory_for.get<A>(method.planes * x.plane);
  const auto fixed_rows = [&](int64_t k) {
    const int limbs = method.type_bytes == 4 ? 2 : 1;
    const int64_t groups = ceil_div(k, 64), height = larger(smaller(plan.rows, 32), 1);
    const int64_t rows = round_up(plan.rows, height);
    return FixedRows{memory_for.get<FixedGroup>(rows * limbs * groups), groups, height, limbs};
  };
  if (plan.fixed_point) x.fixed = fixed_rows(call.K);
  if (call.x_block) memory_for = {memory};
  h.stride = odd_lines<A>(32 * shrink_panels(call));
  h.plane = padded * h.stride;
  h.data = memory_for.get<A>(method.planes * h.plane + 32);
  if (plan.fixed_point && plan.has_h && call.expand.bits) h.fixed = fixed_rows(call.expand.k);
  adapter_h = {h.data + 32 * plan.base_panels, h.stride, h.plane, {}};
  if (plan.adapter_h_apart) {
    adapter_h.stride = odd_lines<A>(round_up(call.adapter_expand.k, 32));
    adapter_h.plane = padded * adapter_h.stride;
    adapter_h.data = memory_for.get<A>(method.planes * adapter_h.plane);
  }
  if (plan.merges_pivots) {
    // Without an adapter the shrink product leaves the pivots of all rows; with one, expand makes
    // those of the row tiles at hand. A merge reads 32 numbers from any pivot on: 32 more.
    const int64_t kept_rows = plan.finishes_row_tiles ? 32 : padded;
    pivots_stride = 32 * plan.base_panels + 32;
    if (plan.h_is_pivots)
      pivots = reinterpret_cast<T*>(h.data), pivots_stride = h.stride;
    else
      pivots = memory_for.get<T>((call.ra ? kept_rows : padded) * pivots_stride + 32);
    // Each row: the last 32 others of the group before, then this group's.
    const int64_t panels = expand_panels(call);
    const int64_t group = plan.shared ? panels : plan.expand_group;
    others_stride = odd_lines<T>(32 * (1 + smaller(panels, group)));
    others = memory_for.get<T>(kept_rows * others_stride + 64);
    previous_others = memory_for.get<T>(panels > group ? padded * 32 : 0);
    bias = memory_for.get<T>(call.bias ? call.N + call.ra + 128 : 0);
    if (call.bias && plan.h_is_pivots)
      biased_pivots = memory_for.get<T>((plan.shared ? padded : kMergedRows) * pivots_stride + 64);
  }
  if (!plan.shared) {
    const int64_t shrink = plan.shrink.count > 1 ? shrink_panels(call) * tiles : 0;
    const int64_t expand =
        method.rows_stay() ? panels_in_l2(method, 1) : method.panels_per_tile * tiles;
    partial_sums = memory_for.get<float>(larger(shrink, expand) * 1024);
    if (method.has_limbs()) {
      // A chunk of a panel of the base, or a whole one of the adapter, whichever is longer.
      limb_plane = larger(method.chunk_blocks, k_blocks(call.adapter_expand)) * 1024;
      row_max = memory_for.get<float>(padded);
      limbs = memory_for.get<bf16>(2 * method.planes * limb_plane);
    }
    const int64_t blocks = widened_blocks(method, call, plan);
    if (plan.fixed_point)
      widened_units = memory_for.get<WidenedUnit>(blocks / 2);
    else
      widened = memory_for.get<T>(blocks * 1024);
  }
  return memory_for.used;
}

}  // namespace
}  // namespace hylora
