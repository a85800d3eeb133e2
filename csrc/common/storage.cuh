// How a thread reads operands and rewards of any storage type, and writes gradients.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/operand.h"

namespace rewardfuse::cuda {

template <class T, class S>
__device__ __forceinline__ T widen(S x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ float widen<float>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float widen<float>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ double widen<double>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ double widen<double>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class S, class T>
__device__ __forceinline__ S narrow(T x) {
  return static_cast<S>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow<__half>(double x) {
  return __double2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(double x) {
  return __double2bfloat16(x);
}

// One item of an operand. The switch is uniform over the grid: it costs a predicted branch.
template <class T>
__device__ __forceinline__ T load(const Operand& operand, int64_t row, int64_t column) {
  if (operand.data == nullptr) return static_cast<T>(operand.value);
  const int64_t i = row * operand.outer_stride + column * operand.inner_stride;
  switch (operand.dtype) {
    case DType::kFloat32: return widen<T>(static_cast<const float*>(operand.data)[i]);
    case DType::kFloat64: return widen<T>(static_cast<const double*>(operand.data)[i]);
    case DType::kFloat16: return widen<T>(static_cast<const __half*>(operand.data)[i]);
    case DType::kBFloat16: return widen<T>(static_cast<const __nv_bfloat16*>(operand.data)[i]);
    case DType::kBool: return static_cast<const uint8_t*>(operand.data)[i] != 0 ? T(1) : T(0);
    case DType::kUInt8: return widen<T>(static_cast<const uint8_t*>(operand.data)[i]);
    case DType::kInt8: return widen<T>(static_cast<const int8_t*>(operand.data)[i]);
    case DType::kInt16: return widen<T>(static_cast<const int16_t*>(operand.data)[i]);
    case DType::kInt32: return widen<T>(static_cast<const int32_t*>(operand.data)[i]);
    case DType::kInt64: break;
  }
  return widen<T>(static_cast<const int64_t*>(operand.data)[i]);
}

template <class T>
__device__ __forceinline__ void store(void* out, DType dtype, int64_t i, T x) {
  switch (dtype) {
    case DType::kFloat64: static_cast<double*>(out)[i] = x; return;
    case DType::kFloat16: static_cast<__half*>(out)[i] = narrow<__half>(x); return;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(out)[i] = narrow<__nv_bfloat16>(x); return;
    default: static_cast<float*>(out)[i] = static_cast<float>(x);
  }
}

// kWidth neighbours in one access of up to 16 bytes.
template <class S, int kWidth>
struct alignas(sizeof(S) * kWidth) Vector {
  S item[kWidth];
};

// Calls f(accumulation type, storage type) for the dtype of the rewards.
template <class F>
void with_rewards(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{}, double{});
    case DType::kFloat16: return f(float{}, __half{});
    case DType::kBFloat16: return f(float{}, __nv_bfloat16{});
    default: return f(float{}, float{});
  }
}

}  // namespace rewardfuse::cuda
