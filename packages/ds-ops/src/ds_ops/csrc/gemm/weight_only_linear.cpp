#include "gemm/weight_only_linear.h"

#include <vector>

#include "gemm/products.h"

namespace ds {
namespace {

constexpr const char* kOp = "weight_only_linear";
// More rows than this are multiplied by torch's matrix product, with tiles of the weight as a
// matrix: the small kernel decodes the weight anew for every few rows.
constexpr int64_t kFewRows = 32;
// Elements of such a tile: about what the second-level cache holds.
constexpr int64_t kTile = 1 << 18;

WeightFormat format_of(const Tensor& codes, int64_t bits) {
  STD_TORCH_CHECK(bits == 8 || bits == 6 || bits == 4, kOp, ": bits: got ", bits,
                  ", expected 8, 6 or 4");
  if (bits == 8 && codes.scalar_type() == ScalarType::Byte) return WeightFormat::fp8;
  check_dtype(kOp, "codes", codes, bits == 8 ? ScalarType::Char : ScalarType::Int);
  return bits == 8 ? WeightFormat::int8 : bits == 4 ? WeightFormat::int4 : WeightFormat::fp6;
}

PackedWeight packed(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
                    int64_t outputs, int64_t depth, int64_t bits) {
  const WeightFormat format = format_of(codes, bits);
  check_plain(kOp, "codes", codes);
  check_plain(kOp, "scales", scales);
  check_float(kOp, "scales", scales);
  STD_TORCH_CHECK(outputs >= 1, kOp, ": outputs: got ", outputs, ", expected 1 or more");
  const int64_t blocks = (outputs + kBlock - 1) / kBlock;
  STD_TORCH_CHECK(scales.dim() == 3 && scales.size(0) == blocks &&
                      scales.size(1) >= 1 && scales.size(2) == kBlock,
                  kOp, ": scales: got shape ", shape_text(scales), ", expected [", blocks,
                  ", groups, 16] for ", outputs, " outputs");
  const int64_t groups = scales.size(1);
  STD_TORCH_CHECK(depth >= kBlock && depth % groups == 0 && depth / groups % kBlock == 0, kOp,
                  ": scales: ", groups, " groups do not divide ", depth,
                  " inputs into groups of a multiple of 16");
  const int64_t words = bits == 8 ? depth * kBlock : depth * bits / 2;
  STD_TORCH_CHECK(codes.numel() == blocks * words, kOp, ": codes: got shape ", shape_text(codes),
                  ", which is not that of ", outputs, " outputs of ", depth, " inputs in ", bits,
                  " bits");
  if (zeros) {
    check_plain(kOp, "zeros", *zeros);
    check_dtype(kOp, "zeros", *zeros, scales.scalar_type());
    check_numel(kOp, "zeros", *zeros, scales.numel());
  }
  return {codes.const_data_ptr(),
          scales.const_data_ptr(),
          zeros ? zeros->const_data_ptr() : nullptr,
          outputs,
          depth,
          depth / groups,
          format,
          float_type(scales)};
}

// Few rows: each weight is read once, and decoded for every row.
void multiply_few(const PackedWeight& weight, const Tensor& x, const void* bias, Tensor& y,
                  int64_t rows) {
  std::vector<float> prepared(static_cast<size_t>(rows * weight.depth));
  std::vector<float> sums(static_cast<size_t>(rows * weight.groups()));
  DS_BEST(prepare_rows)
  ({x.const_data_ptr(), prepared.data(), sums.data(), weight.depth, weight.group, weight.format,
    float_type(x)},
   0, rows);
  const WeightOnlyLinear call{weight, prepared.data(),       sums.data(), bias,
                              y.mutable_data_ptr(), rows, float_type(y)};
  const auto kernel = DS_BEST(weight_only_linear_blocks);
  const int64_t blocks = (weight.outputs + kBlock - 1) / kBlock;
  // A part takes some ten microseconds, or waking a thread for it costs more than it saves.
  const int64_t grain = (1 << 17) / (weight.depth * kBlock) + 1;
  // In pairs, as the kernel takes them: the order of its sums must not depend on the threads.
  parallel(blocks, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); }, 2);
}

