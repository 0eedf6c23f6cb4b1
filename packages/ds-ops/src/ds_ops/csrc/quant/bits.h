// Codes of 4, 6 and 12 bits to and from bytes: four, six or twelve bits each, the first one lowest.
//
// Two steps: pairs of 4- or 6-bit codes, one to a byte, become one number of 8 or 12 bits in 16;
// 12-bit numbers become three bytes a pair. Included by kernel files only.
#pragma once

#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

// Two codes, one to a byte, read or written as one number: allowed for this type only.
typedef uint16_t __attribute__((may_alias)) Pair;

void join_nibbles(const uint8_t* codes, uint8_t* packed, int64_t count) {
  const Pair* pairs = reinterpret_cast<const Pair*>(codes);
  for (int64_t i = 0; i < count / 2; ++i) packed[i] = (uint8_t)(pairs[i] | (pairs[i] >> 4));
}

void split_nibbles(const uint8_t* packed, uint8_t* codes, int64_t count) {
  Pair* pairs = reinterpret_cast<Pair*>(codes);
  for (int64_t i = 0; i < count / 2; ++i) {
    pairs[i] = (Pair)((packed[i] & 0x0fu) | ((packed[i] & 0xf0u) << 4));
  }
}

// Six bits in each byte to twelve in each 16, in place.
void join_sixes(uint8_t* codes, int64_t count) {
  Pair* pairs = reinterpret_cast<Pair*>(codes);
  for (int64_t i = 0; i < count / 2; ++i) {
    pairs[i] = (Pair)((pairs[i] & 0x3fu) | ((pairs[i] >> 2) & 0xfc0u));
  }
}

void split_sixes(uint8_t* codes, int64_t count) {
  Pair* pairs = reinterpret_cast<Pair*>(codes);
  for (int64_t i = 0; i < count / 2; ++i) {
    pairs[i] = (Pair)((pairs[i] & 0x3fu) | ((pairs[i] & 0xfc0u) << 2));
  }
}

// `count` numbers of twelve bits, each in 16, to 3 bytes a pair: four at once in 64 bits.
void join_twelves(const Pair* numbers, uint8_t* packed, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, packed += 6) {
    uint64_t v;
    memcpy(&v, numbers + i, 8);
    v = (v & 0x00000fff00000fffu) | ((v >> 4) & 0x00fff00000fff000u);
    v = (v & 0x0000000000ffffffu) | ((v >> 8) & 0x0000ffffff000000u);
    memcpy(packed, &v, 6);
  }
  if (i < count) {  // two are left
    const uint32_t v = (uint32_t)numbers[i] | ((uint32_t)numbers[i + 1] << 12);
    memcpy(packed, &v, 3);
  }
}

void split_twelves(const uint8_t* packed, Pair* numbers, int64_t count) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, packed += 6) {
    uint64_t v = 0;
    // Six bytes are two loads and a stop: eight are read where there are as many.
    if (i + 8 <= count) {
      memcpy(&v, packed, 8);
    } else {
      memcpy(&v, packed, 6);
    }
    v = (v & 0x0000000000ffffffu) | ((v & 0x0000ffffff000000u) << 8);
    v = (v & 0x00000fff00000fffu) | ((v & 0x00fff00000fff000u) << 4);
    memcpy(numbers + i, &v, 8);
  }
  if (i < count) {
    uint32_t v = 0;
    memcpy(&v, packed, 3);
    numbers[i] = (Pair)(v & 0xfffu);
    numbers[i + 1] = (Pair)(v >> 12);
  }
}

// `count` codes, one to a byte (or, of 12 bits, to two), as packed bytes. Spoils `codes`.
void pack(uint8_t* codes, uint8_t* packed, int64_t count, int bits) {
  switch (bits) {
    case 4:
      return join_nibbles(codes, packed, count);
    case 6:
      join_sixes(codes, count);
      return join_twelves(reinterpret_cast<const Pair*>(codes), packed, count / 2);
    case 12:
      return join_twelves(reinterpret_cast<const Pair*>(codes), packed, count);
    default:
      memcpy(packed, codes, count);
  }
}

void unpack(const uint8_t* packed, uint8_t* codes, int64_t count, int bits) {
  switch (bits) {
    case 4:
      return split_nibbles(packed, codes, count);
    case 6:
      split_twelves(packed, reinterpret_cast<Pair*>(codes), count / 2);
      return split_sixes(codes, count);
    case 12:
      return split_twelves(packed, reinterpret_cast<Pair*>(codes), count);
    default:
      memcpy(codes, packed, count);
  }
}

}  // namespace
}  // namespace DS_ISA
}  // namespace ds
