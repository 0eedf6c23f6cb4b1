// All-reduce between processes of one host, through memory that all of them have mapped.
//
// The segment: a header with one line per rank, then per rank two buffers for what it contributes
// and one for what it has added up. A message longer than a buffer goes in turns. In a turn every
// rank copies its numbers into its buffer and says so; when all have,
//   * a short message is added up by every rank for itself, in the order of ranks;
//   * of a long one each rank adds up one part, says so, and copies the others' parts.
// Both give the same bits on every rank.
//
// Why nothing is overwritten too early: a rank says "arrived" of turn t only after it has finished
// turn t - 1. Who has seen all arrive at turn t may therefore overwrite what was read in turn
// t - 1: the buffer of the turn before the last (they alternate), and the added-up part.
//
// The functions here wait for a slice of time at most. The caller, in Python, calls again, and
// looks after signals, deadlines and dead processes in between; it says through `ds_shm_fail` that the
// ranks have to give up, which all of them see.
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "common/float_type.h"
#include "memory/add.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int kMostRanks = 8;
// A message of at most this many bytes is added up by every rank.
constexpr int64_t kShort = 16384;
// Between parts that two ranks write, so that they share no cache line.
constexpr int64_t kLine = 128;
constexpr int64_t kHeader = 4096;

using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);

// What a rank brings to a turn, for the others to compare with theirs.
struct Message {
  int64_t bytes;
  int64_t type;
};

struct alignas(kLine) Line {
  Word arrived;         // how often this rank has said that it has
  Word closed;          // 1 when it will not take part any more
  Message messages[2];  // of the even and odd turns
};

struct Header {
  Word sleepers;  // ranks that wait in the kernel
  Word failed;    // 0, or why and because of whom the ranks have given up; see `ds_shm_fail`
  Line lines[kMostRanks];
};
static_assert(sizeof(Header) <= kHeader);

enum Stage { kBegin, kContributing, kCollecting };
enum Outcome { kDone, kAgain, kFailed, kDiffers };

// One process's view; memory of its own, not shared.
struct Reducer {
  Header* header;
  char* buffers;
  int64_t buffer_bytes;
  int64_t part_bytes;
  int ranks;
  int rank;
  int spins;
  uint32_t turn;     // turns begun
  uint32_t arrived;  // what `arrived` of every rank must reach to go on
  // Where the message is that is being reduced.
  Stage stage;
  int64_t at;
  int waiting_for;  // the rank that has not arrived, or that differs

  char* buffer(int of, uint32_t turn) const {
    return buffers + of * (2 * buffer_bytes + part_bytes) + (turn % 2) * buffer_bytes;
  }
  char* part(int of) const { return buffer(of, 0) + 2 * buffer_bytes; }
};

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

int64_t now_ns() {
  timespec at{};
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1000000000LL + at.tv_nsec;
}

long futex(Word& word, int operation, uint32_t value, const timespec* limit) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation, value, limit, nullptr,
                 0);
}

void arrive(Reducer& self) {
  Word& mine = self.header->lines[self.rank].arrived;
  mine.store(++self.arrived, std::memory_order_seq_cst);
  // A sleeper counts itself first and then looks at the word again: one of us sees the other.
  if (self.header->sleepers.load(std::memory_order_seq_cst) != 0) {
    futex(mine, FUTEX_WAKE, INT32_MAX, nullptr);
  }
}

// Whether rank `other` has arrived. Counters may run over.
bool has_arrived(const Reducer& self, int other) {
  const uint32_t there = self.header->lines[other].arrived.load(std::memory_order_acquire);
  return static_cast<int32_t>(there - self.arrived) >= 0;
}

