// mmd_fwd and mmd_kernel for the CUDA dispatch key; schemas and the meaning of the arguments are in kernels/mmd.py.
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "mmd.cuh"

namespace latent_engine {
namespace {

using Floats = std::vector<double>;

mmd::Points points(const Tensor& t) { return {floats("mmd2", t), t.size(0), t.stride(0), t.stride(1)}; }

mmd::Profile profile(int64_t kernel, const Floats& scales, double unit) {
  STD_TORCH_CHECK(scales.size() <= mmd::MAX_SCALES, "mmd2: at most ", mmd::MAX_SCALES, " scales on CUDA.");
  mmd::Profile p{static_cast<MmdKernel>(kernel), static_cast<int>(scales.size()), static_cast<float>(unit), {}};
  for (size_t s = 0; s < scales.size(); ++s) p.scales[s] = static_cast<float>(scales[s]);
  return p;
}

std::tuple<Tensor, Tensor, Tensor> mmd_fwd(Tensor x, Tensor y, int64_t kernel, Floats scales, double unit, int64_t estimator,
                                           Floats sections, bool need_x, bool need_y) {
  Launch call("mmd2", x, x);
  const int64_t N = x.size(0), M = y.size(0), D = x.size(1);
  Tensor value = empty(x, {}), grad_x = empty(x, {need_x ? N : 0, need_x ? D : 0});
  Tensor grad_y = empty(x, {need_y ? M : 0, need_y ? D : 0});
  const MmdWeights weights(static_cast<MmdKernel>(kernel), scales, static_cast<MmdEstimator>(estimator), sections, N, M);
  mmd::forward(profile(kernel, scales, unit), points(x), points(y), D, weights, output(value),
               need_x ? output(grad_x) : nullptr, need_y ? output(grad_y) : nullptr, call, call.stream);
  return {value, grad_x, grad_y};
}

Tensor mmd_kernel(Tensor x, Tensor y, int64_t kernel, Floats scales, double unit) {
  const Launch call("mmd2", x, x);
  Tensor out = empty(x, {x.size(0), y.size(0)});
  mmd::matrix(profile(kernel, scales, unit), points(x), points(y), x.size(1), output(out), call.stream);
  return out;
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("mmd_fwd", TORCH_BOX(&latent_engine::mmd_fwd));
  m.impl("mmd_kernel", TORCH_BOX(&latent_engine::mmd_kernel));
}
