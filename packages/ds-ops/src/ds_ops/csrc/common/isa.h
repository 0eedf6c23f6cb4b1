// Choosing, when a kernel is called, the code for the best instruction set that this processor has.
//
//   // rms_norm.h: for the kernel file and for the operator's file
//   DS_KERNEL(void, rms_norm_rows, const RmsNormRows&);
//
//   // rms_norm.kernel.cpp, compiled once per instruction set
//   namespace ds::DS_ISA { void rms_norm_rows(const RmsNormRows& rows) { ... } }
//
//   // rms_norm.cpp
//   DS_BEST(rms_norm_rows)(rows);
//
// DS_OPS_ISA=baseline|avx2|avx512 in the environment lowers the choice, for tests.
#pragma once

namespace ds {

enum class Isa { baseline, avx2, avx512 };

// The best that the processor has and that DS_OPS_ISA does not exclude; found once.
Isa isa();
const char* isa_name();

}  // namespace ds

#if defined(__x86_64__)
#define DS_KERNEL(result, name, ...)                 \
  namespace ds::baseline { result name(__VA_ARGS__); } \
  namespace ds::avx2 { result name(__VA_ARGS__); }     \
  namespace ds::avx512 { result name(__VA_ARGS__); }
#define DS_BEST(name)                                              \
  (::ds::isa() == ::ds::Isa::avx512 ? &::ds::avx512::name          \
   : ::ds::isa() == ::ds::Isa::avx2 ? &::ds::avx2::name            \
                                    : &::ds::baseline::name)
#else
#define DS_KERNEL(result, name, ...) \
  namespace ds::baseline { result name(__VA_ARGS__); }
#define DS_BEST(name) (&::ds::baseline::name)
#endif
