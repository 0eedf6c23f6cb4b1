#include "moe/moe_gate.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

constexpr float kNone = -__builtin_inff();

DS_INLINE I lane_numbers() {
  I lanes;
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane;
  return lanes;
}

// e^v of v <= 0: 0 below the smallest normal number, NaN of NaN.
DS_INLINE F power_of(F v) {
  const F power = v < -87.0f ? F{} : exponential(v);
  return v == v ? power : v;
}

// The position of the largest of `count` numbers, the first of equal ones; there is no NaN. Numbers
// behind the end, up to a whole vector, are -inf.
int64_t largest_of(const float* values, int64_t count) {
  F best = load(values);
  I at = lane_numbers();
  I lane = at;
  for (int64_t i = kWidth; i < count; i += kWidth) {
    const F v = load(values + i);
    lane += kWidth;
    const I better = (I)(v > best);
    best = better ? v : best;
    at = better ? lane : at;
  }
  float value = best[0];
  int32_t found = at[0];
  for (int i = 1; i < kWidth; ++i) {
    if (best[i] > value || (best[i] == value && at[i] < found)) {
      value = best[i];
      found = at[i];
    }
  }
  return found < count ? found : 0;
}

// The probabilities of one token, and in `scores` what experts are chosen by: the logits where that
// is the same order, as rounding makes no ties among them.
template <typename T>
void probabilities_of(const MoeGate& call, const T* logits, float* probabilities, float* scores) {
  const int64_t experts = call.experts;
  F best = splat(kNone);
  for (int64_t i = 0; i < experts; i += kWidth) {
    const int rest = experts - i < kWidth ? experts - i : kWidth;
    F v = rest == kWidth ? load(logits + i) : load_some(logits + i, rest);
    if (rest < kWidth) v = lane_numbers() < rest ? v : splat(kNone);
    store(scores + i, v);
    best = v > best ? v : best;
  }
  const float largest = max_of(best);
  F sum = {};
  for (int64_t i = 0; i < experts; i += kWidth) {
    const int rest = experts - i < kWidth ? experts - i : kWidth;
    const F v = load(scores + i);
    F p;
    if (call.sigmoid) {
      const F power = power_of(-absolute(v));
      p = (v < 0.0f ? power : splat(1.0f)) / (1.0f + power);
    } else {
      p = power_of(v - largest);
      sum += lane_numbers() < rest ? p : F{};
    }
    if (rest == kWidth) {
      store(probabilities + i, p);
    } else {
      store_some(probabilities + i, p, rest);
    }
  }
  if (!call.sigmoid) {
    const float factor = 1.0f / sum_of(sum);
    int64_t i = 0;
    for (; i + kWidth <= experts; i += kWidth) {
      store(probabilities + i, load(probabilities + i) * factor);
    }
    for (; i < experts; ++i) probabilities[i] *= factor;
  }
  if (call.bias == nullptr && call.groups == 1) {
    for (int64_t i = 0; i < experts; i += kWidth) {
      const F v = load(scores + i);
      store(scores + i, v == v ? v : splat(kNone));
    }
    return;
  }
  for (int64_t i = 0; i < experts; ++i) {
    const float score = probabilities[i] + (call.bias ? call.bias[i] : 0.0f);
    scores[i] = score == score ? score : kNone;
  }
}

// Leaves the experts of the `top_groups` best groups; a group's score is the sum of its two best.
void keep_groups(const MoeGate& call, float* scores, float* groups) {
  const int64_t size = call.experts / call.groups;
  for (int64_t i = 0; i < call.groups; i += kWidth) store(groups + i, splat(kNone));
  for (int64_t group = 0; group < call.groups; ++group) {
    float first = kNone, second = kNone;
    for (int64_t i = group * size; i < (group + 1) * size; ++i) {
      const float score = scores[i];
      if (score > first) {
        second = first;
        first = score;
      } else if (score > second) {
        second = score;
      }
    }
    const float sum = size == 1 ? first : first + second;
    groups[group] = sum == sum ? sum : kNone;
  }
  // A group that is kept is marked by a NaN, which is larger than nothing.
  for (int64_t kept = 0; kept < call.top_groups; ++kept) {
    int64_t best = -1;
    for (int64_t group = 0; group < call.groups; ++group) {
      if (groups[group] == groups[group] && (best < 0 || groups[group] > groups[best])) best = group;
    }
    groups[best] = __builtin_nanf("");
  }
  for (int64_t i = 0; i < call.experts; ++i) {
    if (groups[i / size] == groups[i / size]) scores[i] = kNone;
  }
}

