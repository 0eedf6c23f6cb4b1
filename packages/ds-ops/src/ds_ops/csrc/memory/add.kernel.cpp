#include "memory/add.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

template <typename T>
void add(const void* const* from, int ranks, void* to_bytes, void* also_bytes, int64_t count) {
  const T* first = static_cast<const T*>(from[0]);
  const T* second = static_cast<const T*>(from[1]);
  T* to = static_cast<T*>(to_bytes);
  T* also = static_cast<T*>(also_bytes);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    F sum = load(first + i) + load(second + i);
    for (int rank = 2; rank < ranks; ++rank) sum += load(static_cast<const T*>(from[rank]) + i);
    store(to + i, sum);
    store(also + i, sum);
  }
  if (i == count) return;
  const int rest = static_cast<int>(count - i);
  F sum = load_some(first + i, rest) + load_some(second + i, rest);
  for (int rank = 2; rank < ranks; ++rank) {
    sum += load_some(static_cast<const T*>(from[rank]) + i, rest);
  }
  store_some(to + i, sum, rest);
  store_some(also + i, sum, rest);
}

}  // namespace

void add_ranks(const void* const* from, int ranks, void* to, void* also, int64_t count,
               FloatType type) {
  by_float_type(type, [&](auto as) { add<decltype(as)>(from, ranks, to, also, count); });
}

}  // namespace DS_ISA
}  // namespace ds
