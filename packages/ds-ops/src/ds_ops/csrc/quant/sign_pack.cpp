#include "quant/sign_pack.h"

#include <cmath>
#include <limits>
#include <vector>

#include "quant/tensors.h"

namespace ds {
namespace {

constexpr const char* kPack = "sign_pack";
constexpr const char* kFeedback = "sign_pack_feedback_";
constexpr const char* kUnpack = "sign_unpack";

// Chunks of a tensor: all of `length`, on whole bytes, or a single one.
struct Chunks {
  int64_t count;
  int64_t length;
  int64_t parts;  // in each
};

Chunks chunks_of(const char* op, int64_t numel, int64_t chunk) {
  STD_TORCH_CHECK(chunk >= 0, op, ": chunk: got ", chunk, ", expected 0 or more");
  if (chunk == 0) chunk = numel;
  if (numel == 0) return Chunks{0, 0, 0};
  STD_TORCH_CHECK(numel % chunk == 0, op, ": chunk: got ", chunk, ", which does not divide the ",
                  numel, " elements");
  STD_TORCH_CHECK(chunk == numel || chunk % 8 == 0, op, ": chunk: got ", chunk,
                  ", expected a multiple of 8, whose signs fill whole bytes");
  return Chunks{numel / chunk, chunk, (chunk + kSignPart - 1) / kSignPart};
}

// `body(chunk, part, begin, count)` for every part of every chunk, by all threads.
template <typename Body>
void for_parts(const Chunks& chunks, const Body& body) {
  const int64_t grain = chunks.parts > 1 ? 4 : 4 * kSignPart / (chunks.length + 1) + 1;
  parallel(chunks.count * chunks.parts, grain, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t chunk = index / chunks.parts;
      const int64_t at = index % chunks.parts * kSignPart;
      const int64_t rest = chunks.length - at;
      body(chunk, index, chunk * chunks.length + at, rest < kSignPart ? rest : kSignPart);
    }
  });
}

// Of a chunk of `length` numbers; NaN if it is not finite.
float scale_of(const double* sums, int64_t parts, int64_t length, bool squares) {
  double sum = 0.0;
  for (int64_t part = 0; part < parts; ++part) sum += sums[part];
  const double mean = sum / static_cast<double>(length);
  const double found = squares ? std::sqrt(mean) : mean;
  return std::isfinite(found) ? static_cast<float>(found)
                              : std::numeric_limits<float>::quiet_NaN();
}

std::tuple<Tensor, Tensor> pack(const char* op, const Tensor& x, const Tensor* error, int64_t chunk,
                                bool squares) {
  check_float(op, "x", x);
  check_plain(op, "x", x);
  const Chunks chunks = chunks_of(op, x.numel(), chunk);
  SignCall call{};
  call.x = x.const_data_ptr();
  call.x_type = element_type(x.scalar_type());
  call.squares = squares;
  if (error != nullptr) {
    check_error(op, *error, shape_of(x), x.scalar_type());
    check_apart(op, "error", *error, "x", x);
    call.error = error->mutable_data_ptr();
    call.error_type = element_type(error->scalar_type());
  }
  Tensor codes = torch::stable::new_empty(x, {(x.numel() + 7) / 8}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(x, {chunks.count}, ScalarType::Float);
  uint8_t* bytes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  float* scale = static_cast<float*>(scales.mutable_data_ptr());
  std::vector<double> sums(static_cast<size_t>(chunks.count * chunks.parts));
  const auto pack_part = DS_BEST(pack_signs);
  const auto update = DS_BEST(update_sign_error);
  // What is not finite leaves the error as it was: the step will be skipped.
  const auto update_part = [&](int64_t index, int64_t, int64_t begin, int64_t count) {
    if (scale[index] == scale[index]) update(call, begin, count, scale[index]);
  };
  for_parts(chunks, [&](int64_t index, int64_t part, int64_t begin, int64_t count) {
    sums[part] = pack_part(call, begin, count, bytes + begin / 8);
    if (chunks.parts > 1) return;
    // The whole chunk is still in the cache.
    scale[index] = scale_of(&sums[part], 1, count, squares);
    if (error != nullptr) update_part(index, part, begin, count);
  });
  if (chunks.parts <= 1) return {codes, scales};
  for (int64_t index = 0; index < chunks.count; ++index) {
    const double* found = &sums[index * chunks.parts];
    scale[index] = scale_of(found, chunks.parts, chunks.length, squares);
  }
  if (error != nullptr) for_parts(chunks, update_part);
  return {codes, scales};
}

std::tuple<Tensor, Tensor> sign_pack(Tensor x, int64_t chunk, bool squares) {
  return pack(kPack, x, nullptr, chunk, squares);
}

std::tuple<Tensor, Tensor> sign_pack_feedback(Tensor x, Tensor error, int64_t chunk, bool squares) {
  return pack(kFeedback, x, &error, chunk, squares);
}

Tensor sign_unpack(Tensor codes, Tensor scales, int64_t numel, ScalarType dtype) {
  check_plain(kUnpack, "codes", codes);
  check_plain(kUnpack, "scales", scales);
  check_dtype(kUnpack, "codes", codes, ScalarType::Byte);
  check_dtype(kUnpack, "scales", scales, ScalarType::Float);
  STD_TORCH_CHECK(numel >= 0 && codes.dim() == 1 && codes.numel() == numel / 8 + (numel % 8 != 0),
                  kUnpack, ": codes: got shape ", shape_text(codes), ", expected [",
                  numel / 8 + (numel % 8 != 0), "] for ", numel, " numbers");
  const int64_t count = scales.numel();
  STD_TORCH_CHECK(scales.dim() == 1 && (count != 0 ? numel % count == 0 : numel == 0), kUnpack,
                  ": scales: got shape ", shape_text(scales), ", expected one per chunk of ", numel,
                  " numbers in all");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  kUnpack, ": dtype: got ", dtype_name(dtype),
                  ", expected torch.float32, torch.bfloat16 or torch.float16");
  const Chunks chunks = chunks_of(kUnpack, numel, count ? numel / count : 0);
  Tensor y = torch::stable::new_empty(codes, {numel}, dtype);
  const uint8_t* bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  const float* scale = static_cast<const float*>(scales.const_data_ptr());
  void* to = y.mutable_data_ptr();
  const auto unpack = DS_BEST(unpack_signs);
  for_parts(chunks, [&](int64_t index, int64_t, int64_t begin, int64_t part) {
    unpack(bytes + begin / 8, to, element_type(dtype), begin, part, scale[index]);
  });
  return y;
}

DS_OP(sign_pack, sign_pack);
DS_OP(sign_pack_feedback_, sign_pack_feedback);
DS_OP(sign_unpack, sign_unpack);

}  // namespace
}  // namespace ds
