// What an operator's file needs: torch's stable ABI, argument checks, threads, registration.
//
// Not for kernel files: torch's headers must be compiled for the baseline only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common/float_type.h"
#include "common/half.h"
#include "common/isa.h"

namespace ds {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// --- Registration -------------------------------------------------------------------------------

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

// Adds a kernel to the table that `ds_ops_bind` looks into.
struct Register {
  Register(const char* op, Boxed kernel);
};

// DS_OP(rms_norm, function): `function` computes ds_ops::rms_norm on a CPU.
#define DS_OP(op, function) static const ::ds::Register ds_register_##op(#op, TORCH_BOX(&function))

// --- Checks: each names the argument, what it got and what it takes -----------------------------

const char* dtype_name(ScalarType dtype);
std::string shape_text(const Tensor& t);

// Contiguous and on a CPU, or an error.
void check_plain(const char* op, const char* argument, const Tensor& t);
void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType expected);
// One of fp32, bf16, fp16.
void check_float(const char* op, const char* argument, const Tensor& t);
void check_numel(const char* op, const char* argument, const Tensor& t, int64_t expected);
// The two share no byte, from the first element of each to its last: one of them is written.
void check_apart(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                 const Tensor& b);

// --- Element types ------------------------------------------------------------------------------

// Calls `body(T{})` with T = float, bf16 or fp16 as `dtype` says; `check_float` has been called.
template <typename Body>
void with_float(ScalarType dtype, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::BFloat16:
      return body(bf16{});
    default:
      return body(fp16{});
  }
}

// The same for a kernel, which is given a type as a value.
inline FloatType float_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::fp32;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    default:
      return FloatType::fp16;
  }
}

// --- Results ------------------------------------------------------------------------------------

// `fresh`, which nobody has written to yet, asked to lie on large pages if it is large. Above 32 MiB
// malloc takes new memory from the system every time and gives it back; in pages of 4 KiB, getting
// it at the first touch takes longer than most ops. An advice: where it is not taken, nothing else
// changes.
Tensor on_large_pages(Tensor fresh);

inline Tensor result_like(const Tensor& t) { return on_large_pages(torch::stable::empty_like(t)); }

inline Tensor new_result(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
                         std::optional<ScalarType> dtype = std::nullopt) {
  return on_large_pages(torch::stable::new_empty(like, shape, dtype));
}

// --- Threads ------------------------------------------------------------------------------------

// What the first of several threads threw. Torch would carry on the error, but not what it says.
class FirstFailure {
 public:
  template <typename Body>
  void guard(const Body& body) noexcept {
    try {
      body();
    } catch (const std::exception& error) {
      keep(error.what());
    } catch (...) {
      keep("an error that says nothing of itself");
    }
  }
  void rethrow() const {
    if (failed_) throw std::runtime_error(text_);
  }

 private:
  void keep(const char* text) {
    const std::lock_guard<std::mutex> held(mutex_);
    if (!failed_) text_ = text;
    failed_ = true;
  }

  std::mutex mutex_;
  std::string text_;
  bool failed_ = false;
};

// `body(begin, end)` over parts of [0, count), by at most torch.get_num_threads() threads; parts
// are at least `grain` long, begin at multiples of `align` and do not depend on the machine's load.
template <typename Body>
void parallel(int64_t count, int64_t grain, const Body& body, int64_t align = 1) {
  if (count <= 0) return;
  const int64_t blocks = (count + align - 1) / align;
  FirstFailure failure;
  torch::stable::parallel_for(
      0, blocks, grain / align > 0 ? grain / align : 1, [&](int64_t begin, int64_t end) {
        const int64_t stop = end * align;
        failure.guard([&] { body(begin * align, stop < count ? stop : count); });
      });
  failure.rethrow();
}

}  // namespace ds
