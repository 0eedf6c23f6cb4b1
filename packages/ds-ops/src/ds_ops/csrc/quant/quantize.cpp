#include "quant/quantize.h"

#include <vector>

#include "quant/tensors.h"

namespace ds {
namespace {

constexpr const char* kQuantize = "quantize_blocks";
constexpr const char* kFeedback = "quantize_feedback_";
constexpr const char* kDequantize = "dequantize_blocks";
constexpr const char* kReduce = "quantized_reduce";
constexpr const char* kReduceFeedback = "quantized_reduce_feedback_";
// Parts of fewer numbers than this cost more to hand to a thread than to compute.
constexpr int64_t kGrain = 16384;
// Places in a block are numbered with 32 bits.
constexpr int64_t kLongestBlock = int64_t{1} << 31;

// --- Formats ------------------------------------------------------------------------------------

// In the order of `FORMATS` in ds_core/ops/block_format.py: bits, bits of the exponent (0: an
// integer), codes at the top that are infinity or NaN.
struct FormatRow {
  int bits;
  int exponent;
  int specials;
};
constexpr FormatRow kFormats[] = {{8, 0, 0}, {4, 0, 0}, {8, 4, 1}, {8, 5, 4},
                                  {6, 3, 0}, {6, 2, 0}, {4, 2, 0}, {12, 4, 0}};
constexpr int64_t kNumFormats = sizeof kFormats / sizeof kFormats[0];

BlockFormat block_format(const char* op, int64_t number, bool symmetric) {
  STD_TORCH_CHECK(number >= 0 && number < kNumFormats, op, ": format: got ", number,
                  ", expected 0 to ", kNumFormats - 1);
  const FormatRow& row = kFormats[number];
  BlockFormat format{};
  format.bits = row.bits;
  format.is_float = row.exponent > 0;
  format.symmetric = symmetric;
  if (!format.is_float) {
    const int half = 1 << (row.bits - 1);
    format.lowest = symmetric ? 1 - half : 0;
    format.highest = symmetric ? half - 1 : 2 * half - 1;
    format.inverse_max = static_cast<float>(1.0 / format.highest);
    return format;
  }
  STD_TORCH_CHECK(symmetric, op, ": symmetric: got False, which is for int8 and int4 only");
  const int bias = (1 << (row.exponent - 1)) - 1;
  format.mantissa = row.bits - 1 - row.exponent;
  format.min_exponent = 1 - bias;
  const int codes = 1 << (row.bits - 1);
  format.largest_code = codes - 1 - row.specials;
  format.special_code = row.specials ? codes - row.specials : 1 << row.bits;
  const int units = (format.largest_code & ((1 << format.mantissa) - 1)) + (1 << format.mantissa);
  const int exponent = (format.largest_code >> format.mantissa) - bias - format.mantissa;
  format.inverse_max = static_cast<float>(1.0 / __builtin_ldexp(units, exponent));
  return format;
}

// --- Checks -------------------------------------------------------------------------------------

// Returns the blocks in a row of `width` numbers.
int64_t check_block(const char* op, int64_t block, int64_t width, const BlockFormat& format) {
  STD_TORCH_CHECK(block >= 1 && block < kLongestBlock, op, ": block: got ", block,
                  ", expected 1 to 2^31 - 1");
  STD_TORCH_CHECK(block * format.bits % 8 == 0, op, ": block: got ", block,
                  ", whose codes of ", format.bits, " bits do not fill whole bytes");
  STD_TORCH_CHECK(width % block == 0, op, ": block: got ", block,
                  ", which does not divide the last dimension, ", width);
  return width / block;
}

void check_swizzle(const char* op, int64_t outer, int64_t inner, int64_t blocks) {
  constexpr int64_t most = 1 << 20;
  STD_TORCH_CHECK(outer >= 1 && inner >= 1 && outer <= most && inner <= most, op,
                  ": swizzle: got (", outer, ", ", inner, "), expected two positive numbers");
  STD_TORCH_CHECK(blocks % (outer * inner) == 0, op, ": swizzle: got (", outer, ", ", inner,
                  "), whose product does not divide the ", blocks, " blocks");
}

void check_beta(const char* op, double beta) {
  STD_TORCH_CHECK(beta >= 0 && beta < 1, op, ": beta: got ", beta, ", expected 0 <= beta < 1");
}

// Scales (or zeros) are one fp32 number per block of the codes: [..., blocks in a row].
void check_per_block(const char* op, const char* argument, const Tensor& t, const Tensor& codes,
                     int64_t blocks) {
  check_plain(op, argument, t);
  check_dtype(op, argument, t, ScalarType::Float);
  bool fits = t.dim() == codes.dim() && t.size(t.dim() - 1) == blocks;
  for (int64_t dim = 0; fits && dim + 1 < t.dim(); ++dim) fits = t.size(dim) == codes.size(dim);
  STD_TORCH_CHECK(fits, op, ": ", argument, ": got shape ", shape_text(t),
                  ", expected [..., ", blocks, "], one number per block of codes of shape ",
                  shape_text(codes));
}

// Quantized numbers as an operator gets them. Returns the numbers in a row.
int64_t check_quantized(const char* op, const Tensor& codes, const Tensor& scales,
                        const std::optional<Tensor>& zeros, const BlockFormat& format,
                        int64_t block) {
  check_plain(op, "codes", codes);
  check_dtype(op, "codes", codes, ScalarType::Byte);
  STD_TORCH_CHECK(codes.dim() >= 1, op, ": codes: got a scalar, expected [..., bytes]");
  check_block(op, block, block, format);
  const int64_t bytes = codes.size(codes.dim() - 1);
  const int64_t block_bytes = block * format.bits / 8;
  STD_TORCH_CHECK(bytes % block_bytes == 0, op, ": codes: got rows of ", bytes,
                  " bytes, expected a multiple of the ", block_bytes, " bytes of a block of ",
                  block);
  check_per_block(op, "scales", scales, codes, bytes / block_bytes);
  if (zeros.has_value()) check_per_block(op, "zeros", *zeros, codes, bytes / block_bytes);
  return bytes / block_bytes * block;
}

// --- Quantizing ---------------------------------------------------------------------------------

using Quantized = std::tuple<Tensor, Tensor, Tensor>;

// What was lost before is added, and what is lost now is kept: `error` has been checked.
void feed_back(QuantizeCall& call, const Tensor& error, double beta) {
  call.error = error.mutable_data_ptr();
  call.error_type = element_type(error.scalar_type());
  call.beta = static_cast<float>(beta);
}

// Makes the results, of x's shape `shape`, and fills them. `call` says what is quantized.
Quantized quantized(QuantizeCall& call, const Tensor& like, std::vector<int64_t> shape,
                    const BlockFormat& format, int64_t block, std::optional<int64_t> seed) {
  int64_t blocks = 1;
  for (const int64_t size : shape) blocks *= size;
  const int64_t width = shape.back();
  shape.back() = width / block * (block * format.bits / 8);
  Tensor codes = new_result(like, shape, ScalarType::Byte);
  shape.back() = width / block;
  Tensor scales = torch::stable::new_empty(like, shape, ScalarType::Float);
  const std::vector<int64_t> none{0};
  Tensor zeros =
      torch::stable::new_empty(like, format.symmetric ? none : shape, ScalarType::Float);
  call.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  call.scales = static_cast<float*>(scales.mutable_data_ptr());
  call.zeros = format.symmetric ? nullptr : static_cast<float*>(zeros.mutable_data_ptr());
  call.format = format;
  call.block = block;
  call.blocks = blocks / block;
  call.stochastic = seed.has_value();
  call.seed = static_cast<uint64_t>(seed.value_or(0));
  const auto kernel = DS_BEST(quantize_blocks);
  parallel(call.blocks, kGrain / block + 1,
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {codes, scales, zeros};
}

Quantized quantize(const char* op, const Tensor& x, const Tensor* error, double beta,
                   int64_t format, int64_t block, bool symmetric, std::optional<int64_t> seed,
                   int64_t outer, int64_t inner) {
  check_float(op, "x", x);
  check_plain(op, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x: got a scalar, expected [..., d]");
  const BlockFormat found = block_format(op, format, symmetric);
  check_block(op, block, x.size(x.dim() - 1), found);
  check_swizzle(op, outer, inner, x.numel() / block);
  QuantizeCall call{};
  if (error != nullptr) {
    check_beta(op, beta);
    check_error(op, *error, shape_of(x), x.scalar_type());
    check_apart(op, "error", *error, "x", x);
    feed_back(call, *error, beta);
  }
  call.x = x.const_data_ptr();
  call.x_type = element_type(x.scalar_type());
  call.outer = outer;
  call.inner = inner;
  return quantized(call, x, shape_of(x), found, block, seed);
}

Quantized quantize_blocks(Tensor x, int64_t format, int64_t block, bool symmetric,
                          std::optional<int64_t> seed, int64_t outer, int64_t inner) {
  return quantize(kQuantize, x, nullptr, 0.0, format, block, symmetric, seed, outer, inner);
}

Quantized quantize_feedback(Tensor x, Tensor error, double beta, int64_t format, int64_t block,
                            bool symmetric, std::optional<int64_t> seed, int64_t outer,
                            int64_t inner) {
  return quantize(kFeedback, x, &error, beta, format, block, symmetric, seed, outer, inner);
}

// --- Adding up ----------------------------------------------------------------------------------

Quantized reduce(const char* op, const Tensor& codes, const Tensor& scales,
                 const std::optional<Tensor>& zeros, const Tensor* error, double beta,
                 int64_t format, int64_t block, bool mean, int64_t to_format, bool to_symmetric,
                 std::optional<int64_t> seed) {
  const BlockFormat from = block_format(op, format, !zeros.has_value());
  const BlockFormat to = block_format(op, to_format, to_symmetric);
  const int64_t width = check_quantized(op, codes, scales, zeros, from, block);
  STD_TORCH_CHECK(codes.dim() >= 2 && codes.size(0) >= 1, op, ": codes: got shape ",
                  shape_text(codes), ", expected [ranks, ..., bytes] of one rank or more");
  check_block(op, block, width, to);
  const int64_t ranks = codes.size(0);
  std::vector<int64_t> shape = shape_of(codes);
  shape.erase(shape.begin());
  shape.back() = width;
  QuantizeCall call{};
  call.pieces.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  call.pieces.scales = static_cast<const float*>(scales.const_data_ptr());
  call.pieces.zeros =
      zeros.has_value() ? static_cast<const float*>(zeros->const_data_ptr()) : nullptr;
  call.pieces.format = from;
  call.pieces.ranks = ranks;
  call.pieces.factor = mean ? static_cast<float>(1.0 / static_cast<double>(ranks)) : 1.0f;
  if (error != nullptr) {
    check_beta(op, beta);
    check_error(op, *error, shape, ScalarType::Float);
    check_apart(op, "error", *error, "codes", codes);
    check_apart(op, "error", *error, "scales", scales);
    if (zeros.has_value()) check_apart(op, "error", *error, "zeros", *zeros);
    feed_back(call, *error, beta);
  }
  call.outer = call.inner = 1;
  return quantized(call, codes, shape, to, block, seed);
}

Quantized quantized_reduce(Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                           int64_t format, int64_t block, bool mean, int64_t to_format,
                           bool to_symmetric, std::optional<int64_t> seed) {
  return reduce(kReduce, codes, scales, zeros, nullptr, 0.0, format, block, mean, to_format,
                to_symmetric, seed);
}

Quantized quantized_reduce_feedback(Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                                    Tensor error, double beta, int64_t format, int64_t block,
                                    bool mean, int64_t to_format, bool to_symmetric,
                                    std::optional<int64_t> seed) {
  return reduce(kReduceFeedback, codes, scales, zeros, &error, beta, format, block, mean,
                to_format, to_symmetric, seed);
}

// --- Dequantizing -------------------------------------------------------------------------------

void check_finite(const char* argument, const Tensor& t) {
  const int64_t at =
      DS_BEST(first_not_finite)(static_cast<const float*>(t.const_data_ptr()), t.numel());
  STD_TORCH_CHECK(at == t.numel(), kDequantize, ": ", argument, ": block ", at, " of ", t.numel(),
                  " has one that is NaN or infinite: what was quantized there was not finite (or "
                  "these are not its ", argument, "); with propagate=True such blocks become NaN");
}

Tensor dequantize_blocks(Tensor codes, Tensor scales, std::optional<Tensor> zeros, int64_t format,
                         int64_t block, ScalarType dtype, bool propagate) {
  const BlockFormat found = block_format(kDequantize, format, !zeros.has_value());
  const int64_t width = check_quantized(kDequantize, codes, scales, zeros, found, block);
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  kDequantize, ": dtype: got ", dtype_name(dtype),
                  ", expected torch.float32, torch.bfloat16 or torch.float16");
  if (!propagate) {
    check_finite("scales", scales);
    if (zeros.has_value()) check_finite("zeros", *zeros);
  }
  std::vector<int64_t> shape = shape_of(codes);
  shape.back() = width;
  Tensor y = new_result(codes, shape, dtype);
  const DequantizeCall call{
      static_cast<const uint8_t*>(codes.const_data_ptr()),
      static_cast<const float*>(scales.const_data_ptr()),
      zeros.has_value() ? static_cast<const float*>(zeros->const_data_ptr()) : nullptr,
      y.mutable_data_ptr(),
      element_type(dtype),
      found,
      block};
  const auto kernel = DS_BEST(dequantize_blocks);
  parallel(scales.numel(), kGrain / block + 1,
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return y;
}

DS_OP(quantize_blocks, quantize_blocks);
DS_OP(quantize_feedback_, quantize_feedback);
DS_OP(quantized_reduce, quantized_reduce);
DS_OP(quantized_reduce_feedback_, quantized_reduce_feedback);
DS_OP(dequantize_blocks, dequantize_blocks);

}  // namespace
}  // namespace ds
