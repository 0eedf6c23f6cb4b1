// Cross-entropy of rows of logits, and its gradient, with one read of the logits from memory.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

namespace ds {

struct CrossEntropy {
  const void* logits;      // [rows, classes], of type `type`
  const int64_t* targets;  // [rows]: a class, or `ignored`
  const float* scale;      // what gradients are multiplied by: [1], or [rows] if `scale_per_row`
  float* losses;           // [rows]
  void* gradient;          // [rows, classes], null if there is to be none; may be `logits`
  int64_t classes;
  int64_t ignored;
  float smoothing;  // how much of the target is spread over all classes
  float z_loss;     // times log(sum of exponentials)^2 is added to a loss
  float softcap;    // logits are softcap * tanh(logit / softcap); 0: as they are
  bool scale_per_row;
  FloatType type;
};

// Classes that are worked on at once: as many as fit into the nearest cache.
constexpr int64_t kCrossEntropyBlock = 2048;

// Floats that `cross_entropy_rows` wants as scratch.
inline int64_t cross_entropy_scratch(int64_t classes) {
  return classes + classes / kCrossEntropyBlock + 1;
}

}  // namespace ds

// Rows [begin, end); `scratch` [cross_entropy_scratch(classes)] is the caller's alone.
DS_KERNEL(void, cross_entropy_rows, const CrossEntropy& call, float* scratch, int64_t begin,
          int64_t end)
