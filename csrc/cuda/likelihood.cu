// likelihood_fwd and likelihood_bwd for the CUDA dispatch key; schemas and the meaning of the arguments are in
// kernels/likelihood.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "likelihood.cuh"
#include "rows.h"

namespace latent_engine {
namespace {

constexpr const char* OP = "likelihood";

// The arguments that both primitives share.
class Call : public Launch {
 public:
  Call(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& mask, int64_t event_dims)
      : Launch(OP, a, x) {
    const auto dense = [&](const Tensor& t) -> const Tensor& { return hold(with_dense_features(t, event_dims)); };
    const Tensor &dense_x = dense(x), &dense_a = dense(a);
    const Rows x_rows(dense_x, event_dims), a_rows(dense_a, event_dims);
    problem.x = floats(OP, dense_x);
    problem.a = dense_a.const_data_ptr();
    problem.a_type = element_type(OP, a);
    std::copy_n(x_rows.strides, 2, problem.x_strides);
    std::copy_n(a_rows.strides, 2, problem.a_strides);
    if (b) {
      const Tensor& dense_b = dense(*b);
      problem.b = floats(OP, dense_b);
      std::copy_n(Rows(dense_b, event_dims).strides, 3, problem.b_strides);
    }
    if (mask) {
      const Tensor& dense_mask = dense(*mask);
      problem.mask = static_cast<const bool*>(dense_mask.const_data_ptr());
      std::copy_n(Rows(dense_mask, event_dims).strides, 3, problem.mask_strides);
    }
    const auto broadcast = [&](int axis) { return x_rows.sizes[axis] == 1 ? a_rows.sizes[axis] : x_rows.sizes[axis]; };
    problem.S = broadcast(0), problem.N = broadcast(1), problem.P = x_rows.sizes[2];
  }

  likelihood::Problem problem{};
};

Tensor likelihood_fwd(Tensor x, Tensor a, std::optional<Tensor> b, std::optional<Tensor> mask, int64_t kind,
                      int64_t event_dims) {
  Call call(x, a, b, mask, event_dims);
  const int64_t rows[] = {call.problem.S, call.problem.N}, leading = std::max(x.dim(), a.dim()) - event_dims;
  Tensor log_prob = empty(x, {rows + 2 - leading, rows + 2});
  likelihood::forward(call.problem, kind, output(log_prob), call.stream);
  return log_prob;
}

std::tuple<Tensor, Tensor, Tensor> likelihood_bwd(Tensor grad, Tensor x, Tensor a, std::optional<Tensor> b,
                                                  std::optional<Tensor> mask, int64_t kind, int64_t event_dims, bool need_x,
                                                  bool need_a, bool need_b) {
  Call call(x, a, b, mask, event_dims);
  const Tensor* const arguments[3] = {&x, &a, b ? &*b : nullptr};
  const bool needs[3] = {need_x, need_a, need_b};
  Tensor gradients[3] = {empty(x, {0}), empty(x, {0}), empty(x, {0})};
  likelihood::Output outputs[3] = {};
  for (int k = 0; k < 3; ++k) {
    if (!needs[k]) continue;
    const Tensor& t = *arguments[k];
    const Rows rows(t, event_dims);
    gradients[k] = empty(t, t.sizes(), t.scalar_type());
    outputs[k] = {gradients[k].mutable_data_ptr(), element_type(OP, t), {rows.sizes[0], rows.sizes[1], rows.sizes[2]}};
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
