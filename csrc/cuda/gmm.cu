// gmm_fwd and gmm_bwd for the CUDA dispatch key; schemas and the meaning of the arguments are in kernels/gmm.py.
#include <optional>
#include <tuple>
#include <vector>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "device.cuh"
#include "gmm.cuh"

// Weak: the library also loads beside a CPU build of torch, which has no streams.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace latent_engine {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cudaStream_t current_stream(const Tensor& like) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "gmm_log_prob: this build of torch has no CUDA.");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
}

const float* floats(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float,
                  "gmm_log_prob: the mixture and its gradients must be float32 on CUDA.");
  return static_cast<const float*>(t.const_data_ptr());
}

Scalar element_type(const Tensor& z) {
  switch (z.scalar_type()) {
    case ScalarType::Float: return Scalar::f32;
    case ScalarType::BFloat16: return Scalar::bf16;
    case ScalarType::Half: return Scalar::f16;
    default: STD_TORCH_CHECK(false, "gmm_log_prob: z must be float32, bfloat16 or float16 on CUDA.");
  }
}

// The arguments that both primitives share, and the tensors that must live until every kernel is in the stream: what is
// freed after that goes only to later work in the stream.
class Call {
 public:
  Call(const Tensor& z, const Tensor& means, const Tensor& log_vars, const Tensor& log_weights,
       const std::optional<Tensor>& labels, const std::optional<Tensor>& allowed)
      : guard_(z.get_device_index()), stream(current_stream(z)), like_(means) {
    problem.z = z.const_data_ptr();
    problem.z_type = element_type(z);
    problem.z_row = z.stride(0), problem.z_col = z.stride(1);
    problem.means = floats(keep(means));
    if (labels) problem.labels = static_cast<const int64_t*>(keep(*labels).const_data_ptr());
    if (allowed) problem.allowed = static_cast<const bool*>(keep(*allowed).const_data_ptr());
    problem.N = z.size(0), problem.K = means.size(0), problem.D = means.size(1);
    const gmm::LogVars strided{floats(log_vars), log_vars.stride(0), log_vars.stride(1)};
    gmm::prepare_mixture(problem, strided, floats(keep(log_weights)), *this, stream);
  }

  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(torch::stable::contiguous(t)); }

  float* operator()(int64_t count) {
    return static_cast<float*>(kept_.emplace_back(empty(like_, {count})).mutable_data_ptr());
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  cudaStream_t stream;
  gmm::Problem problem{};

 private:
  Tensor like_;
  std::vector<Tensor> kept_;
};

float* output(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> gmm_fwd(Tensor z, Tensor means, Tensor log_vars, Tensor log_weights,
                                   std::optional<Tensor> labels, std::optional<Tensor> allowed, bool responsibilities) {
  Call call(z, means, log_vars, log_weights, labels, allowed);
  const gmm::Problem& p = call.problem;
  Tensor log_prob = empty(means, {p.N});
  Tensor resp = responsibilities ? empty(means, {p.N, p.K}) : empty(means, {0, 0});
  gmm::forward(p, output(log_prob), responsibilities ? output(resp) : nullptr, call, call.stream);
  return {log_prob, resp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_bwd(Tensor grad, Tensor z, Tensor means, Tensor log_vars,
                                                   Tensor log_weights, Tensor log_prob, std::optional<Tensor> labels,
                                                   std::optional<Tensor> allowed, std::optional<Tensor> coef,
                                                   bool need_z, bool need_mixture) {
  Call call(z, means, log_vars, log_weights, labels, allowed);
  const gmm::Problem& p = call.problem;
  const gmm::Upstream up{floats(call.keep(grad)), floats(call.keep(log_prob)),
                         coef ? floats(call.keep(*coef)) : nullptr};
  const int64_t N = need_z ? p.N : 0, K = need_mixture ? p.K : 0, D = p.D;
  Tensor grad_z = empty(z, {N, need_z ? D : 0}, z.scalar_type());
  Tensor grad_means = empty(means, {K, need_mixture ? D : 0}), grad_log_vars = empty(means, {K, need_mixture ? D : 0});
  Tensor grad_log_weights = empty(means, {K});
  if (need_z) gmm::backward_z(p, up, grad_z.mutable_data_ptr(), call, call.stream);
  if (need_mixture && p.N > 0) {
    gmm::backward_mixture(p, up, output(grad_means), output(grad_log_vars), output(grad_log_weights), call,
                          call.stream);
  } else {
    for (Tensor* t : {&grad_means, &grad_log_vars, &grad_log_weights}) torch::stable::zero_(*t);
  }
  return {grad_z, grad_means, grad_log_vars, grad_log_weights};
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("gmm_fwd", TORCH_BOX(&latent_engine::gmm_fwd));
  m.impl("gmm_bwd", TORCH_BOX(&latent_engine::gmm_bwd));
}
