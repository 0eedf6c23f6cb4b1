// What operators in CUDA share: the stream, the device, errors of a launch.
#pragma once

#include "common/op.h"

namespace ds {

// The stream that torch computes on at present (a cudaStream_t). It is asked by a function of
// libtorch_cuda that is looked up when it is needed: a library that names it does not load where
// torch is built without CUDA, and as a weak symbol it would be null where torch has it.
void* current_stream(const char* op, int32_t device);

// Contiguous, on a GPU, and on that of `first`, or an error.
void check_on_gpu(const char* op, const char* argument, const Tensor& t, const Tensor& first);

// Throws what a cudaError_t says, if it is an error.
void check_launch(const char* op, int code);

}  // namespace ds
