// What the kernels take from CUDA beyond the language. `tests/cuda_emulation.cpp` puts the same on the host.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/headeronly/util/Exception.h>

namespace latent_engine {

constexpr int THREADS = 128;  // of every block
constexpr int WAVE = 2 * 132;  // blocks that fill an H200; a constant, so that the bits do not depend on the device

enum class Scalar { f32, bf16, f16 };

// The element type is a run-time value: a uniform branch at loads and stores instead of three copies of each kernel.
__device__ inline float load(const void* data, Scalar type, int64_t i) {
  if (type == Scalar::f32) return static_cast<const float*>(data)[i];
  if (type == Scalar::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}

__device__ inline void store(void* data, Scalar type, int64_t i, float value) {
  if (type == Scalar::f32) static_cast<float*>(data)[i] = value;
  else if (type == Scalar::bf16) static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(value);
  else static_cast<__half*>(data)[i] = __float2half(value);
}

__device__ inline float* shared_memory() {
  extern __shared__ __align__(16) float memory[];
  return memory;
}

// 2 + 1.2 |x| ulp; every use weighs e^x against terms of size one, so the error stays below 1e-7 of their sum.
__device__ inline float fast_exp(float x) { return __expf(x); }

template <class T>
__device__ T from_lane_xor(T value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

inline void check(cudaError_t status) { STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status)); }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int shared_floats, cudaStream_t stream, Arguments... arguments) {
  const int bytes = shared_floats * static_cast<int>(sizeof(float));
  if (bytes > 48 * 1024) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<grid, THREADS, bytes, stream>>>(arguments...);
  check(cudaGetLastError());
}

}  // namespace latent_engine