void sleep_until_change(Reducer& self, int other, int64_t limit_ns) {
  Word& word = self.header->lines[other].arrived;
  self.header->sleepers.fetch_add(1, std::memory_order_seq_cst);
  const uint32_t seen = word.load(std::memory_order_seq_cst);
  if (static_cast<int32_t>(seen - self.arrived) < 0) {
    const timespec limit{limit_ns / 1000000000, limit_ns % 1000000000};
    futex(word, FUTEX_WAIT, seen, &limit);
  }
  self.header->sleepers.fetch_sub(1, std::memory_order_seq_cst);
}

// Until all have arrived, for a slice of time: looking first, for as long as a rank that is about
// to arrive may take, and asleep after that.
Outcome wait(Reducer& self, int64_t slice_ns) {
  const int64_t deadline = now_ns() + slice_ns;
  for (int other = 0; other < self.ranks; ++other) {
    int spins = self.spins;
    while (!has_arrived(self, other)) {
      if (spins-- > 0) {
        relax();
        continue;
      }
      self.waiting_for = other;
      if (self.header->failed.load() != 0) return kFailed;
      const int64_t left = deadline - now_ns();
      if (left <= 0) return kAgain;
      sleep_until_change(self, other, left);
    }
  }
  return self.header->failed.load(std::memory_order_relaxed) != 0 ? kFailed : kDone;
}

// Part `index` of a message that is divided among the ranks: [begin, end) in elements.
struct Span {
  int64_t begin;
  int64_t end;
};

Span span_of(const Reducer& self, int index, int64_t count, int64_t element) {
  const int64_t line = kLine / element;
  const int64_t lines = (count + line - 1) / line;
  const int64_t each = (lines + self.ranks - 1) / self.ranks * line;
  const int64_t begin = index * each < count ? index * each : count;
  return Span{begin, begin + each < count ? begin + each : count};
}

void contribute(Reducer& self, const char* data, int64_t count, int64_t element, Message message) {
  ++self.turn;
  self.header->lines[self.rank].messages[self.turn % 2] = message;
  char* buffer = self.buffer(self.rank, self.turn);
  const int64_t bytes = count * element;
  if (bytes <= kShort) {
    memcpy(buffer, data, static_cast<size_t>(bytes));
  } else {  // all but what this rank adds up itself
    const Span mine = span_of(self, self.rank, count, element);
    memcpy(buffer, data, static_cast<size_t>(mine.begin * element));
    memcpy(buffer + mine.end * element, data + mine.end * element,
           static_cast<size_t>(bytes - mine.end * element));
  }
  arrive(self);
}

// The first rank whose message is another, or -1.
int differing(const Reducer& self) {
  const Message& mine = self.header->lines[self.rank].messages[self.turn % 2];
  for (int other = 0; other < self.ranks; ++other) {
    const Message& theirs = self.header->lines[other].messages[self.turn % 2];
    if (theirs.bytes != mine.bytes || theirs.type != mine.type) return other;
  }
  return -1;
}

void add_span(Reducer& self, char* data, char* also, Span span, int64_t element, int type) {
  const void* from[kMostRanks];
  for (int other = 0; other < self.ranks; ++other) {
    const char* there = other == self.rank ? data : self.buffer(other, self.turn);
    from[other] = there + span.begin * element;
  }
  char* to = data + span.begin * element;
  DS_BEST(add_ranks)
  (from, self.ranks, to, also != nullptr ? also : to, span.end - span.begin,
   static_cast<ds::FloatType>(type));
}

void collect(Reducer& self, char* data, int64_t count, int64_t element) {
  for (int step = 1; step < self.ranks; ++step) {
    const int other = (self.rank + step) % self.ranks;  // not all from the same one at once
    const Span span = span_of(self, other, count, element);
    memcpy(data + span.begin * element, self.part(other),
           static_cast<size_t>((span.end - span.begin) * element));
  }
}

}  // namespace

#define DS_EXPORT extern "C" __attribute__((visibility("default")))

// Bytes of a segment for so many ranks and buffers of so many bytes.
DS_EXPORT int64_t ds_shm_bytes(int ranks, int64_t buffer_bytes) {
  const int64_t part = (buffer_bytes / kLine / ranks + 2) * kLine;
  return kHeader + ranks * (2 * buffer_bytes + part);
}

