#include "common/isa.h"

#include <cstdlib>
#include <cstring>

namespace ds {
namespace {

Isa find() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  Isa best = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
  }
  if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    best = Isa::avx512;
  }
  const char* limit = std::getenv("DS_OPS_ISA");
  if (limit != nullptr && std::strcmp(limit, "baseline") == 0) return Isa::baseline;
  if (limit != nullptr && std::strcmp(limit, "avx2") == 0 && best == Isa::avx512) {
    return Isa::avx2;
  }
  return best;
#else
  return Isa::baseline;
#endif
}

}  // namespace

Isa isa() {
  static const Isa found = find();
  return found;
}

const char* isa_name() {
#if defined(__aarch64__)
  return "neon";
#else
  switch (isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
#endif
}

}  // namespace ds

extern "C" __attribute__((visibility("default"))) const char* ds_ops_isa() {
  return ds::isa_name();
}
