// likelihood_fwd and likelihood_bwd for the CUDA dispatch key; schemas and the meaning of the arguments are in
// kernels/likelihood.py.
#include <deque>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "likelihood.cuh"

namespace latent_engine {
namespace {

constexpr const char* OP = "likelihood";

// The arguments that both primitives share, and the tensors that must live until every kernel is in the stream.
class Call {
 public:
  Call(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& mask)
      : guard_(a.get_device_index()), stream(current_stream(OP, a)), like_(x) {
    const Tensor &dense_x = dense(x), &dense_a = dense(a);
    problem.x = floats(OP, dense_x);
    problem.a = dense_a.const_data_ptr();
    problem.a_type = element_type(OP, a);
    problem.b = b ? floats(OP, *b) : nullptr;
    problem.mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
    problem.S = broadcast(x, a, 0), problem.N = broadcast(x, a, 1), problem.P = x.size(2);
    set_strides(dense_x, problem.x_strides, 2), set_strides(dense_a, problem.a_strides, 2);
    if (b) set_strides(*b, problem.b_strides, 3);
    if (mask) set_strides(*mask, problem.mask_strides, 3);
  }

  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(torch::stable::contiguous(t)); }

  float* operator()(int64_t count) {
    return static_cast<float*>(kept_.emplace_back(empty(like_, {count})).mutable_data_ptr());
  }

 private:
  static int64_t broadcast(const Tensor& x, const Tensor& a, int dim) { return x.size(dim) == 1 ? a.size(dim) : x.size(dim); }

  const Tensor& dense(const Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? kept_.emplace_back(t) : keep(t); }

  static void set_strides(const Tensor& t, int64_t* strides, int count) {
    for (int i = 0; i < count; ++i) strides[i] = t.size(i) == 1 ? 0 : t.stride(i);
  }

  torch::stable::accelerator::DeviceGuard guard_;

 public:
  cudaStream_t stream;
  likelihood::Problem problem{};

 private:
  Tensor like_;
  std::deque<Tensor> kept_;  // references to its elements stay valid
};

Tensor likelihood_fwd(Tensor x, Tensor a, std::optional<Tensor> b, std::optional<Tensor> mask, int64_t kind) {
  Call call(x, a, b, mask);
  Tensor log_prob = empty(x, {call.problem.S, call.problem.N});
  likelihood::forward(call.problem, kind, output(log_prob), call.stream);
  return log_prob;
}

std::tuple<Tensor, Tensor, Tensor> likelihood_bwd(Tensor grad, Tensor x, Tensor a, std::optional<Tensor> b,
                                                  std::optional<Tensor> mask, int64_t kind, bool need_x, bool need_a,
                                                  bool need_b) {
  Call call(x, a, b, mask);
  const Tensor* const arguments[3] = {&x, &a, b ? &*b : nullptr};
  const bool needs[3] = {need_x, need_a, need_b};
  Tensor gradients[3] = {empty(x, {0}), empty(x, {0}), empty(x, {0})};
  likelihood::Output outputs[3] = {};
  for (int k = 0; k < 3; ++k) {
    if (!needs[k]) continue;
    const Tensor& t = *arguments[k];
    gradients[k] = empty(t, {t.size(0), t.size(1), t.size(2)}, t.scalar_type());
    outputs[k] = {gradients[k].mutable_data_ptr(), element_type(OP, t), {t.size(0), t.size(1), t.size(2)}};
  }
  likelihood::backward(call.problem, kind, floats(OP, call.keep(grad)), outputs, call, call.stream);
  return {gradients[0], gradients[1], gradients[2]};
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("likelihood_fwd", TORCH_BOX(&latent_engine::likelihood_fwd));
  m.impl("likelihood_bwd", TORCH_BOX(&latent_engine::likelihood_bwd));
}
