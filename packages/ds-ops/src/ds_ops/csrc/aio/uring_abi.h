// The part of the kernel's io_uring interface that we use, declared here since the headers that a
// user builds with may be older than the kernel that runs.
//
// Source: io_uring_setup(2), io_uring_enter(2), io_uring_register(2).
#pragma once

#include <cstdint>

namespace ds::aio::uring {

// System calls, with the same numbers on every processor.
constexpr long kSetup = 425;
constexpr long kEnter = 426;
constexpr long kRegister = 427;

constexpr uint8_t kOpRead = 22;
constexpr uint8_t kOpWrite = 23;

constexpr uint32_t kSingleIssuer = 1u << 12;  // Linux 6.0
constexpr uint32_t kDeferTaskrun = 1u << 13;  // Linux 6.1

constexpr uint32_t kGetEvents = 1u << 0;
constexpr uint32_t kRegisterProbe = 8;
constexpr uint16_t kOpSupported = 1u << 0;

constexpr uint64_t kMapSubmissions = 0;
constexpr uint64_t kMapCompletions = 0x8000000;
constexpr uint64_t kMapEntries = 0x10000000;

struct Submission {
  uint8_t opcode;
  uint8_t flags;
  uint16_t priority;
  int32_t file;
  uint64_t offset;
  uint64_t address;
  uint32_t length;
  uint32_t operation_flags;
  uint64_t user_data;
  uint64_t unused[3];
};
static_assert(sizeof(Submission) == 64);

struct Completion {
  uint64_t user_data;
  int32_t result;
  uint32_t flags;
};
static_assert(sizeof(Completion) == 16);

struct SubmissionOffsets {
  uint32_t head, tail, mask, entries, flags, dropped, array, unused;
  uint64_t user_address;
};

struct CompletionOffsets {
  uint32_t head, tail, mask, entries, overflow, completions, flags, unused;
  uint64_t user_address;
};

struct Parameters {
  uint32_t submission_entries, completion_entries, flags, thread_cpu, thread_idle, features;
  uint32_t worker_file, unused[3];
  SubmissionOffsets submissions;
  CompletionOffsets completions;
};
static_assert(sizeof(Parameters) == 120);

struct ProbedOp {
  uint8_t opcode, unused;
  uint16_t flags;
  uint32_t unused_too;
};

struct Probe {
  uint8_t last_op, count;
  uint16_t unused;
  uint32_t unused_too[3];
  ProbedOp ops[kOpWrite + 1];
};
static_assert(sizeof(Probe) == 16 + 8 * (kOpWrite + 1));

}  // namespace ds::aio::uring
