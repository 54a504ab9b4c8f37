// gmm_full_fwd, gmm_full_bwd and gmm_full_moments for the CUDA dispatch key; schemas and the meaning of the arguments are in
// kernels/gmm_full.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "gmm_full.cuh"

namespace latent_engine {
namespace {

constexpr const char* kOp = "gmm_full_log_prob";

// The arguments that the primitives share.
class Call : public Launch {
 public:
  Call(const Tensor& z, const Tensor& means, const Tensor& chol, const Tensor& log_weights)
      : Launch(kOp, z, means) {
    STD_TORCH_CHECK(means.size(1) <= gmm_full::MAX_DIM, kOp, ": serves up to ", gmm_full::MAX_DIM, " dimensions on CUDA.");
    problem.z = z.const_data_ptr();
    problem.z_type = element_type(kOp, z);
    problem.z_row = z.stride(0), problem.z_col = z.stride(1);
    problem.means = floats(kOp, keep(means)), problem.chol = floats(kOp, keep(chol));
    problem.N = z.size(0), problem.K = means.size(0), problem.D = means.size(1);
    gmm_full::prepare_mixture(problem, floats(kOp, keep(log_weights)), *this, stream);
  }

  gmm_full::Problem problem{};
};

using Moments = std::tuple<Tensor, Tensor, Tensor>;

Moments moments(Call& call, const gmm_full::Upstream& up, const Tensor& like, bool need_mixture) {
  const gmm_full::Problem& p = call.problem;
  const int64_t K = need_mixture ? p.K : 0, D = need_mixture ? p.D : 0;
  Tensor weight = empty(like, {K}, ScalarType::Double), first = empty(like, {K, D}, ScalarType::Double),
         second = empty(like, {K, D, D}, ScalarType::Double);
  const auto doubles = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
  if (need_mixture && p.N > 0) {
    gmm_full::moments(p, up, {doubles(weight), doubles(first), doubles(second)}, call, call.stream);
  } else {
    for (Tensor* t : {&weight, &first, &second}) torch::stable::zero_(*t);
  }
  return {weight, first, second};
}

std::tuple<Tensor, std::optional<Tensor>> gmm_full_fwd(Tensor z, Tensor means, Tensor chol, Tensor log_weights,
                                                       bool responsibilities) {
  Call call(z, means, chol, log_weights);
  const gmm_full::Problem& p = call.problem;
  Tensor log_prob = empty(means, {p.N});
  std::optional<Tensor> resp;
  if (responsibilities) resp = empty(means, {p.N, p.K});
  gmm_full::forward(p, output(log_prob), resp ? output(*resp) : nullptr, call, call.stream);
  return {log_prob, resp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_full_bwd(Tensor grad, Tensor z, Tensor means, Tensor chol, Tensor log_weights,
                                                        Tensor log_prob, std::optional<Tensor> coef, bool need_z,
                                                        bool need_mixture) {
  Call call(z, means, chol, log_weights);
  const gmm_full::Problem& p = call.problem;
  const gmm_full::Upstream up{floats(kOp, call.keep(grad)), floats(kOp, call.keep(log_prob)),
                              coef ? floats(kOp, call.keep(*coef)) : nullptr};
  Tensor grad_z = empty(z, {need_z ? p.N : 0, need_z ? p.D : 0}, z.scalar_type());
  if (need_z) gmm_full::backward_z(p, up, grad_z.mutable_data_ptr(), call, call.stream);
  return std::tuple_cat(std::tuple(grad_z), moments(call, up, means, need_mixture));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gmm_full_moments(std::optional<Tensor> weights, Tensor z, Tensor means, Tensor chol,
                                                            Tensor log_weights) {
  Call call(z, means, chol, log_weights);
  Tensor log_prob = empty(means, {call.problem.N});
  gmm_full::forward(call.problem, output(log_prob), nullptr, call, call.stream);
  const gmm_full::Upstream up{weights ? floats(kOp, call.keep(*weights)) : nullptr, output(log_prob), nullptr};
  return std::tuple_cat(std::tuple(log_prob), moments(call, up, means, true));
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("gmm_full_fwd", TORCH_BOX(&latent_engine::gmm_full_fwd));
  m.impl("gmm_full_bwd", TORCH_BOX(&latent_engine::gmm_full_bwd));
  m.impl("gmm_full_moments", TORCH_BOX(&latent_engine::gmm_full_moments));
}
