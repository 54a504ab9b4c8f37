// logistic_mixture_fwd and logistic_mixture_bwd for the CUDA dispatch key; schemas and the meaning of the arguments are in
// kernels/logistic_mixture.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "logistic_mixture.cuh"

namespace latent_engine {
namespace {

constexpr const char* OP = "logistic_mixture_log_prob";

// The arguments that both primitives share.
class Call : public Launch {
 public:
  Call(const Tensor& x, const Tensor& params, const std::optional<Tensor>& mask)
      : Launch(OP, x, x) {
    problem.x = floats(OP, keep(x));
    problem.params = keep(params).const_data_ptr();
    problem.type = element_type(OP, params);
    if (mask) problem.mask = static_cast<const bool*>(keep(*mask).const_data_ptr());
    problem.images = params.size(0), problem.N = x.size(0), problem.C = x.size(1), problem.P = x.size(2);
    problem.K = params.size(1) / problem.rows();
  }

  logistic_mixture::Problem problem{};
};

std::tuple<Tensor, Tensor> logistic_mixture_fwd(Tensor x, Tensor params, std::optional<Tensor> mask, bool save) {
  Call call(x, params, mask);
  const logistic_mixture::Problem& p = call.problem;
  Tensor log_prob = empty(x, {p.images}), stats = empty(x, {save ? p.images : 0, 4, save ? p.P : 0});
  logistic_mixture::forward(p, output(log_prob), save ? output(stats) : nullptr, call, call.stream);
  return {log_prob, stats};
}

Tensor logistic_mixture_bwd(Tensor grad, Tensor x, Tensor params, std::optional<Tensor> mask, Tensor stats) {
  Call call(x, params, mask);
  const logistic_mixture::Problem& p = call.problem;
  Tensor grad_params = empty(params, {p.images, params.size(1), p.P}, params.scalar_type());
  logistic_mixture::backward(p, floats(OP, call.keep(grad)), floats(OP, call.keep(stats)), grad_params.mutable_data_ptr(),
                             call.stream);
  return grad_params;
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("logistic_mixture_fwd", TORCH_BOX(&latent_engine::logistic_mixture_fwd));
  m.impl("logistic_mixture_bwd", TORCH_BOX(&latent_engine::logistic_mixture_bwd));
}
