// What the scalar maths of every op is written in. Torch-free; read by the host compiler and by nvcc.
//
// A math.h names its scalar or register type V and uses only +, −, ·, /, comparisons, `cond ? a : b`, literals that
// float holds exactly, and the functions below; simd.h offers the same functions for registers. REWARDFUSE_TARGET is
// the namespace of the instruction set (or `cuda`) that the file is being compiled for, so that no two objects share
// an inline function.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define RF_HD __host__ __device__ __forceinline__
#else
#define RF_HD inline __attribute__((always_inline))
#endif

#ifndef REWARDFUSE_TARGET
#define REWARDFUSE_TARGET cuda
#endif

namespace rewardfuse::REWARDFUSE_TARGET {

// exp(x) for x ≤ 0, and as far as 1: never overflows, keeps subnormal results, exp(−inf) = 0.
RF_HD float exp_nonpositive(float x) { return expf(x); }
RF_HD double exp_nonpositive(double x) { return exp(x); }

// exp(x) − 1 for x ≤ 0, and as far as 80; relatively accurate around x = 0.
RF_HD float expm1_nonpositive(float x) { return expm1f(x); }
RF_HD double expm1_nonpositive(double x) { return expm1(x); }

template <int n>
constexpr double kInverseFactorial = kInverseFactorial<n - 1> / n;
template <>
constexpr double kInverseFactorial<1> = 1;

// Σ x^k/(n + k)! to 1/last!
template <int n, int last, class T>
RF_HD T inverse_factorials(T x) {
  constexpr T coefficient = T(kInverseFactorial<n>);
  if constexpr (n == last)
    return coefficient;
  else
    return inverse_factorials<n + 1, last>(x) * x + coefficient;
}

// exp(x) − 1 − x for x ≤ 80, relatively accurate around x = 0.
RF_HD float expm1_minus_x(float x) { return fabsf(x) <= 1.0f ? x * x * inverse_factorials<2, 11>(x) : expm1f(x) - x; }
RF_HD double expm1_minus_x(double x) { return fabs(x) <= 1.0 ? x * x * inverse_factorials<2, 19>(x) : expm1(x) - x; }

// log(x) for x ≥ 0; log(0) = −inf.
RF_HD float log_nonnegative(float x) { return logf(x); }
RF_HD double log_nonnegative(double x) { return log(x); }

// log(1 + x) for 0 ≤ x ≤ 1, relatively accurate down to x = 0.
RF_HD float log1p_unit(float x) { return log1pf(x); }
RF_HD double log1p_unit(double x) { return log1p(x); }

// |x|.
RF_HD float magnitude(float x) { return fabsf(x); }
RF_HD double magnitude(double x) { return fabs(x); }

}  // namespace rewardfuse::REWARDFUSE_TARGET