// y = x W^T or, transposed, y = x W, by tiles of W: of some outputs, or of some inputs. Each is one
// thread's, so that the result does not depend on their number.
void multiply_many(const PackedWeight& weight, const Tensor& x, Tensor& y, int64_t rows,
                   bool transposed) {
  const ScalarType work = product_dtype(x.scalar_type());
  const int64_t across = transposed ? weight.outputs : weight.depth;
  const int64_t along = transposed ? weight.depth : weight.outputs;
  const Tensor x2 = torch::stable::to(torch::stable::view(x, {rows, across}), work);
  Tensor y2 = torch::stable::view(y, {rows, along});
  const int64_t tile = (kTile / across / kBlock + 1) * kBlock;
  const auto kernel = DS_BEST(dequantize_blocks);
  parallel((along + tile - 1) / tile, 1, [&](int64_t begin, int64_t end) {
    const Tensor from = bare(x2);
    Tensor to = bare(y2);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * tile;
      const int64_t count = first + tile < along ? tile : along - first;
      Tensor w = transposed ? torch::stable::new_empty(from, {across, count})
                            : torch::stable::new_empty(from, {count, across});
      DequantizeBlocks call{weight, w.mutable_data_ptr(), 0, 0, weight.depth,
                            float_type(from)};
      if (transposed) {
        call.begin = first;
        call.end = first + count;
        kernel(call, 0, (weight.outputs + kBlock - 1) / kBlock);
      } else {
        call.first_block = first / kBlock;
        kernel(call, call.first_block, (first + count + kBlock - 1) / kBlock);
        w = torch::stable::transpose(w, 0, 1);
      }
      Tensor part = torch::stable::new_empty(from, {rows, count});
      multiply_into(from, w, part);
      Tensor place = torch::stable::narrow(to, 1, first, count);
      torch::stable::copy_(place, part);
    }
  });
}

template <typename T>
void add_bias(T* y, const T* bias, int64_t outputs, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int64_t i = 0; i < outputs; ++i) {
      const float sum = to_float(y[row * outputs + i]) + to_float(bias[i]);
      if constexpr (std::is_same_v<T, float>) y[row * outputs + i] = sum;
      if constexpr (std::is_same_v<T, bf16>) y[row * outputs + i] = to_bf16(sum);
      if constexpr (std::is_same_v<T, fp16>) y[row * outputs + i] = to_fp16(sum);
    }
}

std::vector<int64_t> shape_with(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) shape.push_back(x.size(dim));
  shape.push_back(last);
  return shape;
}

Tensor weight_only_linear(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> zeros,
                          std::optional<Tensor> bias, int64_t outputs, int64_t bits) {
  check_float(kOp, "x", x);
  check_plain(kOp, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1, kOp, ": x: got a scalar, expected [..., inputs]");
  const int64_t depth = x.size(x.dim() - 1);
  const PackedWeight weight = packed(codes, scales, zeros, outputs, depth, bits);
  if (bias) {
    check_plain(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, x.scalar_type());
    check_numel(kOp, "bias", *bias, outputs);
  }
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  Tensor y = torch::stable::new_empty(x, shape_with(x, outputs));
  const int64_t rows = x.numel() / depth;
  if (rows == 0) return y;
  if (rows <= kFewRows) {
    multiply_few(weight, x, bias_data, y, rows);
    return y;
  }
  multiply_many(weight, x, y, rows, false);
  if (bias) {
    with_float(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      T* to = static_cast<T*>(y.mutable_data_ptr());
      parallel(rows, (1 << 15) / outputs + 1, [&](int64_t begin, int64_t end) {
        add_bias(to, static_cast<const T*>(bias_data), outputs, begin, end);
      });
    });
  }
  return y;
}

// The gradient of x: grad W.
Tensor weight_only_linear_backward(Tensor grad, Tensor codes, Tensor scales,
                                   std::optional<Tensor> zeros, int64_t inputs, int64_t bits) {
  check_float(kOp, "grad", grad);
  check_plain(kOp, "grad", grad);
  STD_TORCH_CHECK(grad.dim() >= 1, kOp, ": grad: got a scalar, expected [..., outputs]");
  const int64_t outputs = grad.size(grad.dim() - 1);
  const PackedWeight weight = packed(codes, scales, zeros, outputs, inputs, bits);
  Tensor dx = torch::stable::new_empty(grad, shape_with(grad, inputs));
  if (grad.numel() > 0) multiply_many(weight, grad, dx, grad.numel() / outputs, true);
  return dx;
}

DS_OP(weight_only_linear, weight_only_linear);
DS_OP(weight_only_linear_backward, weight_only_linear_backward);

}  // namespace
}  // namespace ds
