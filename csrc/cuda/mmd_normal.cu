// mmd_normal_fwd for the CUDA dispatch key; the schema and the meaning of the arguments are in kernels/mmd_normal.py.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "mmd_normal.cuh"

namespace latent_engine {
namespace {

std::tuple<Tensor, Tensor, Tensor> mmd_normal_fwd(Tensor x, std::optional<Tensor> log_var, std::vector<double> rates,
                                                  std::vector<double> weights, std::vector<double> widths, double prior_std,
                                                  bool biased, bool need_x, bool need_log_var) {
  const char* op = "mmd2_to_normal";
  const Launch call(op, x, x);
  const int64_t N = x.size(0), D = x.size(1), nodes = rates.size(), count = widths.size();
  const double exponent = std::round(std::log2(prior_std * std::sqrt(double(D))));
  const double squared_unit = std::exp2(-2 * exponent) * D * prior_std * prior_std;  // D σ² in the kernels' units
  const bool gradient = need_x || need_log_var;

  std::vector<float> tables;
  double constant = 0;  // the prior with itself
  for (int64_t q = 0; q < nodes; ++q) {
    tables.push_back(static_cast<float>(rates[q] / squared_unit));
    constant += weights[q] * std::exp(-0.5 * D * std::log1p(4 * rates[q] / D));
  }
  tables.insert(tables.end(), weights.begin(), weights.end());
  for (double width : widths) tables.push_back(static_cast<float>(width * squared_unit));
  const Tensor memory = empty(x, {static_cast<int64_t>(tables.size())});
  // From pageable memory the copy returns once the source is read.
  check(cudaMemcpyAsync(output(memory), tables.data(), tables.size() * sizeof(float), cudaMemcpyHostToDevice, call.stream));

  Tensor value = empty(x, {}), values = empty(x, {N});
  Tensor dx = empty(x, {gradient ? N : 0, gradient ? D : 0});
  Tensor dlog_var = empty(x, {gradient && log_var ? N : 0, gradient && log_var ? D : 0});
  mmd_normal::Problem p{};
  p.x = x.const_data_ptr(), p.x_type = element_type(op, x), p.x_row = x.stride(0), p.x_col = x.stride(1);
  if (log_var) p.log_var = floats(op, *log_var), p.log_var_row = log_var->stride(0), p.log_var_col = log_var->stride(1);
  p.N = N, p.D = D, p.nodes = static_cast<int>(nodes), p.count = static_cast<int>(count), p.biased = biased;
  p.rates = output(memory), p.weights = p.rates + nodes, p.widths = p.weights + nodes;
  p.unit = static_cast<float>(std::exp2(-exponent)), p.prior_variance = static_cast<float>(squared_unit / D);
  p.pair_weight = static_cast<float>(1.0 / (double(N) * (biased ? N : N - 1)));
  p.cross_weight = static_cast<float>(-2.0 / N);
  const mmd_normal::Outputs out{output(values), gradient ? output(dx) : nullptr,
                                gradient && log_var ? output(dlog_var) : nullptr};
  mmd_normal::forward(p, out, constant, output(value), call.stream);
  return {value, need_x ? dx : empty(x, {0, 0}), need_log_var ? dlog_var : empty(x, {0, 0})};
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) { m.impl("mmd_normal_fwd", TORCH_BOX(&latent_engine::mmd_normal_fwd)); }