// The experts with the largest scores into `indices`; one that is chosen has -inf from then on. When
// only -inf is left, it is the first that is not chosen, in the groups that are kept.
void choose(const MoeGate& call, float* scores, const float* groups, int32_t* indices) {
  const int64_t size = call.experts / call.groups;
  for (int64_t slot = 0; slot < call.k; ++slot) {
    int64_t best = largest_of(scores, call.experts);
    if (!(scores[best] > kNone)) {
      for (best = 0; best < call.experts; ++best) {
        const bool kept = call.groups == 1 || groups[best / size] != groups[best / size];
        bool taken = false;
        for (int64_t i = 0; i < slot; ++i) taken |= indices[i] == best;
        if (kept && !taken) break;
      }
    }
    indices[slot] = (int32_t)best;
    scores[best] = kNone;
  }
}

template <typename T>
void forward(const MoeGate& call, int64_t begin, int64_t end, int32_t* counts, float* scores) {
  float* groups = scores + (call.experts + 15) / 16 * 16;
  for (int64_t token = begin; token < end; ++token) {
    float* probabilities = call.probabilities + token * call.experts;
    float* weights = call.weights + token * call.k;
    int32_t* indices = call.indices + token * call.k;
    probabilities_of(call, static_cast<const T*>(call.logits) + token * call.experts, probabilities,
                     scores);
    if (call.groups > 1) keep_groups(call, scores, groups);
    choose(call, scores, groups, indices);
    float total = 0.0f;
    for (int64_t slot = 0; slot < call.k; ++slot) {
      weights[slot] = probabilities[indices[slot]];
      total += weights[slot];
      counts[indices[slot]] += 1;
    }
    const float factor = call.normalize ? call.scale / (total + kGateTiny) : call.scale;
    for (int64_t slot = 0; slot < call.k; ++slot) weights[slot] *= factor;
  }
}

// With p the probabilities and s their sum over what was chosen, w = scale p / (s + tiny):
// dp = scale / (s + tiny) (dw - sum(dw p) / (s + tiny)); then through softmax or sigmoid.
template <typename T>
void backward(const MoeGateBackward& call, int64_t begin, int64_t end, float* grad) {
  const int64_t experts = call.experts;
  for (int64_t token = begin; token < end; ++token) {
    const float* p = call.probabilities + token * experts;
    const int32_t* indices = call.indices + token * call.k;
    T* to = static_cast<T*>(call.grad_logits) + token * experts;
    if (call.grad_probabilities != nullptr) {
      memcpy(grad, call.grad_probabilities + token * experts, experts * sizeof(float));
    } else {
      memset(grad, 0, experts * sizeof(float));
    }
    if (call.grad_weights != nullptr) {
      const float* dw = call.grad_weights + token * call.k;
      float total = 0.0f, inner = 0.0f;
      for (int64_t slot = 0; slot < call.k; ++slot) {
        total += p[indices[slot]];
        inner += dw[slot] * p[indices[slot]];
      }
      const float factor = call.normalize ? call.scale / (total + kGateTiny) : call.scale;
      const float mean = call.normalize ? inner / (total + kGateTiny) : 0.0f;
      for (int64_t slot = 0; slot < call.k; ++slot) {
        grad[indices[slot]] += factor * (dw[slot] - mean);
      }
    }
    F sum = {};
    for (int64_t i = 0; i < experts && !call.sigmoid; i += kWidth) {
      const int rest = experts - i < kWidth ? experts - i : kWidth;
      const F v = rest == kWidth ? load(p + i) * load(grad + i)
                                 : load_some(p + i, rest) * load_some(grad + i, rest);
      sum += v;
    }
    const float inner = sum_of(sum);
    for (int64_t i = 0; i < experts; i += kWidth) {
      const int rest = experts - i < kWidth ? experts - i : kWidth;
      const F v = rest == kWidth ? load(p + i) : load_some(p + i, rest);
      const F g = rest == kWidth ? load(grad + i) : load_some(grad + i, rest);
      const F result = call.sigmoid ? v * (1.0f - v) * g : v * (g - inner);
      if (rest == kWidth) {
        store(to + i, result);
      } else {
        store_some(to + i, result, rest);
      }
    }
  }
}

}  // namespace

void moe_gate_rows(const MoeGate& call, int64_t begin, int64_t end, int32_t* counts,
                   float* scratch) {
  by_float_type(call.type,
                [&](auto as) { forward<decltype(as)>(call, begin, end, counts, scratch); });
}

void moe_gate_backward_rows(const MoeGateBackward& call, int64_t begin, int64_t end,
                            float* scratch) {
  by_float_type(call.type, [&](auto as) { backward<decltype(as)>(call, begin, end, scratch); });
}

}  // namespace DS_ISA
}  // namespace ds
