// likelihood_fwd and likelihood_bwd on CPU tensors: allocation, the cut into tasks, launch. Arguments are checked in
// kernels/likelihood.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "binding.h"
#include "rows.h"

namespace latent_engine {
namespace {

constexpr int64_t kWork[kLikelihoods] = {16, 4, 40, 100};  // multiplications a value of each likelihood

template <class T>
LikelihoodOperand<T> operand(const Tensor& t, const Rows& rows) {
  return {t.const_data_ptr<T>(), {rows.strides[0], rows.strides[1]}, rows.strides[2]};
}

// Tasks share out the samples, so that each reads one stretch of memory, and the rows of x as far as those that all samples
// share would leave the cache. Where a gradient is summed over samples they share the rows first: fewer sums to merge.
LikelihoodGrid cut(int64_t S, int64_t N, int64_t row_bytes, int64_t work, bool gradient, bool sums_samples) {
  const int64_t tasks = task_count(S * N * work);
  const int64_t wanted = sums_samples ? tasks : ceil_div(N * row_bytes, likelihood_cache(gradient));
  const int64_t s_chunks = std::clamp<int64_t>(S, 1, tasks / std::clamp<int64_t>(wanted, 1, tasks));
  return {s_chunks, std::clamp<int64_t>(N, 1, tasks / s_chunks)};
}

// The arguments that both primitives share; keeps their contiguous copies alive.
template <class T>
struct Call {
  Tensor x, a;
  std::optional<Tensor> b, mask;
  LikelihoodInputs<T> inputs{};
  LikelihoodGrid grid;

  Call(const Tensor& x_, const Tensor& a_, const std::optional<Tensor>& b_, const std::optional<Tensor>& mask_, int64_t kind,
       int64_t event_dims, const bool (&needs)[3])
      : x(with_dense_features(x_, event_dims)),
        a(with_dense_features(a_, event_dims)),
        b(with_dense_features(b_, event_dims)),
        mask(with_dense_features(mask_, event_dims)) {
    const Rows rows[] = {Rows(x, event_dims), Rows(a, event_dims), b ? Rows(*b, event_dims) : Rows()};
    const auto broadcast = [&](int axis) { return rows[0].sizes[axis] == 1 ? rows[1].sizes[axis] : rows[0].sizes[axis]; };
    inputs.S = broadcast(0), inputs.N = broadcast(1), inputs.P = rows[0].sizes[2];
    inputs.x = operand<T>(x, rows[0]), inputs.a = operand<T>(a, rows[1]);
    inputs.derived = nullptr, inputs.derived_size = 0;
    if (b) {
      inputs.b = operand<T>(*b, rows[2]);
      inputs.derived_size = round_up(std::max<int64_t>(rows[2].sizes[2], 1), kLikelihoodPad);
    }
    if (mask) inputs.mask = operand<bool>(*mask, Rows(*mask, event_dims));
    bool gradient = false, sums_samples = false;
    for (int k = 0; k < 3; ++k) {
      gradient |= needs[k];
      sums_samples |= needs[k] && rows[k].sizes[0] < inputs.S && rows[k].sizes[1] > 1;
    }
    grid = cut(inputs.S, inputs.N, inputs.P * int64_t(sizeof(T)), inputs.P * kWork[kind], gradient, sums_samples);
  }

