// reparametrize_fwd and reparametrize_bwd for the CUDA dispatch key; schemas and the meaning of the arguments are in
// kernels/reparametrize.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "reparametrize.cuh"

namespace latent_engine {
namespace {

constexpr const char* OP = "reparametrize";

reparametrize::Array array(const Tensor& t) {
  const bool sampled = t.dim() == 3;
  return {floats(OP, t), sampled ? t.stride(0) : 0, t.stride(sampled), t.stride(1 + sampled)};
}

reparametrize::Array array(const std::optional<Tensor>& t) { return t ? array(*t) : reparametrize::Array{}; }

reparametrize::Inputs inputs(const Tensor& mean, const Tensor& log_var, const Tensor& noise) {
  reparametrize::Inputs in(noise.dim() == 3 ? noise.size(0) : 1, mean.size(0), mean.size(1));
  in.mean = mean.const_data_ptr(), in.type = element_type(OP, mean);
  in.mean_stride_n = mean.stride(0), in.mean_stride_d = mean.stride(1);
  in.log_var = array(log_var), in.noise = array(noise);
  return in;
}

std::tuple<Tensor, Tensor> reparametrize_fwd(Tensor mean, Tensor log_var, Tensor noise) {
  const Launch call(OP, mean, mean);
  const reparametrize::Inputs in = inputs(mean, log_var, noise);
  Tensor z = noise.dim() == 3 ? empty(mean, {in.S, in.N, in.D}) : empty(mean, {in.N, in.D}), kl = empty(mean, {in.N, in.D});
  reparametrize::run_forward(in, output(z), output(kl), call.stream);
  return {z, kl};
}

std::tuple<Tensor, Tensor> reparametrize_bwd(std::optional<Tensor> grad_z, std::optional<Tensor> grad_kl, Tensor mean,
                                             Tensor log_var, Tensor noise, bool need_mean, bool need_log_var) {
  const Launch call(OP, mean, mean);
  const reparametrize::Inputs in = inputs(mean, log_var, noise);
  Tensor dmean = empty(mean, {need_mean ? in.N : 0, need_mean ? in.D : 0}, mean.scalar_type());
  Tensor dlog_var = empty(mean, {need_log_var ? in.N : 0, need_log_var ? in.D : 0});
  const reparametrize::Gradients p{array(grad_z), array(grad_kl), need_mean ? dmean.mutable_data_ptr() : nullptr,
                                   need_log_var ? output(dlog_var) : nullptr};
  reparametrize::run_backward(in, p, call.stream);
  return {dmean, dlog_var};
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("reparametrize_fwd", TORCH_BOX(&latent_engine::reparametrize_fwd));
  m.impl("reparametrize_bwd", TORCH_BOX(&latent_engine::reparametrize_bwd));
}
