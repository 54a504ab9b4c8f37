// pairwise_kl_fwd, pairwise_kl_bwd and pairwise_kl_diversity_fwd for the CUDA dispatch key; schemas and the meaning of the
// arguments are in kernels/pairwise_kl.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "pairwise_kl.cuh"

namespace latent_engine {
namespace {

class PairCall : public Launch {
 public:
  PairCall(const char* op, const Tensor& mu, const Tensor& log_var) : Launch(op, mu, mu) {
    batch = {floats(op, mu), floats(op, log_var), {mu.stride(0), mu.stride(1)}, {log_var.stride(0), log_var.stride(1)},
             mu.size(0), mu.size(1)};
  }

  pairwise_kl::Batch batch{};
};

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_kl_fwd(Tensor mu, Tensor log_var, bool need_std, bool need_grad) {
  PairCall call("pairwise_kl", mu, log_var);
  const int64_t N = call.batch.N, D = call.batch.D;
  need_grad = need_grad && need_std;
  Tensor mean = empty(mu, {D}), moments = empty(mu, {pairwise_kl::MOMENTS, D});
  Tensor deviation = need_std ? empty(mu, {}) : empty(mu, {0}), unit = empty(mu, {need_grad ? 2 : 0, N, D});
  pairwise_kl::statistics(call.batch, output(mean), output(moments), need_std ? output(deviation) : nullptr,
                          need_grad ? output(unit) : nullptr, call, call.stream);
  return {mean, deviation, moments, unit};
}

std::tuple<Tensor, Tensor> pairwise_kl_bwd(Tensor grad_mean, std::optional<Tensor> grad_std, Tensor mu, Tensor log_var,
                                           Tensor moments, Tensor unit) {
  PairCall call("pairwise_kl", mu, log_var);
  const pairwise_kl::Incoming in{floats("pairwise_kl", grad_mean), grad_std ? floats("pairwise_kl", *grad_std) : nullptr,
                                 floats("pairwise_kl", call.keep(unit)), grad_mean.stride(0)};
  Tensor by_mu = empty(mu, {call.batch.N, call.batch.D}), by_log_var = empty(mu, {call.batch.N, call.batch.D});
  pairwise_kl::backward(call.batch, floats("pairwise_kl", call.keep(moments)), in, output(by_mu), output(by_log_var),
                        call.stream);
  return {by_mu, by_log_var};
}

std::tuple<Tensor, Tensor> pairwise_kl_diversity_fwd(Tensor mu, Tensor log_var, bool need_grad) {
  PairCall call("pairwise_kl_diversity", mu, log_var);
  Tensor value = empty(mu, {}), unit = empty(mu, {need_grad ? 2 : 0, call.batch.N, call.batch.D});
  pairwise_kl::diversity(call.batch, output(value), need_grad ? output(unit) : nullptr, call, call.stream);
  return {value, unit};
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("pairwise_kl_fwd", TORCH_BOX(&latent_engine::pairwise_kl_fwd));
  m.impl("pairwise_kl_bwd", TORCH_BOX(&latent_engine::pairwise_kl_bwd));
  m.impl("pairwise_kl_diversity_fwd", TORCH_BOX(&latent_engine::pairwise_kl_diversity_fwd));
}