  bool same_for_all_rows() const { return b && inputs.b.strides[0] == 0 && inputs.b.strides[1] == 0 && inputs.P; }
  int64_t derived() const { return same_for_all_rows() ? kLikelihoodDerived * inputs.derived_size : 0; }
};

template <class T>
Tensor forward(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& mask,
               int64_t kind, int64_t event_dims) {
  Call<T> call(x, a, b, mask, kind, event_dims, {});
  Arena<T> arena(Scratch::launch, call.derived());
  const LikelihoodKernels<T>& kernel = kernels<T>().likelihood[kind];
  if (call.derived()) {
    call.inputs.derived = arena.take(call.derived());
    kernel.derive(call.inputs);
  }
  const int64_t rows[] = {call.inputs.S, call.inputs.N}, leading = std::max(x.dim(), a.dim()) - event_dims;
  Tensor log_prob = empty(x, {rows + 2 - leading, rows + 2});
  const LikelihoodForward<T> p{call.inputs, call.grid, log_prob.mutable_data_ptr<T>()};
  for_each_task(call.grid.tasks(), [&](int64_t task) { kernel.forward(p, task); });
  return log_prob;
}

// out = the sums over chunks of gradient.partial, in order.
template <class T>
void merge(const LikelihoodGradient<T>& gradient, const LikelihoodGrid& grid, int64_t S, int64_t N, int64_t P, T* out) {
  const int64_t s_sum = gradient.per_s ? 1 : grid.s_chunks, n_sum = gradient.per_n ? 1 : grid.n_chunks;
  const int64_t s_size = gradient.per_s ? S : 1, n_size = gradient.per_n ? N : 1, p_size = gradient.per_p ? P : 1;
  in_parts(s_size * n_size * p_size, s_sum * n_sum, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t p = i % p_size, n = i / p_size % n_size, s = i / p_size / n_size;
      double sum = 0;
      for (int64_t j = 0; j < s_sum; ++j)
        for (int64_t k = 0; k < n_sum; ++k) sum += gradient.partial[((s + j) * n_size * n_sum + n + k) * p_size + p];
      out[i] = T(sum);
    }
  });
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& x, const Tensor& a,
                                            const std::optional<Tensor>& b, const std::optional<Tensor>& mask, int64_t kind,
                                            int64_t event_dims, bool need_x, bool need_a, bool need_b) {
  const bool needs[3] = {need_x, need_a, need_b};
  Call<T> call(x, a, b, mask, kind, event_dims, needs);
  const LikelihoodGrid& grid = call.grid;
  const int64_t S = call.inputs.S, N = call.inputs.N, P = call.inputs.P;
  const Tensor* const arguments[3] = {&x, &a, b ? &*b : nullptr};
  Tensor outputs[3] = {empty(x, {0}), empty(x, {0}), empty(x, {0})};
  LikelihoodGradient<T> gradients[3] = {};
  int64_t partial[3] = {}, doubles = 0;
  for (int k = 0; k < 3; ++k) {
    if (!needs[k]) continue;
    const Tensor& t = *arguments[k];
    outputs[k] = empty(x, t.sizes());
    const Rows rows(t, event_dims);
    gradients[k] = {nullptr, nullptr, rows.sizes[0] == S, rows.sizes[1] == N, rows.sizes[2] == P};
    if (gradients[k].per_s && gradients[k].per_n && gradients[k].per_p)
      gradients[k].full = outputs[k].mutable_data_ptr<T>();
    else
      partial[k] = (gradients[k].per_s ? S : grid.s_chunks) * (gradients[k].per_n ? N : grid.n_chunks) *
                   (gradients[k].per_p ? P : 1);
    doubles += round_up(partial[k], 16);
  }
  constexpr int64_t width = sizeof(double) / sizeof(T);
  Arena<T> arena(Scratch::launch, call.derived(), width * doubles);
  const LikelihoodKernels<T>& kernel = kernels<T>().likelihood[kind];
  if (call.derived()) {
    call.inputs.derived = arena.take(call.derived());
    kernel.derive_backward(call.inputs);
  }
  for (int k = 0; k < 3; ++k)
    if (needs[k] && !gradients[k].full) {
      gradients[k].partial = reinterpret_cast<double*>(arena.take(width * round_up(partial[k], 16)));
      if (S * N * P == 0) std::fill_n(gradients[k].partial, partial[k], 0.0);  // no block of features will
    }
  const Rows grad_rows(grad, 0);
  const LikelihoodBackward<T> p{call.inputs, grid, grad.const_data_ptr<T>(), {grad_rows.strides[0], grad_rows.strides[1]},
                                {gradients[0], gradients[1], gradients[2]}};
  for_each_task(grid.tasks(), [&](int64_t task) { kernel.backward(p, task); });
  for (int k = 0; k < 3; ++k)
    if (needs[k] && !gradients[k].full) merge(gradients[k], grid, S, N, P, outputs[k].mutable_data_ptr<T>());
  return {outputs[0], outputs[1], outputs[2]};
}

Tensor likelihood_fwd(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& mask,
                      int64_t kind, int64_t event_dims) {
  const auto f = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(x, a, b, mask, kind, event_dims);
}

std::tuple<Tensor, Tensor, Tensor> likelihood_bwd(const Tensor& grad, const Tensor& x, const Tensor& a,
                                                  const std::optional<Tensor>& b, const std::optional<Tensor>& mask,
                                                  int64_t kind, int64_t event_dims, bool need_x, bool need_a, bool need_b) {
  const auto f = x.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return f(grad, x, a, b, mask, kind, event_dims, need_x, need_a, need_b);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("likelihood_fwd", TORCH_BOX(&likelihood_fwd));
  m.impl("likelihood_bwd", TORCH_BOX(&likelihood_bwd));
}

}  // namespace
}  // namespace latent_engine
