#include "aio/uring.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace ds::aio {
namespace {

template <typename T>
T* at(char* base, uint32_t offset) {
  return reinterpret_cast<T*>(base + offset);
}

char* map(int file, size_t bytes, uint64_t what) {
  void* found = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file,
                     static_cast<off_t>(what));
  return found == MAP_FAILED ? nullptr : static_cast<char*>(found);
}

void unmap(void* memory, size_t bytes) {
  if (memory != nullptr) munmap(memory, bytes);
}

int setup(uint32_t entries, uint32_t flags, uring::Parameters* parameters) {
  memset(parameters, 0, sizeof *parameters);
  parameters->flags = flags;
  return static_cast<int>(syscall(uring::kSetup, entries, parameters));
}

}  // namespace

Uring::~Uring() {
  unmap(submission_ring_, submission_bytes_);
  unmap(completion_ring_, completion_bytes_);
  unmap(entries_, entries_bytes_);
  if (file_ >= 0) close(file_);
}

int Uring::open(uint32_t entries) {
  // One thread does everything, so completions can wait until it asks for them.
  file_ = setup(entries, uring::kSingleIssuer | uring::kDeferTaskrun, &parameters_);
  if (file_ < 0 && errno == EINVAL) file_ = setup(entries, 0, &parameters_);
  if (file_ < 0) return errno;
  const int missing = probe();
  if (missing != 0) return missing;
  const auto& s = parameters_.submissions;
  const auto& c = parameters_.completions;
  submission_bytes_ = s.array + parameters_.submission_entries * sizeof(uint32_t);
  completion_bytes_ = c.completions + parameters_.completion_entries * sizeof(uring::Completion);
  entries_bytes_ = parameters_.submission_entries * sizeof(uring::Submission);
  submission_ring_ = map(file_, submission_bytes_, uring::kMapSubmissions);
  completion_ring_ = map(file_, completion_bytes_, uring::kMapCompletions);
  char* table = map(file_, entries_bytes_, uring::kMapEntries);
  entries_ = reinterpret_cast<uring::Submission*>(table);
  return submission_ring_ && completion_ring_ && entries_ ? 0 : ENOMEM;
}

// The operations exist since Linux 5.6, as does the way to ask for them.
int Uring::probe() const {
  uring::Probe found{};
  constexpr long kCount = uring::kOpWrite + 1;
  if (syscall(uring::kRegister, file_, uring::kRegisterProbe, &found, kCount) < 0) return ENOSYS;
  const bool reads = found.ops[uring::kOpRead].flags & uring::kOpSupported;
  const bool writes = found.ops[uring::kOpWrite].flags & uring::kOpSupported;
  return reads && writes ? 0 : ENOSYS;
}

void Uring::add(uint8_t opcode, int file, char* memory, uint32_t length, int64_t offset,
                uint64_t user_data) {
  const auto& offsets = parameters_.submissions;
  uint32_t* tail = at<uint32_t>(submission_ring_, offsets.tail);
  const uint32_t index = *tail & *at<uint32_t>(submission_ring_, offsets.mask);
  uring::Submission& entry = entries_[index];
  memset(&entry, 0, sizeof entry);
  entry.opcode = opcode;
  entry.file = file;
  entry.address = reinterpret_cast<uint64_t>(memory);
  entry.length = length;
  entry.offset = static_cast<uint64_t>(offset);
  entry.user_data = user_data;
  at<uint32_t>(submission_ring_, offsets.array)[index] = index;
  __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
  ++added_;
}

int Uring::enter(uint32_t least, uint32_t flags) {
  const long taken =
      syscall(uring::kEnter, file_, added_, least, flags, nullptr, size_t{0});
  if (taken < 0) return errno;
  added_ -= static_cast<uint32_t>(taken);
  return 0;
}

int Uring::enter() { return enter(1, uring::kGetEvents); }

void Uring::submit() {
  if (added_ > 0) enter(0, 0);
}

bool Uring::next(uint64_t* user_data, int32_t* result) {
  const auto& offsets = parameters_.completions;
  uint32_t* head = at<uint32_t>(completion_ring_, offsets.head);
  if (*head == __atomic_load_n(at<uint32_t>(completion_ring_, offsets.tail), __ATOMIC_ACQUIRE)) {
    return false;
  }
  const uint32_t index = *head & *at<uint32_t>(completion_ring_, offsets.mask);
  const auto& found = at<uring::Completion>(completion_ring_, offsets.completions)[index];
  *user_data = found.user_data;
  *result = found.result;
  __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
  return true;
}

}  // namespace ds::aio
