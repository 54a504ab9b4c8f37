// The primitives of kernels/gmm.py for the CUDA dispatch key; schemas and the meaning of the arguments are there.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "gmm.cuh"

namespace latent_engine {
namespace {

// The arguments that the primitives share.
class Call : public Launch {
 public:
  Call(const Tensor& z, const Tensor& means, const Tensor& log_vars, const Tensor& log_weights,
       const std::optional<Tensor>& labels, const std::optional<Tensor>& allowed)
      : Launch("gmm_log_prob", z, means) {
    problem.z = z.const_data_ptr();
    problem.z_type = element_type("gmm_log_prob", z);
    problem.z_row = z.stride(0), problem.z_col = z.stride(1);
    problem.means = floats("gmm_log_prob", keep(means));
    if (labels) problem.labels = static_cast<const int64_t*>(keep(*labels).const_data_ptr());
    if (allowed) problem.allowed = static_cast<const bool*>(keep(*allowed).const_data_ptr());
    problem.N = z.size(0), problem.K = means.size(0), problem.D = means.size(1);
    const gmm::LogVars strided{floats("gmm_log_prob", log_vars), log_vars.stride(0), log_vars.stride(1)};
    gmm::prepare_mixture(problem, strided, floats("gmm_log_prob", keep(log_weights)), *this, stream);
  }

  gmm::Problem problem{};
};

std::tuple<Tensor, std::optional<Tensor>> gmm_fwd(Tensor z, Tensor means, Tensor log_vars, Tensor log_weights,
                                                  std::optional<Tensor> labels, std::optional<Tensor> allowed,
                                                  bool responsibilities) {
  Call call(z, means, log_vars, log_weights, labels, allowed);
  const gmm::Problem& p = call.problem;
  Tensor log_prob = empty(means, {p.N});
  std::optional<Tensor> resp;
  if (responsibilities) resp = empty(means, {p.N, p.K});
  gmm::forward(p, output(log_prob), resp ? output(*resp) : nullptr, call, call.stream);
  return {log_prob, resp};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// If `plain`, Σ a δ and Σ a δ² instead of the gradients of means and log_vars.
Gradients backward(Tensor grad, Tensor z, Tensor means, Tensor log_vars, Tensor log_weights, Tensor log_prob,
                   std::optional<Tensor> labels, std::optional<Tensor> allowed, std::optional<Tensor> coef, bool need_z,
                   bool need_mixture, bool plain) {
  Call call(z, means, log_vars, log_weights, labels, allowed);
  const gmm::Problem& p = call.problem;
  const gmm::Upstream up{floats("gmm_log_prob", call.keep(grad)), floats("gmm_log_prob", call.keep(log_prob)),
                         coef ? floats("gmm_log_prob", call.keep(*coef)) : nullptr};
  const int64_t N = need_z ? p.N : 0, K = need_mixture ? p.K : 0, D = p.D;
  Tensor grad_z = empty(z, {N, need_z ? D : 0}, z.scalar_type());
  Tensor grad_means = empty(means, {K, need_mixture ? D : 0}), grad_log_vars = empty(means, {K, need_mixture ? D : 0});
  Tensor grad_log_weights = empty(means, {K});
  if (need_z) gmm::backward_z(p, up, grad_z.mutable_data_ptr(), call, call.stream);
  if (need_mixture && p.N > 0) {
    gmm::backward_mixture(p, up, output(grad_means), output(grad_log_vars), output(grad_log_weights), plain, call,
                          call.stream);
  } else {
    for (Tensor* t : {&grad_means, &grad_log_vars, &grad_log_weights}) torch::stable::zero_(*t);
  }
  return {grad_z, grad_means, grad_log_vars, grad_log_weights};
}

Gradients gmm_bwd(Tensor grad, Tensor z, Tensor means, Tensor log_vars, Tensor log_weights, Tensor log_prob,
                  std::optional<Tensor> labels, std::optional<Tensor> allowed, std::optional<Tensor> coef, bool need_z,
                  bool need_mixture) {
  return backward(grad, z, means, log_vars, log_weights, log_prob, labels, allowed, coef, need_z, need_mixture, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gmm_fwd_bwd(Tensor grad, Tensor z, Tensor means, Tensor log_vars,
                                                               Tensor log_weights, std::optional<Tensor> labels,
                                                               std::optional<Tensor> allowed) {
  const Tensor log_prob = std::get<0>(gmm_fwd(z, means, log_vars, log_weights, labels, allowed, false));
  return std::tuple_cat(std::tuple(log_prob), gmm_bwd(grad, z, means, log_vars, log_weights, log_prob, labels, allowed,
                                                      std::nullopt, true, true));
}

Gradients gmm_moments(Tensor weights, Tensor z, Tensor means, Tensor log_vars, Tensor log_weights) {
  const Tensor log_prob = std::get<0>(gmm_fwd(z, means, log_vars, log_weights, std::nullopt, std::nullopt, false));
  const auto [grad_z, first, second, counts] = backward(weights, z, means, log_vars, log_weights, log_prob, std::nullopt,
                                                        std::nullopt, std::nullopt, false, true, true);
  return {log_prob, counts, first, second};
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("gmm_fwd", TORCH_BOX(&latent_engine::gmm_fwd));
  m.impl("gmm_bwd", TORCH_BOX(&latent_engine::gmm_bwd));
  m.impl("gmm_fwd_bwd", TORCH_BOX(&latent_engine::gmm_fwd_bwd));
  m.impl("gmm_moments", TORCH_BOX(&latent_engine::gmm_moments));
}
