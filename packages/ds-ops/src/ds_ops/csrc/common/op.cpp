#include "common/op.h"

#include <sys/mman.h>

#include <cstring>
#include <string>
#include <vector>

namespace ds {
namespace {

struct Entry {
  const char* op;
  Boxed kernel;
};

std::vector<Entry>& table() {
  static std::vector<Entry> entries;
  return entries;
}

thread_local std::string last_error;

}  // namespace

Register::Register(const char* op, Boxed kernel) { table().push_back({op, kernel}); }

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "torch.float8_e5m2";
    default:
      return "another dtype";
  }
}

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    text += (dim ? ", " : "") + std::to_string(t.size(dim));
  }
  return text + "]";
}

Tensor on_large_pages(Tensor fresh) {
  constexpr uintptr_t kLarge = 32 << 20, kPage = 2 << 20;
  const uintptr_t bytes = fresh.numel() * fresh.element_size();
  if (bytes < kLarge || !fresh.is_cpu()) return fresh;
  // Only whole large pages inside: what lies around belongs to others.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  return fresh;
}

void check_plain(const char* op, const char* argument, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", argument, ": not on a CPU, where this kernel runs");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", argument, ": not contiguous (shape ", shape_text(t),
                  "); call .contiguous() on it");
}

void check_dtype(const char* op, const char* argument, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", argument, ": got ",
                  dtype_name(t.scalar_type()), ", expected ", dtype_name(expected));
}

void check_float(const char* op, const char* argument, const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                      dtype == ScalarType::Half,
                  op, ": ", argument, ": got ", dtype_name(dtype),
                  ", expected torch.float32, torch.bfloat16 or torch.float16");
}

void check_numel(const char* op, const char* argument, const Tensor& t, int64_t expected) {
  STD_TORCH_CHECK(t.numel() == expected, op, ": ", argument, ": has ", t.numel(),
                  " elements, expected ", expected);
}

namespace {

// Bytes from the first element to the end of the last one; no stride is negative.
int64_t extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < t.dim(); ++dim) last += t.stride(dim) * (t.size(dim) - 1);
  return (last + 1) * t.element_size();
}

}  // namespace

void check_apart(const char* op, const char* a_name, const Tensor& a, const char* b_name,
                 const Tensor& b) {
  const char* a_begin = static_cast<const char*>(a.const_data_ptr());
  const char* b_begin = static_cast<const char*>(b.const_data_ptr());
  const char* a_end = a_begin + extent(a);
  const char* b_end = b_begin + extent(b);
  STD_TORCH_CHECK(a.numel() == 0 || b.numel() == 0 || a_end <= b_begin || b_end <= a_begin, op,
                  ": ", a_name, " and ", b_name,
                  " overlap in memory, and one of them is written; give tensors of their own");
}

}  // namespace ds

#define DS_EXPORT extern "C" __attribute__((visibility("default")))

// Registers the kernel of `op` for `<name_space>::<op>` under a dispatch key. Returns 0; 1 if this
// library has no such op; 2 if torch refuses it, with the reason in `ds_ops_error`.
DS_EXPORT int ds_ops_bind(const char* op, const char* name_space, const char* key) {
  for (const auto& entry : ds::table()) {
    if (std::strcmp(entry.op, op) != 0) continue;
    try {
      using Library = torch::stable::detail::StableLibrary;
      // Never deleted: the registration ends with it.
      auto* library = new Library(Library::Kind::IMPL, name_space, key, "ds_ops", 0);
      library->impl(entry.op, entry.kernel);
      return 0;
    } catch (const std::exception& error) {
      ds::last_error = error.what();
      return 2;
    }
  }
  return 1;
}

// The i-th op of this library, or null behind the last.
DS_EXPORT const char* ds_ops_name(int index) {
  const auto& entries = ds::table();
  return index < static_cast<int>(entries.size()) ? entries[index].op : nullptr;
}

DS_EXPORT const char* ds_ops_error() { return ds::last_error.c_str(); }
