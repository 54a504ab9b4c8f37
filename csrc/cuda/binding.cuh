// What the bindings of CUDA ops share: tensors of the stable ABI and the current stream.
#pragma once

#include <deque>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "device.cuh"

// Weak: the library also loads beside a CPU build of torch, which has no streams.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace latent_engine {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const char* op, const Tensor& like) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op, ": this build of torch has no CUDA.");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, sizes, type);
}

inline const float* floats(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": parameters and gradients must be float32 on CUDA.");
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* output(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

inline Scalar element_type(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Scalar::f32;
    case ScalarType::BFloat16: return Scalar::bf16;
    case ScalarType::Half: return Scalar::f16;
    default: STD_TORCH_CHECK(false, op, ": inputs must be float32, bfloat16 or float16 on CUDA.");
  }
}

// The stream of a call, and the tensors that must live until every kernel is in it: what is freed after that goes only to later
// work in the stream. The workspace that host functions of kernels ask for floats.
class Launch {
 public:
  // On the device of `on`; the workspace is made like `like`.
  Launch(const char* op, const Tensor& on, const Tensor& like)
      : guard_(on.get_device_index()), stream(current_stream(op, on)), like_(like) {}

  const Tensor& hold(const Tensor& t) { return kept_.emplace_back(t); }
  const Tensor& keep(const Tensor& t) { return hold(torch::stable::contiguous(t)); }
  float* operator()(int64_t count) { return output(hold(empty(like_, {count}))); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  const cudaStream_t stream;

 private:
  Tensor like_;
  std::deque<Tensor> kept_;  // references to its elements stay valid
};

}  // namespace latent_engine
