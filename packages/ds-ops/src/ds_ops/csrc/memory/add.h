// Elements of several ranks added up in fp32, in the order of ranks.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

// to[i] = also[i] = sum over ranks of from[rank][i], rounded once; 2 ranks or more.
DS_KERNEL(void, add_ranks, const void* const* from, int ranks, void* to, void* also, int64_t count,
          ::ds::FloatType type)
