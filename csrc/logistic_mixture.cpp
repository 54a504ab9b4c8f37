// logistic_mixture_fwd and logistic_mixture_bwd on CPU tensors. Arguments are checked in kernels/logistic_mixture.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "binding.h"

namespace latent_engine {
namespace {

constexpr int64_t kComponentWork = 40;  // multiplications a pixel, component and channel

template <class T>
struct Inputs {
  Tensor x, params;  // keep contiguous copies alive
  std::optional<Tensor> mask;

  Inputs(const Tensor& x_, const Tensor& params_, const std::optional<Tensor>& mask_)
      : x(as_contiguous(x_)), params(as_contiguous(params_)) {
    if (mask_) mask = as_contiguous(*mask_);
  }

  LogisticMixture<T> arguments() const {
    const int64_t C = x.size(1), rows = C == 3 ? 10 : 3;
    return {params.size(0), x.size(0), C, params.size(1) / rows, x.size(2), x.const_data_ptr<T>(), params.const_data_ptr<T>(),
            mask ? mask->const_data_ptr<bool>() : nullptr};
  }
};

template <class T>
int64_t part_work(const LogisticMixture<T>& in) {
  return std::min(in.P, kLogisticPart) * in.K * in.C * kComponentWork;
}

template <class T>
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& params, const std::optional<Tensor>& mask, bool save) {
  const Inputs<T> inputs(x, params, mask);
  const LogisticMixture<T> in = inputs.arguments();
  const int64_t parts = in.parts();
  Arena<T> arena(Scratch::launch, in.images * parts);
  T* const sums = arena.take(in.images * parts);
  Tensor log_prob = empty(x, {in.images}), stats = empty(x, {save ? in.images : 0, 4, save ? in.P : 0});
  const LogisticMixtureForward<T> p{in, sums, save ? stats.mutable_data_ptr<T>() : nullptr};
  in_parts(in.images * parts, part_work(in), [&](int64_t first, int64_t last) {
    kernels<T>().logistic_mixture.forward(p, first, last);
  });
  T* const out = log_prob.mutable_data_ptr<T>();
  for (int64_t i = 0; i < in.images; ++i) {
    double total = 0;
    for (int64_t j = 0; j < parts; ++j) total += sums[i * parts + j];
    out[i] = static_cast<T>(total);
  }
  return {log_prob, stats};
}

template <class T>
Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& params, const std::optional<Tensor>& mask,
                const Tensor& stats_) {
  const Inputs<T> inputs(x, params, mask);
  const LogisticMixture<T> in = inputs.arguments();
  const Tensor stats = as_contiguous(stats_);
  Tensor dparams = empty(x, {in.images, in.planes(), in.P});
  const LogisticMixtureBackward<T> p{in, grad.const_data_ptr<T>(), grad.stride(0), stats.const_data_ptr<T>(),
                                     dparams.mutable_data_ptr<T>(), passes_cache(dparams, in.P)};
  in_parts(in.images * in.parts(), 2 * part_work(in), [&](int64_t first, int64_t last) {
    kernels<T>().logistic_mixture.backward(p, first, last);
  });
  return dparams;
}

std::tuple<Tensor, Tensor> logistic_mixture_fwd(const Tensor& x, const Tensor& params, const std::optional<Tensor>& mask,
                                                bool save) {
  return (x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>)(x, params, mask, save);
}

Tensor logistic_mixture_bwd(const Tensor& grad, const Tensor& x, const Tensor& params, const std::optional<Tensor>& mask,
                            const Tensor& stats) {
  return (x.scalar_type() == ScalarType::Double ? backward<double> : backward<float>)(grad, x, params, mask, stats);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("logistic_mixture_fwd", TORCH_BOX(&logistic_mixture_fwd));
  m.impl("logistic_mixture_bwd", TORCH_BOX(&logistic_mixture_bwd));
}

}  // namespace
}  // namespace latent_engine
