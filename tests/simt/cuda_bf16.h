// bfloat16 as CUDA's header has it, for the kernels that cuda_runtime.h runs on the CPU; rounds to nearest even, from
// float64 by way of float32.
#pragma once

#include <stdint.h>
#include <string.h>

struct __nv_bfloat16 {
  uint16_t bits = 0;
  operator float() const;
};

inline float __bfloat162float(__nv_bfloat16 h) {
  const uint32_t bits = uint32_t{h.bits} << 16;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline __nv_bfloat16::operator float() const { return __bfloat162float(*this); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __nv_bfloat16 __double2bfloat16(double x) { return __float2bfloat16_rn(static_cast<float>(x)); }
