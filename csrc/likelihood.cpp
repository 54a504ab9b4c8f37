// likelihood_fwd and likelihood_bwd on CPU tensors: allocation, the cut into tasks, launch. Arguments are checked in
// kernels/likelihood.py.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "binding.h"

namespace latent_engine {
namespace {

constexpr int64_t kWork[kLikelihoods] = {16, 4, 40, 100};  // multiplications a value of each likelihood

template <class T>
LikelihoodOperand<T> operand(const Tensor& t) {
  const auto stride = [&](int dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  return {t.const_data_ptr<T>(), {stride(0), stride(1)}, stride(2)};
}

// As it is if features lie next to one another.
Tensor with_dense_features(const Tensor& t) { return t.size(2) <= 1 || t.stride(2) == 1 ? t : torch::stable::contiguous(t); }

std::optional<Tensor> with_dense_features(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(with_dense_features(*t)) : std::nullopt;
}

// A power of two of tasks: three of them would keep two threads busy as long as four.
LikelihoodGrid cut(int64_t S, int64_t N, int64_t work) {
  int64_t tasks = 1;
  while (tasks < std::min(kMaxTasks, S * N * work / kTaskWork)) tasks *= 2;
  const int64_t n_chunks = std::clamp<int64_t>(N, 1, tasks);
  return {std::clamp<int64_t>(S, 1, tasks / n_chunks), n_chunks};
}

// The arguments that both primitives share; keeps their contiguous copies alive.
template <class T>
struct Call {
  Tensor x, a;
  std::optional<Tensor> b, mask;
  LikelihoodInputs<T> inputs;
  LikelihoodGrid grid;

  Call(const Tensor& x_, const Tensor& a_, const std::optional<Tensor>& b_, const std::optional<Tensor>& mask_, int64_t kind)
      : x(with_dense_features(x_)), a(with_dense_features(a_)), b(with_dense_features(b_)), mask(with_dense_features(mask_)) {
    inputs.S = std::max(x.size(0), a.size(0)), inputs.N = std::max(x.size(1), a.size(1)), inputs.P = x.size(2);
    if (a.size(0) == 0 || x.size(0) == 0) inputs.S = 0;
    if (a.size(1) == 0 || x.size(1) == 0) inputs.N = 0;
    inputs.x = operand<T>(x), inputs.a = operand<T>(a);
    inputs.b = b ? operand<T>(*b) : LikelihoodOperand<T>{};
    inputs.mask = mask ? operand<bool>(*mask) : LikelihoodOperand<bool>{};
    inputs.derived = nullptr;
    inputs.derived_size = b ? round_up(std::max<int64_t>(b->size(2), 1), kLikelihoodPad) : 0;
    grid = cut(inputs.S, inputs.N, inputs.P * kWork[kind]);
  }

  bool same_for_all_rows() const { return b && inputs.b.strides[0] == 0 && inputs.b.strides[1] == 0 && inputs.P; }
  int64_t derived() const { return same_for_all_rows() ? kLikelihoodDerived * inputs.derived_size : 0; }
};

template <class T>
Tensor forward(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& mask,
               int64_t kind) {
  Call<T> call(x, a, b, mask, kind);
  Arena<T> arena(Scratch::launch, call.derived());
  const LikelihoodKernels<T>& kernel = kernels<T>().likelihood[kind];
  if (call.derived()) {
    call.inputs.derived = arena.take(call.derived());
    kernel.derive(call.inputs);
  }
  Tensor log_prob = empty(x, {call.inputs.S, call.inputs.N});
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
                                            bool need_x, bool need_a, bool need_b) {
  Call<T> call(x, a, b, mask, kind);
  const LikelihoodGrid& grid = call.grid;
  const int64_t S = call.inputs.S, N = call.inputs.N, P = call.inputs.P;
  const Tensor* const arguments[3] = {&x, &a, b ? &*b : nullptr};
  const bool needs[3] = {need_x, need_a, need_b};
  Tensor outputs[3] = {empty(x, {0}), empty(x, {0}), empty(x, {0})};
  LikelihoodGradient<T> gradients[3] = {};
  int64_t partial[3] = {}, doubles = 0;
  for (int k = 0; k < 3; ++k) {
    if (!needs[k]) continue;
    const Tensor& t = *arguments[k];
    outputs[k] = empty(x, {t.size(0), t.size(1), t.size(2)});
    gradients[k] = {nullptr, nullptr, t.size(0) == S, t.size(1) == N, t.size(2) == P};
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
  const LikelihoodBackward<T> p{call.inputs, grid, grad.const_data_ptr<T>(), {grad.stride(0), grad.stride(1)},
                                {gradients[0], gradients[1], gradients[2]}};
  for_each_task(grid.tasks(), [&](int64_t task) { kernel.backward(p, task); });
  for (int k = 0; k < 3; ++k)
    if (needs[k] && !gradients[k].full) merge(gradients[k], grid, S, N, P, outputs[k].mutable_data_ptr<T>());
  return {outputs[0], outputs[1], outputs[2]};
}

Tensor likelihood_fwd(const Tensor& x, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& mask,
                      int64_t kind) {
  const auto f = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(x, a, b, mask, kind);
}

std::tuple<Tensor, Tensor, Tensor> likelihood_bwd(const Tensor& grad, const Tensor& x, const Tensor& a,
                                                  const std::optional<Tensor>& b, const std::optional<Tensor>& mask,
                                                  int64_t kind, bool need_x, bool need_a, bool need_b) {
  const auto f = x.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return f(grad, x, a, b, mask, kind, need_x, need_a, need_b);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("likelihood_fwd", TORCH_BOX(&likelihood_fwd));
  m.impl("likelihood_bwd", TORCH_BOX(&likelihood_bwd));
}

}  // namespace
}  // namespace latent_engine
