// Activations (ActivationCall in row_calls.h) and the choice of the greatest number (ArgmaxCall).
#pragma once
#include "elementary.h"
#include "row_vectors.h"

namespace hylora {
namespace {

HYLORA_INLINE V silu(V x) { return x * sigmoid(x); }
HYLORA_INLINE V gelu(V x) { return splat(0.5f) * x * (splat(1.0f) + erf(x * splat(0.707106781f))); }
HYLORA_INLINE V gelu_tanh(V x) {
  const V inner = fma(x * x * x, splat(0.044715f), x) * splat(0.797884561f);
  return splat(0.5f) * x * (splat(1.0f) + tanh(inner));
}
HYLORA_INLINE V relu(V x) { return select(is_less(x, V{}), V{}, x); }
HYLORA_INLINE V softcap(V x, float cap) { return splat(cap) * tanh(x * splat(1.0f / cap)); }

template <class T, class F>
HYLORA_INLINE void activate(const ActivationCall& call, int64_t begin, int64_t end, const F& f) {
  for (int64_t part = begin; part < end; part++) {
    const Columns at(call, part);
    const T* x = static_cast<const T*>(call.x) + at.row * call.ldx + at.first;
    const T* up = static_cast<const T*>(call.up) + at.row * call.ldup + at.first;
    T* y = static_cast<T*>(call.y) + at.row * call.ldy + at.first;
    for (int64_t i = 0; i < at.count; i += W) {
      const int64_t left = at.count - i;
      V v = f(load(x + i, left));
      if (call.up) v *= load(up + i, left);
      store(y + i, v, left);
    }
  }
}

template <class T>
void activation_by(const ActivationCall& call, int64_t begin, int64_t end) {
  switch (call.activation) {
  case Activation::silu:
    return activate<T>(call, begin, end, [](V x) HYLORA_LAMBDA { return silu(x); });
  case Activation::gelu:
    return activate<T>(call, begin, end, [](V x) HYLORA_LAMBDA { return gelu(x); });
  case Activation::gelu_tanh:
    return activate<T>(call, begin, end, [](V x) HYLORA_LAMBDA { return gelu_tanh(x); });
  case Activation::relu:
    return activate<T>(call, begin, end, [](V x) HYLORA_LAMBDA { return relu(x); });
  case Activation::softcap:
    return activate<T>(call, begin, end,
                       [&](V x) HYLORA_LAMBDA { return softcap(x, call.softcap); });
  }
}

// True if a later number takes the place of the best so far.
HYLORA_INLINE bool beats(float value, float best) {
  return value > best || (value != value && best == best);
}

template <class T>
HYLORA_INLINE ArgmaxCall::Best first_nan(const T* x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++)
    if (const float value = to_float(x[i]); value != value) return {value, i};
  return {};
}

// The best of columns [begin, end), at least one.
template <class T>
HYLORA_INLINE ArgmaxCall::Best best_of(const T* x, int64_t begin, int64_t end) {
  ArgmaxCall::Best best{to_float(x[begin]), begin};
  V greatest = splat(best.value);
  VU is_nan = {}, step = {}, at = {};  // at: the step that found a lane's greatest
  int64_t i = begin;
  for (; i + W <= end; i += W, step += 1) {
    const V v = load(x + i);
    const VU is_greater = is_less(greatest, v);
    greatest = select(is_greater, v, greatest);
    at = (is_greater & step) | (~is_greater & at);
    is_nan |= reinterpret_cast<VU>(v != v);
  }
  for (int lane = 0; lane < W; lane++) {
    if (is_nan[lane]) return first_nan(x, begin, end);
    const int64_t column = begin + int64_t(at[lane]) * W + lane;
    if (greatest[lane] > best.value || (greatest[lane] == best.value && column < best.column))
      best = {greatest[lane], column};
  }
  for (; i < end; i++)
    if (const float value = to_float(x[i]); beats(value, best.value)) best = {value, i};
  return best;
}

template <class T>
void argmax_by(const ArgmaxCall& call, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; part++) {
    const int64_t row = part / call.pieces, piece = part % call.pieces;
    call.best[part] =
        best_of(static_cast<const T*>(call.x) + row * call.ldx, call.columns * piece / call.pieces,
                call.columns * (piece + 1) / call.pieces);
  }
}

void join_argmax(const ArgmaxCall& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    ArgmaxCall::Best best = call.best[row * call.pieces];
    for (int64_t i = 1; i < call.pieces; i++)
      if (const auto& other = call.best[row * call.pieces + i]; beats(other.value, best.value))
        best = other;
    call.column[row] = best.column;
  }
}

}  // namespace
}  // namespace hylora
