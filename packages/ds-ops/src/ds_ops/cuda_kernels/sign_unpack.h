// Numbers of one scale per chunk, with signs that lie eight to a byte.
#pragma once

#include <stdint.h>

#include "common/float_type.h"

namespace ds {

struct SignUnpackCall {
  const uint8_t* codes;  // (numel + 7) / 8
  const float* scales;   // numel / chunk
  void* y;               // numel, aligned to 16 bytes
  FloatType y_type;
  int64_t numel;
  int64_t chunk;  // a multiple of 8, or numel
};

// Puts the kernel on a stream (a cudaStream_t); returns a cudaError_t.
int launch_sign_unpack(const SignUnpackCall& call, void* stream);

}  // namespace ds
