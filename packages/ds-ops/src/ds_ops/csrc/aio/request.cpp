#include "aio/request.h"

#include <algorithm>

namespace ds::aio {

Piece plan(Request& request, int64_t block) {
  const Target& target = request.target;
  const int64_t rest = request.bytes - request.planned;
  Piece piece;
  piece.request = &request;
  piece.offset = request.offset + request.planned;
  piece.memory = request.memory + request.planned;
  piece.length = std::min(block, rest);
  if (target.direct >= 0 && target.alignment <= kLargestAlignment && !request.direct_refused) {
    const int64_t align = target.alignment;
    const int64_t into = piece.offset % align;
    if (into != 0) {
      piece.length = std::min(align - into, rest);
    } else if (rest >= align) {
      const int64_t whole = std::max(block / align, int64_t{1}) * align;
      piece.length = std::min(whole, rest / align * align);
      piece.direct = true;
    } else {
      piece.length = rest;
    }
  }
  request.planned += piece.length;
  ++request.in_flight;
  return piece;
}

}  // namespace ds::aio
