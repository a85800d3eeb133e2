// float16 as CUDA's header has it, for the kernels that cuda_runtime.h runs on the CPU; rounds to nearest even.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>

struct __half {
  uint16_t bits = 0;
  operator float() const;
};

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float x = ldexpf(static_cast<float>(fraction), -24);
  if (exponent > 0) x = ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
  if (exponent == 31) x = fraction ? nanf("") : INFINITY;
  return h.bits >> 15 ? -x : x;
}

inline __half::operator float() const { return __half2float(*this); }

inline __half __double2half(double x) {
  const uint16_t sign = signbit(x) ? 0x8000 : 0;
  const double size = fabs(x);
  if (size != size) return {0x7fff};
  if (size == 0) return {sign};
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent;
  frexp(size, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last bit
  const int steps = static_cast<int>(nearbyint(ldexp(size, -unit)));
  return {static_cast<uint16_t>(sign | (((unit + 24) << 10) + steps))};
}

inline __half __float2half_rn(float x) { return __double2half(x); }
