// importance_fwd, importance_bwd and importance_moments for the CUDA dispatch key; schemas and the meaning of the arguments are
// in kernels/importance.py and kernels/importance_statistics.py.
#include <cmath>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "importance.cuh"

namespace latent_engine {
namespace {

constexpr const char* OP = "importance";

class Call : public Launch {
 public:
  explicit Call(const Tensor& like) : Launch(OP, like, like) {}

  const float* values(const Tensor& t) { return floats(OP, keep(t)); }
  const float* values(const std::optional<Tensor>& t) { return t ? values(*t) : nullptr; }

  importance::Samples samples(const Tensor& z, const Tensor& mu, const Tensor& log_var, bool normal_prior) {
    importance::Samples p{z.const_data_ptr(), element_type(OP, z), z.stride(0), z.stride(1), z.stride(2), z.size(0), z.size(1),
                          z.size(2), normal_prior, values(mu), nullptr, nullptr};
    importance::prepare_posterior(p, floats(OP, log_var), log_var.stride(0), log_var.stride(1), *this, stream);
    return p;
  }
};

std::tuple<Tensor, Tensor, Tensor> importance_fwd(std::optional<Tensor> z, std::optional<Tensor> mu,
                                                  std::optional<Tensor> log_var, Tensor log_px, std::optional<Tensor> log_pz,
                                                  double alpha, double elbo_weight, int64_t groups, bool need_weights) {
  Call call(log_px);
  const int64_t S = log_px.size(0), N = log_px.size(1);
  const bool need = need_weights && groups > 0;
  Tensor log_w = empty(log_px, {z ? S : 0, z ? N : 0}), bound = empty(log_px, {groups ? N : 0});
  Tensor weights = empty(log_px, {need ? S : 0, need ? N : 0});
  const float* x = call.values(log_px);
  if (z) {
    importance::all_log_weights(call.samples(*z, *mu, *log_var, !log_pz), x, call.values(log_pz), output(log_w), call.stream);
    x = output(log_w);
  }
  if (groups) {
    const bool extreme = std::isinf(alpha);
    const importance::Order order{alpha > 1 ? -1.f : 1.f, extreme ? 1.f : static_cast<float>(std::abs(1 - alpha)), extreme};
    importance::reduce(x, S, N, {groups, order, static_cast<float>(elbo_weight)}, output(bound),
                       need ? output(weights) : nullptr, call, call.stream);
  }
  return {bound, log_w, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> importance_bwd(std::optional<Tensor> grad, Tensor weights, Tensor z, Tensor mu,
                                                          Tensor log_var, bool normal_prior, bool need_z, bool need_posterior) {
  Call call(mu);
  const importance::Samples p = call.samples(z, mu, log_var, normal_prior);
  const int64_t n = need_posterior ? p.N : 0, d = need_posterior ? p.D : 0;
  Tensor grad_log_w = empty(mu, {grad ? p.S : 0, grad ? p.N : 0});
  Tensor grad_z = empty(z, {need_z ? p.S : 0, need_z ? p.N : 0, need_z ? p.D : 0}, z.scalar_type());
  Tensor grad_mu = empty(mu, {n, d}), grad_log_var = empty(mu, {n, d});
  if (p.S == 0)
    for (Tensor* t : {&grad_mu, &grad_log_var}) torch::stable::zero_(*t);
  const importance::Upstream up{call.values(weights), call.values(grad), grad ? output(grad_log_w) : nullptr};
  importance::backward_samples(p, up, need_z ? grad_z.mutable_data_ptr() : nullptr, need_posterior ? output(grad_mu) : nullptr,
                               need_posterior ? output(grad_log_var) : nullptr, call, call.stream);
  return {grad_z, grad_mu, grad_log_var, grad_log_w};
}

Tensor importance_moments(Tensor log_w, Tensor state) {
  Call call(log_w);
  Tensor out = empty(log_w, {importance::MOMENTS, log_w.size(1)}, ScalarType::Double);
  importance::add_moments(call.values(log_w), log_w.size(0), log_w.size(1),
                          static_cast<const double*>(call.keep(state).const_data_ptr()),
                          static_cast<double*>(out.mutable_data_ptr()), call, call.stream);
  return out;
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("importance_fwd", TORCH_BOX(&latent_engine::importance_fwd));
  m.impl("importance_bwd", TORCH_BOX(&latent_engine::importance_bwd));
  m.impl("importance_moments", TORCH_BOX(&latent_engine::importance_moments));
}
