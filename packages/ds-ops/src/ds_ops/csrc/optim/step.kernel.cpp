#include "optim/step.h"

#include "common/simd.h"
#include "optim/elementwise.h"

namespace ds {
namespace DS_ISA {
namespace {

// `states` are exp_avg and exp_avg_sq. m moves by a part of the distance, as torch's lerp does.
DS_INLINE void advance_moments(const AdamStep& step, F g, F* states) {
  states[0] = states[0] + (g - states[0]) * step.one_minus_beta1;
  states[1] = states[1] * step.beta2 + g * g * step.one_minus_beta2;
}

struct Adam {
  static constexpr int kStates = 2;
  static constexpr bool kWrites = true;
  AdamStep step;

  inline __attribute__((always_inline)) F operator()(F p, F g, F* states) const {
    if (step.l2 != 0.0f) g += p * step.l2;
    advance_moments(step, g, states);
    const F denominator = square_root(states[1]) * step.root_scale + step.eps;
    return p * step.decay - states[0] * step.step_size / denominator;
  }
};

struct Lion {
  static constexpr int kStates = 1;
  static constexpr bool kWrites = true;
  LionStep step;

  inline __attribute__((always_inline)) F operator()(F p, F g, F* states) const {
    const F mix = states[0] * step.beta1 + g * step.one_minus_beta1;
    states[0] = states[0] * step.beta2 + g * step.one_minus_beta2;
    // 0 and NaN are their own signs.
    const F sign = mix > 0.0f ? splat(1.0f) : mix < 0.0f ? splat(-1.0f) : mix;
    return p * step.decay - sign * step.lr;
  }
};

struct Adagrad {
  static constexpr int kStates = 1;
  static constexpr bool kWrites = true;
  AdagradStep step;

  inline __attribute__((always_inline)) F operator()(F p, F g, F* states) const {
    if (step.l2 != 0.0f) g += p * step.l2;
    states[0] += g * g;
    return p - g * step.lr / (square_root(states[0]) + step.eps);
  }
};

template <bool kMomentum>
struct Sgd {
  static constexpr int kStates = kMomentum;
  static constexpr bool kWrites = true;
  SgdStep step;

  inline __attribute__((always_inline)) F operator()(F p, F g, F* states) const {
    if (step.l2 != 0.0f) g += p * step.l2;
    if (kMomentum) {
      F buffer = g;
      if (!step.first) buffer = states[0] * step.momentum + g * step.one_minus_dampening;
      states[0] = buffer;
      g = step.nesterov ? g + buffer * step.momentum : buffer;
    }
    return p - g * step.lr;
  }
};

struct LambUpdate {
  static constexpr int kStates = 2;
  static constexpr bool kWrites = false;
  AdamStep step;
  F param_squares = {};
  F update_squares = {};

  inline __attribute__((always_inline)) F operator()(F p, F g, F* states) {
    advance_moments(step, g, states);
    const F denominator = square_root(states[1]) * step.root_scale + step.eps;
    const F ratio = states[0] * step.step_size / denominator;
    // Without this 0 / 0 where eps is 0 and a gradient was never other than 0.
    const F update = (states[0] == 0.0f ? F{} : ratio) + p * step.l2;
    param_squares += p * p;
    update_squares += update * update;
    return update;
  }
};

struct LambApply {
  static constexpr int kStates = 0;
  static constexpr bool kWrites = true;
  float factor;

  inline __attribute__((always_inline)) F operator()(F p, F g, F*) const { return p - g * factor; }
};

}  // namespace

void adam_elements(const StepStreams& streams, const AdamStep& step, int64_t begin, int64_t end) {
  Adam rule{step};
  for_elements(streams, rule, begin, end);
}

void lion_elements(const StepStreams& streams, const LionStep& step, int64_t begin, int64_t end) {
  Lion rule{step};
  for_elements(streams, rule, begin, end);
}

void adagrad_elements(const StepStreams& streams, const AdagradStep& step, int64_t begin,
                      int64_t end) {
  Adagrad rule{step};
  for_elements(streams, rule, begin, end);
}

void sgd_elements(const StepStreams& streams, const SgdStep& step, int64_t begin, int64_t end) {
  if (streams.states[0]) {
    Sgd<true> rule{step};
    return for_elements(streams, rule, begin, end);
  }
  Sgd<false> rule{step};
  for_elements(streams, rule, begin, end);
}

void lamb_update_elements(const StepStreams& streams, const AdamStep& step, double* sums,
                          int64_t begin, int64_t end) {
  // Sums in fp32 stay short: a long one would lose what is small beside it.
  constexpr int64_t kSummed = 1024;
  sums[0] = sums[1] = 0;
  for (int64_t i = begin; i < end; i += kSummed) {
    LambUpdate rule{step};
    for_elements(streams, rule, i, i + kSummed < end ? i + kSummed : end);
    sums[0] += sum_of(rule.param_squares);
    sums[1] += sum_of(rule.update_squares);
  }
}

void lamb_apply_elements(const StepStreams& streams, float factor, int64_t begin, int64_t end) {
  LambApply rule{factor};
  for_elements(streams, rule, begin, end);
}

void undo_elements(const StepStreams& s, int states, int64_t begin, int64_t end) {
  // In parts that are still in the first cache when the copy is made of them.
  constexpr int64_t kPart = 4096;
  for (int64_t i = begin; i < end; i += kPart) {
    const int64_t count = end - i < kPart ? end - i : kPart;
    for (int k = 0; k <= states; ++k) {
      const int64_t size = size_of(k ? s.state_type : s.param_type);
      char* to = static_cast<char*>(k ? s.states[k - 1] : s.param);
      memcpy(to + i * size, static_cast<const char*>(s.undo[k]) + i * size, count * size);
    }
    if (!s.copy) continue;
    int64_t j = i;
    for (; j + kWidth <= i + count; j += kWidth)
      store_as(s.copy_type, s.copy, j, load_as(s.param_type, s.param, j));
    if (j < i + count) {
      char from[kWidth * 4] = {}, to[kWidth * 4];
      const int64_t rest = i + count - j;
      const int64_t size = size_of(s.param_type), copy_size = size_of(s.copy_type);
      memcpy(from, static_cast<const char*>(s.param) + j * size, rest * size);
      store_as(s.copy_type, to, 0, load_as(s.param_type, from, 0));
      memcpy(static_cast<char*>(s.copy) + j * copy_size, to, rest * copy_size);
    }
  }
}

}  // namespace DS_ISA
}  // namespace ds
