// Rotary embeddings (RotaryCall in row_calls.h).
#pragma once
#include "row_vectors.h"

namespace hylora {
namespace {

// Turns the pair (a, b) by an angle.
HYLORA_INLINE void turn(V& a, V& b, V cos, V sin) {
  const V turned = a * cos - b * sin;
  b = b * cos + a * sin;
  a = turned;
}

template <class T>
HYLORA_INLINE void turn_halves(const T* x, T* y, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += W) {
    const int64_t left = half - i;
    V a = load(x + i, left), b = load(x + half + i, left);
    turn(a, b, load(cos + i, left), load(sin + i, left));
    store(y + i, a, left), store(y + half + i, b, left);
  }
}

template <class T>
HYLORA_INLINE void turn_neighbours(const T* x, T* y, const float* cos, const float* sin,
                                   int64_t half) {
  for (int64_t i = 0; i < half; i += W) {
    const int64_t left = half - i;
    float pairs[2 * W];
    store(pairs, load(x + 2 * i, 2 * left)),
        store(pairs + W, left * 2 > W ? load(x + 2 * i + W, 2 * left - W) : V{});
    V a, b;
    for (int lane = 0; lane < W; lane++)
      a[lane] = pairs[2 * lane], b[lane] = pairs[2 * lane + 1];
    turn(a, b, load(cos + i, left), load(sin + i, left));
    for (int lane = 0; lane < W; lane++)
      pairs[2 * lane] = a[lane], pairs[2 * lane + 1] = b[lane];
    store(y + 2 * i, load(pairs), 2 * left);
    if (left * 2 > W) store(y + 2 * i + W, load(pairs + W), 2 * left - W);
  }
}

template <class T>
void rotary_by(const RotaryCall& call, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; part++) {
    const int64_t head = part % call.heads, row = part / call.heads;
    const T* x = head_at<const T>(call.x, call.x_strides, row / call.rows, row % call.rows, head);
    T* y = head_at<T>(call.y, call.y_strides, row / call.rows, row % call.rows, head);
    const int64_t half = call.rotary_size / 2;
    if (half) {
      const int64_t angle = call.positions[row] * half;
      const auto turn_pairs = call.pairs == Pairs::halves ? turn_halves<T> : turn_neighbours<T>;
      turn_pairs(x, y, call.cos + angle, call.sin + angle, half);
    }
    if (y != x)
      for (int64_t i = call.rotary_size; i < call.head_size; i++)
        y[i] = x[i];
  }
}

}  // namespace
}  // namespace hylora
