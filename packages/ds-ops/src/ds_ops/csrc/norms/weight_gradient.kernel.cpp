#include "norms/weight_gradient.h"

#include "common/simd.h"

namespace ds {
namespace DS_ISA {

void add_up_parts(const float* sums, int64_t parts, int64_t stride, float* total, int64_t begin,
                  int64_t end) {
  for_vectors(end - begin, [&](int64_t i, auto vector) {
    F found = {};
    for (int64_t part = 0; part < parts; ++part) {
      found += load(sums + part * stride + begin + i, vector);
    }
    store(total + begin + i, found, vector);
  });
}

}  // namespace DS_ISA
}  // namespace ds
