// Checks csrc/common/{half,simd}.h for one instruction set, lane by lane against scalar arithmetic.
// Prints what is wrong; ends with 0 if nothing is. Compiled and run by test_simd.py.
#include <math.h>
#include <stdio.h>

#include "common/simd.h"

using namespace ds;
using namespace ds::DS_ISA;

static int wrong = 0;

#define EXPECT(condition, ...)           \
  do {                                   \
    if (!(condition) && ++wrong <= 20) { \
      printf("%s: ", #condition);        \
      printf(__VA_ARGS__);               \
      printf("\n");                      \
    }                                    \
  } while (0)

static uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

// From the definition: sign, exponent, significand.
static double value_of(uint16_t half, int exponent_bits) {
  const int significand_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (half & 0x7fff) >> significand_bits;
  const double significand = half & ((1 << significand_bits) - 1);
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return significand ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * ldexp(significand, 1 - bias - significand_bits);
  return sign * ldexp(significand + (1 << significand_bits), exponent - bias - significand_bits);
}

template <typename T>
static void check_type(const char* name, int exponent_bits, T (*narrow)(float)) {
  for (uint32_t first = 0; first < 65536; first += kWidth) {
    T in[kWidth], out[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) in[lane].bits = (uint16_t)(first + lane);
    float wide[kWidth];
    store(wide, load(in));
    store(out, load(in));
    for (int lane = 0; lane < kWidth; ++lane) {
      const float expected = (float)value_of(in[lane].bits, exponent_bits);
      EXPECT(same(wide[lane], expected), "%s %04x", name, in[lane].bits);
      EXPECT(same(to_float(in[lane]), expected), "%s %04x", name, in[lane].bits);
      if (expected == expected) {
        EXPECT(out[lane].bits == in[lane].bits, "%s %04x", name, in[lane].bits);
      } else {
        EXPECT(to_float(out[lane]) != to_float(out[lane]), "%s %04x", name, in[lane].bits);
      }
    }
  }
  // Rounding: every 9973rd float, and those around the middle of two neighbours.
  for (uint64_t at = 0; at < (1ull << 32); at += 9973 * kWidth) {
    float in[kWidth];
    T out[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) {
      uint32_t bits = (uint32_t)(at + 9973ull * lane);
      if (lane % 4 == 1) bits = (bits & 0xffff0000u) | 0x8000u;
      if (lane % 4 == 2) bits = (bits & 0xffffe000u) | 0x1000u;
      in[lane] = float_of(bits);
    }
    store(out, load(in));
    for (int lane = 0; lane < kWidth; ++lane) {
      const T one = narrow(in[lane]);
      const float got = to_float(out[lane]), alone = to_float(one);
      EXPECT(same(got, alone), "%s of %08x: %04x, one at a time %04x", name, bits_of(in[lane]),
             out[lane].bits, one.bits);
      const float v = in[lane];
      if (v != v) {
        EXPECT(got != got, "%s of a NaN", name);
        continue;
      }
      if (isinf(got) || isinf(v)) continue;
      // Nothing is nearer, and of two that are as near the even one is taken.
      for (int step = -1; step <= 1; step += 2) {
        const double other = value_of((uint16_t)(out[lane].bits + step), exponent_bits);
        const double error = fabs((double)v - got), others = fabs((double)v - other);
        const bool even = (out[lane].bits & 1) == 0;
        EXPECT(!(others < error) && (even || others != error), "%s of %08x: %04x", name,
               bits_of(v), out[lane].bits);
      }
    }
  }
}

static void check_parts() {
  float row[2 * kWidth];
  for (int i = 0; i < 2 * kWidth; ++i) row[i] = (float)(i + 1);
  for (int count = 0; count < kWidth; ++count) {
    float got[kWidth];
    store(got, load_some(row, count));
    float to[2 * kWidth] = {};
    store_some(to, load(row), count);
    for (int i = 0; i < kWidth; ++i) {
      EXPECT(got[i] == (i < count ? row[i] : 0.0f), "count %d lane %d", count, i);
      EXPECT(to[i] == (i < count ? row[i] : 0.0f), "count %d lane %d", count, i);
    }
  }
  float total = 0.0f;
  for (int i = 0; i < kWidth; ++i) total += row[i];
  EXPECT(sum_of(load(row)) == total, "%g", (double)sum_of(load(row)));
  EXPECT(max_of(load(row)) == row[kWidth - 1], "%g", (double)max_of(load(row)));
}

static float at_once(F (*function)(F), float v) {
  float got[kWidth];
  store(got, function(splat(v)));
  return got[kWidth - 1];
}

static F sigmoid_of(F v) { return sigmoid(v); }
static F exponential_of(F v) { return exponential(v); }
static F reciprocal_of(F v) { return reciprocal(v); }

// Infinities, NaN with any payload, and what sigmoid and reciprocal promise.
static void check_edges() {
  const uint32_t nans[] = {0x7fc00000u, 0xffc00000u, 0x7fc00081u, 0x7fffffffu, 0xffffffffu};
  for (const uint32_t bits : nans) {
    const float nan = float_of(bits);
    EXPECT(isnan(at_once(exponential_of, nan)), "e^NaN of %08x", bits);
    EXPECT(isnan(at_once(sigmoid_of, nan)), "sigmoid of %08x", bits);
    EXPECT(isnan(at_once(reciprocal_of, nan)), "reciprocal of %08x", bits);
  }
  const float large[] = {89.0f, 1e4f, 1e30f, 3.4e38f, INFINITY};
  for (const float v : large) {
    EXPECT(at_once(exponential_of, v) > 2e38f, "e^%g", (double)v);
    EXPECT(at_once(exponential_of, -v) >= 0.0f && at_once(exponential_of, -v) < 1.3e-38f, "e^%g",
           (double)-v);
    EXPECT(at_once(sigmoid_of, v) == 1.0f, "sigmoid of %g", (double)v);
    const float none = at_once(sigmoid_of, -v);
    EXPECT(none >= 0.0f && none < 1e-37f, "sigmoid of %g: %g", (double)-v, (double)none);
  }
  EXPECT(at_once(exponential_of, 0.0f) == 1.0f, "e^0");
  EXPECT(at_once(sigmoid_of, 0.0f) == 0.5f, "sigmoid of 0");
  double worst = 0.0, worst_share = 0.0;
  for (int i = -86000; i <= 86000; ++i) {
    const float v = (float)i * 1e-3f;
    const double truth = 1.0 / (1.0 + exp(-(double)v));
    const double error = fabs(at_once(sigmoid_of, v) - truth) / truth;
    worst = error > worst ? error : worst;
    const float size = ldexpf(1.0f + (float)(i + 86000) * 5e-6f, i % 100);
    const double off = fabs((double)at_once(reciprocal_of, size) * size - 1.0);
    worst_share = off > worst_share ? off : worst_share;
  }
  EXPECT(worst < 4.8e-7, "sigmoid is off by %g", worst);
  EXPECT(worst_share < 1.2e-7, "the reciprocal is off by %g", worst_share);
}

static void check_functions() {
  double worst = 0.0;
  for (int i = -870000; i <= 880000; i += kWidth) {
    float in[kWidth], e[kWidth], root[kWidth], even[kWidth], size[kWidth];
    for (int lane = 0; lane < kWidth; ++lane) in[lane] = (float)(i + lane) * 1e-4f;
    const F v = load(in);
    store(e, exponential(v));
    store(root, square_root(absolute(v)));
    store(even, round_even(v));
    store(size, absolute(v));
    for (int lane = 0; lane < kWidth; ++lane) {
      const double truth = exp((double)in[lane]);
      const double error = fabs(e[lane] - truth) / truth;
      worst = error > worst ? error : worst;
      EXPECT(root[lane] == sqrtf(fabsf(in[lane])), "sqrt of %g", (double)in[lane]);
      EXPECT(even[lane] == rintf(in[lane]), "round of %g", (double)in[lane]);
      EXPECT(size[lane] == fabsf(in[lane]), "absolute of %g", (double)in[lane]);
    }
  }
  EXPECT(worst < 2.5e-7, "e^v is off by %g", worst);
  check_edges();
  float one[kWidth] = {1.0f}, two[kWidth] = {2.0f}, got[kWidth];
  store(got, maximum(load(one), load(two)));
  EXPECT(got[0] == 2.0f, "%g", (double)got[0]);
  store(got, minimum(load(one), load(two)));
  EXPECT(got[0] == 1.0f, "%g", (double)got[0]);
}

int main() {
  check_type<bf16>("bf16", 8, to_bf16);
  check_type<fp16>("fp16", 5, to_fp16);
  check_parts();
  check_functions();
  if (wrong) printf("%d wrong, %d lanes\n", wrong, kWidth);
  return wrong != 0;
}
