#include "layers/gated_activation.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

// Of an activation: its value and its derivative.
struct Slope {
  F value, derivative;
};

struct Silu {
  DS_INLINE F value(F v) { return v * sigmoid(v); }
  DS_INLINE Slope slope(F v) {
    const F s = sigmoid(v);
    const F y = v * s;
    return {y, s + y * (1.0f - s)};
  }
};

struct Gelu {
  DS_INLINE F value(F v) { return v * normal(v).below; }
  DS_INLINE Slope slope(F v) {
    const Normal n = normal(v);
    return {v * n.below, n.below + v * n.density};
  }
};

// 0.5 v (1 + tanh(u)) with u = sqrt(2 / pi) (v + 0.044715 v^3); that is v sigmoid(2 u).
struct GeluTanh {
  static constexpr float kTwice = 1.5957691216f, kCubic = 0.0713548162726f;
  DS_INLINE F value(F v) { return v * sigmoid(v * (kTwice + v * v * kCubic)); }
  DS_INLINE Slope slope(F v) {
    const F square = v * v;
    const F s = sigmoid(v * (kTwice + square * kCubic));
    const F y = v * s;
    return {y, s + y * (1.0f - s) * (kTwice + square * (3.0f * kCubic))};
  }
};

template <typename T, typename Act>
void forward(const GatedForward& span, int64_t count) {
  const T* gate = static_cast<const T*>(span.gate);
  const T* up = static_cast<const T*>(span.up);
  T* y = static_cast<T*>(span.y);
  for_vectors(count, [&](int64_t i, auto part) {
    store(y + i, Act::value(load(gate + i, part)) * load(up + i, part), part);
  });
}

template <typename T, typename Act>
void backward(const GatedBackward& span, int64_t count) {
  const T* grad = static_cast<const T*>(span.grad);
  const T* gate = static_cast<const T*>(span.gate);
  const T* up = static_cast<const T*>(span.up);
  T* dgate = static_cast<T*>(span.dgate);
  T* dup = static_cast<T*>(span.dup);
  for_vectors(count, [&](int64_t i, auto part) {
    const F g = load(grad + i, part);
    const Slope act = Act::slope(load(gate + i, part));
    const F u = load(up + i, part);
    store(dgate + i, g * u * act.derivative, part);
    store(dup + i, g * act.value, part);
  });
}

template <typename Act>
void forward_of(const GatedForward& span, int64_t count, FloatType type) {
  by_float_type(type, [&](auto as) { forward<decltype(as), Act>(span, count); });
}

template <typename Act>
void backward_of(const GatedBackward& span, int64_t count, FloatType type) {
  by_float_type(type, [&](auto as) { backward<decltype(as), Act>(span, count); });
}

}  // namespace

void gated_activation_span(const GatedForward& span, int64_t count, Activation activation,
                           FloatType type) {
  switch (activation) {
    case Activation::silu:
      return forward_of<Silu>(span, count, type);
    case Activation::gelu:
      return forward_of<Gelu>(span, count, type);
    case Activation::gelu_tanh:
      return forward_of<GeluTanh>(span, count, type);
  }
}

void gated_activation_backward_span(const GatedBackward& span, int64_t count,
                                    Activation activation, FloatType type) {
  switch (activation) {
    case Activation::silu:
      return backward_of<Silu>(span, count, type);
    case Activation::gelu:
      return backward_of<Gelu>(span, count, type);
    case Activation::gelu_tanh:
      return backward_of<GeluTanh>(span, count, type);
  }
}

}  // namespace DS_ISA
}  // namespace ds
