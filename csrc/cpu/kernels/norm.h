// RMSNorm and LayerNorm, and sums of rows (NormCall and AddCall in row_calls.h).
#pragma once
#include "row_vectors.h"

namespace hylora {
namespace {

// a + scale * b, or scale * b without a, as AddCall says.
template <class T>
HYLORA_INLINE V sum_of(const T* a, const T* b, float scale, int64_t count) {
  V v = load(b, count);
  if (scale != 1) v = rounded<T>(v * splat(scale));
  return a ? load(a, count) + v : v;
}

template <class T>
void add_columns(const T* a, const T* b, float scale, T* y, int64_t columns) {
  for (int64_t i = 0; i < columns; i += W)
    store(y + i, sum_of(a ? a + i : a, b + i, scale, columns - i), columns - i);
}

template <class T>
void add_by(const AddCall& call, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; part++) {
    const Columns at(call, part);
    const T* a = static_cast<const T*>(call.a);
    add_columns(a ? a + at.row * call.lda + at.first : a,
                static_cast<const T*>(call.b) + at.row * call.ldb + at.first, call.scale,
                static_cast<T*>(call.y) + at.row * call.ldy + at.first, at.count);
  }
}

// The mean of f(x) over a row. Lanes behind its end are left out.
template <class T, class F>
HYLORA_INLINE float mean_of(const T* x, int64_t width, const F& f) {
  V sums[4] = {};  // so that an addition needn't wait for the one before
  int64_t i = 0;
  for (; i + 4 * W <= width; i += 4 * W)
    for (int u = 0; u < 4; u++)
      sums[u] += f(load(x + i + u * W));
  for (; i < width; i += W)
    sums[0] += bits_as_float(float_as_bits(f(load(x + i, width - i))) & lanes_in(i, 0, width));
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(width);
}

template <class T>
HYLORA_INLINE void norm_of_row(const NormCall& call, const T* x, T* y) {
  const bool centers = call.norm == Norm::layer;
  const float mean = centers ? mean_of(x, call.width, [](V v) { return v; }) : 0.0f;
  const V center = splat(mean);
  const float square = mean_of(x, call.width, [&](V v) { return (v - center) * (v - center); });
  const V factor = splat(1.0f / __builtin_sqrtf(square + call.eps));
  for (int64_t i = 0; i < call.width; i += W) {
    const int64_t left = call.width - i;
    V v = (load(x + i, left) - center) * factor;
    if (call.rounds_first) v = rounded<T>(v);
    if (call.weight) v *= load(call.weight + i, left);
    if (call.bias) v += load(call.bias + i, left);
    store(y + i, v, left);
  }
}

template <class T>
void norm_by(const NormCall& call, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; part++) {
    const int64_t row = part / call.heads, column = part % call.heads * call.width;
    const T* x = static_cast<const T*>(call.x) + row * call.ldx + column;
    if (call.residual) {
      T* sum = static_cast<T*>(call.sum) + row * call.ldsum;
      add_columns(static_cast<const T*>(call.residual) + row * call.ldresidual, x, call.scale, sum,
                  call.width);
      x = sum;
    }
    norm_of_row(call, x, static_cast<T*>(call.y) + row * call.ldy + column);
  }
}

}  // namespace
}  // namespace hylora
