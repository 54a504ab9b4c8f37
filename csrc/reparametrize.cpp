// reparametrize_fwd and reparametrize_bwd on CPU tensors: allocation, the cut into tasks, launch. Arguments are checked in
// kernels/reparametrize.py.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "binding.h"

namespace latent_engine {
namespace {

// Multiplications in the time of an element, of a sample of one, and of making its noise.
constexpr int64_t kExpWork = 24, kSampleWork = 8, kNoiseWork = 24;
constexpr int64_t kLeastElements = 256;            // of a task: a kilobyte of each sample

bool are_keys(const Tensor& noise) { return noise.scalar_type() == ScalarType::Long; }

// As it is if the elements of a row lie next to one another.
Tensor with_dense_rows(const Tensor& t) {
  if (t.dim() == 0) return t;
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : contiguous_copy(t);
}

// [N, D] or [S, N, D]; nothing of keys.
template <class T>
ReparametrizeArray<T> array(const Tensor& t) {
  if (are_keys(t)) return {};
  const bool sampled = t.dim() == 3;
  return {t.const_data_ptr<T>(), sampled ? t.stride(0) : 0, t.stride(sampled ? 1 : 0)};
}

template <class T>
struct Call {
  Tensor mean, log_var, noise;  // keeps the contiguous copies alive
  bool sampled;                 // whether z has an axis of samples
  ReparametrizeInputs<T> inputs;

  Call(const Tensor& mean_, const Tensor& log_var_, const Tensor& noise_)
      : mean(with_dense_rows(mean_)), log_var(with_dense_rows(log_var_)), noise(with_dense_rows(noise_)),
        sampled(noise.dim() == (are_keys(noise) ? 1 : 3)),
        inputs{sampled ? noise.size(0) : 1, mean.size(0), mean.size(1), array<T>(mean), array<T>(log_var), array<T>(noise),
               are_keys(noise) ? noise.const_data_ptr<int64_t>() : nullptr} {}

  template <class F>
  void run(const F& rows) const {
    const int64_t N = inputs.N, D = inputs.D, block = ceil_div(kLeastElements, std::max<int64_t>(D, 1));
    const int64_t work = kExpWork + inputs.S * (kSampleWork + (inputs.keys ? kNoiseWork : 0));
    in_parts(ceil_div(N, block), block * D * work,
             [&](int64_t first, int64_t last) { rows(first * block, std::min(N, last * block)); });
  }
};

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& mean, const Tensor& log_var, const Tensor& noise) {
  const Call<T> call(mean, log_var, noise);
  const int64_t S = call.inputs.S, N = call.inputs.N, D = call.inputs.D;
  Tensor z = call.sampled ? empty(log_var, {S, N, D}) : empty(log_var, {N, D}), kl = empty(log_var, {N, D});
  const ReparametrizeForward<T> p{call.inputs, z.mutable_data_ptr<T>(), kl.mutable_data_ptr<T>(), passes_cache(z, D),
                                  passes_cache(kl, D)};
  call.run([&](int64_t first, int64_t last) { kernels<T>().reparametrize.forward(p, first, last); });
  return {z, kl};
}

template <class T>
std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_z_, const std::optional<Tensor>& grad_kl_,
                                    const Tensor& mean, const Tensor& log_var, const Tensor& noise, bool need_mean,
                                    bool need_log_var) {
  const Call<T> call(mean, log_var, noise);
  const int64_t N = call.inputs.N, D = call.inputs.D;
  const std::optional<Tensor> grad_z = grad_z_ ? std::optional<Tensor>(with_dense_rows(*grad_z_)) : std::nullopt;
  const bool shared = grad_kl_ && grad_kl_->stride(1) == 0;  // of a sum
  const std::optional<Tensor> grad_kl =
      grad_kl_ ? std::optional<Tensor>(shared ? *grad_kl_ : with_dense_rows(*grad_kl_)) : std::nullopt;
  Tensor dmean = empty(log_var, {need_mean ? N : 0, need_mean ? D : 0});
  Tensor dlog_var = empty(log_var, {need_log_var ? N : 0, need_log_var ? D : 0});
  const ReparametrizeBackward<T> p{call.inputs,
                                   grad_z ? array<T>(*grad_z) : ReparametrizeArray<T>{},
                                   grad_kl ? array<T>(*grad_kl) : ReparametrizeArray<T>{},
                                   shared,
                                   need_mean ? dmean.mutable_data_ptr<T>() : nullptr,
                                   need_log_var ? dlog_var.mutable_data_ptr<T>() : nullptr,
                                   (!need_mean || passes_cache(dmean, D)) && (!need_log_var || passes_cache(dlog_var, D))};
  call.run([&](int64_t first, int64_t last) { kernels<T>().reparametrize.backward(p, first, last); });
  return {dmean, dlog_var};
}

std::tuple<Tensor, Tensor> reparametrize_fwd(const Tensor& mean, const Tensor& log_var, const Tensor& noise) {
  return (mean.scalar_type() == ScalarType::Double ? forward<double> : forward<float>)(mean, log_var, noise);
}

// A key of 63 bits from the default generator, as noise_keys() draws it.
Tensor draw_key() {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(0, nullptr, nullptr, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &handle));
  std::array<StableIValue, 2> stack{torch::stable::detail::from(Tensor(handle)), torch::stable::detail::from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor> reparametrize_drawn_fwd(const Tensor& mean, const Tensor& log_var) {
  const Tensor key = draw_key();
  const auto [z, kl] = reparametrize_fwd(mean, log_var, key);
  return {z, kl, key};
}

std::tuple<Tensor, Tensor> reparametrize_bwd(const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_kl,
                                             const Tensor& mean, const Tensor& log_var, const Tensor& noise, bool need_mean,
                                             bool need_log_var) {
  const auto f = mean.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return f(grad_z, grad_kl, mean, log_var, noise, need_mean, need_log_var);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("reparametrize_fwd", TORCH_BOX(&reparametrize_fwd));
  m.impl("reparametrize_drawn_fwd", TORCH_BOX(&reparametrize_drawn_fwd));
  m.impl("reparametrize_bwd", TORCH_BOX(&reparametrize_bwd));
}

}  // namespace
}  // namespace latent_engine