// A view of a mapped segment, which was all zeros when the first rank mapped it. `buffer_bytes` is
// a multiple of 128; `spins`: how often to look before sleeping.
DS_EXPORT void* ds_shm_open(void* base, int64_t buffer_bytes, int ranks, int rank, int spins) {
  auto* self = new Reducer{};
  self->header = static_cast<Header*>(base);
  self->buffers = static_cast<char*>(base) + kHeader;
  self->buffer_bytes = buffer_bytes;
  self->part_bytes = (buffer_bytes / kLine / ranks + 2) * kLine;
  self->ranks = ranks;
  self->rank = rank;
  self->spins = spins;
  return self;
}

// Frees the view, after telling the other ranks; the memory is unmapped by the caller.
DS_EXPORT void ds_shm_close(void* view) {
  auto* self = static_cast<Reducer*>(view);
  self->header->lines[self->rank].closed.store(1);
  delete self;
}

// Adds up `count` elements of all ranks into `data`. 0: done; 1: not yet, call again with the same
// arguments; 2: the ranks have given up; 3: rank `ds_shm_waiting_for` brings something else.
DS_EXPORT int ds_shm_all_reduce(void* view, void* data, int64_t count, int type, int64_t slice_ns) {
  auto& self = *static_cast<Reducer*>(view);
  const int64_t element = type == static_cast<int>(ds::FloatType::fp32) ? 4 : 2;
  const Message message{count * element, type};
  const int64_t most = self.buffer_bytes / element;
  do {
    const int64_t left = count - self.at;
    const int64_t now = left < most ? left : most;
    char* here = static_cast<char*>(data) + self.at * element;
    if (self.stage == kBegin) {
      if (self.header->failed.load() != 0) return kFailed;
      contribute(self, here, now, element, message);
      self.stage = kContributing;
    }
    if (self.stage == kContributing) {
      const Outcome outcome = wait(self, slice_ns);
      if (outcome != kDone) return outcome;
      self.waiting_for = differing(self);
      if (self.waiting_for >= 0) return kDiffers;
      if (now * element <= kShort) {
        add_span(self, here, nullptr, Span{0, now}, element, type);
      } else {
        const Span mine = span_of(self, self.rank, now, element);
        add_span(self, here, self.part(self.rank), mine, element, type);
        arrive(self);
        self.stage = kCollecting;
      }
    }
    if (self.stage == kCollecting) {
      const Outcome outcome = wait(self, slice_ns);
      if (outcome != kDone) return outcome;
      collect(self, here, now, element);
    }
    self.stage = kBegin;
    self.at += now;
  } while (self.at < count);
  self.at = 0;
  return kDone;
}

DS_EXPORT int ds_shm_waiting_for(void* view) { return static_cast<Reducer*>(view)->waiting_for; }

// Bytes and dtype that a rank brought to this turn.
DS_EXPORT void ds_shm_message(void* view, int rank, int64_t* bytes, int64_t* type) {
  auto& self = *static_cast<Reducer*>(view);
  const Message& found = self.header->lines[rank].messages[self.turn % 2];
  *bytes = found.bytes;
  *type = found.type;
}

DS_EXPORT int ds_shm_has_closed(void* view, int rank) {
  return static_cast<int>(static_cast<Reducer*>(view)->header->lines[rank].closed.load());
}

// Makes all ranks give up with `reason` (not 0), unless they have; returns the reason that counts.
DS_EXPORT uint32_t ds_shm_fail(void* view, uint32_t reason) {
  uint32_t before = 0;
  Header* header = static_cast<Reducer*>(view)->header;
  return header->failed.compare_exchange_strong(before, reason) ? reason : before;
}

DS_EXPORT uint32_t ds_shm_failure(void* view) {
  return static_cast<Reducer*>(view)->header->failed.load();
}
