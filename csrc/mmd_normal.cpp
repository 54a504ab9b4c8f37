// mmd_normal_fwd on CPU tensors: tables of the kernel, allocation, the cut into panels, launch. Arguments are checked in
// kernels/mmd_normal.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "mmd_normal_groups.h"
#include "mmd_normal_wide.h"
#include "tournament.h"

namespace latent_engine {
namespace {

constexpr int64_t kMaxPanels = 16, kPanelRows = 64;  // a panel is a multiple of the second

// The polynomials of one group of inverse multiquadrics; see ImqGroup.
template <class T>
ImqGroup<T> imq_group(const double* widths, int count) {
  std::vector<double> p(count), q(count), r(2 * count - 1);
  const auto multiply = [](std::vector<double>& poly, double beta) {
    for (size_t i = poly.size() - 1; i > 0; --i) poly[i] += beta * poly[i - 1];
  };
  const auto beta = [&](int s) { return widths[s] / widths[0] - 1; };
  q[0] = 1;
  for (int s = 1; s < count; ++s) multiply(q, beta(s));  // beta(0) = 0
  for (int s = 0; s < count; ++s) {
    std::vector<double> others(p.size()), squares(r.size());
    others[0] = squares[0] = 1 + beta(s);
    for (int j = 0; j < count; ++j)
      if (j != s) multiply(others, beta(j)), multiply(squares, beta(j)), multiply(squares, beta(j));
    for (size_t i = 0; i < p.size(); ++i) p[i] += others[i];
    for (size_t i = 0; i < r.size(); ++i) r[i] += squares[i];
  }
  ImqGroup<T> group{count, static_cast<T>(widths[0]), {}, {}, {}};
  std::copy(p.begin(), p.end(), group.p), std::copy(q.begin(), q.end(), group.q), std::copy(r.begin(), r.end(), group.r);
  return group;
}

// Groups of ascending widths whose polynomials stay far below the largest float.
template <class T>
std::vector<ImqGroup<T>> imq_groups(std::vector<double> widths, double squared_unit) {
  constexpr double largest = 1e16;
  for (double& width : widths) width *= squared_unit;
  std::sort(widths.begin(), widths.end());
  std::vector<ImqGroup<T>> groups;
  for (size_t first = 0, last; first < widths.size(); first = last) {
    double product = 1;
    for (last = first; last < widths.size() && last - first < ImqGroup<T>::kMost; ++last) {
      product *= widths[last] / widths[first];
      if (product > largest) break;
    }
    groups.push_back(imq_group<T>(&widths[first], static_cast<int>(last - first)));
  }
  return groups;
}

// Σ_q w_q exp(−a_q r²) after smoothing by a total `variance` in every one of D dimensions, the same for all pairs.
template <class T>
GaussianSum<T> smoothed(const std::vector<double>& rates, const std::vector<double>& weights, double variance, int64_t D,
                        T* memory) {
  const int64_t count = static_cast<int64_t>(rates.size());
  for (int64_t q = 0; q < count; ++q) {
    memory[q] = static_cast<T>(rates[q] / (1 + 2 * rates[q] * variance));
    memory[count + q] = static_cast<T>(weights[q] * std::exp(-0.5 * D * std::log1p(2 * rates[q] * variance)));
  }
  return {count, memory, memory + count, nullptr, nullptr, nullptr};
}

// The nodes for pairs that each have variances of their own, in descending order of width.
template <class T>
GaussianSum<T> unsmoothed(const std::vector<double>& rates, const std::vector<double>& weights, int64_t D, T* memory) {
  const int64_t count = static_cast<int64_t>(rates.size());
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return rates[a] < rates[b]; });
  T *const w = memory, *const widths = w + count, *const powers = widths + count, *const rests = powers + count;
  for (int64_t q = 0; q < count; ++q) {
    w[q] = static_cast<T>(weights[order[q]]);
    widths[q] = static_cast<T>(0.5 / rates[order[q]]);
    // Its absolute error is the relative one of the expectation: in double 7e-15 at D = 7 and a width of 2800, and more with D.
    const long double bits = D * std::log2(static_cast<long double>(widths[q])), whole = std::floor(bits);
    powers[q] = static_cast<T>(whole), rests[q] = static_cast<T>((bits - whole) * 0.69314718055994530942L);
  }
  return {count, nullptr, w, widths, powers, rests};
}

// Rows of a panel: enough panels that the N² / 2 pairs are shared by panels² / 2 tasks, an even number, which keeps each in one
// task of a round.
int64_t panel_rows(int64_t N, int64_t work) {
  const double wanted = N * std::sqrt(static_cast<double>(work) / kTaskWork);
  const int64_t panels = std::clamp<int64_t>(std::min<int64_t>(static_cast<int64_t>(wanted), N / kPanelRows), 1, kMaxPanels);
  return round_up(ceil_div(N, std::max<int64_t>(panels / 2 * 2, 1)), kPanelRows);
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& log_var,
                                           std::vector<double> rates, const std::vector<double>& weights,
                                           const std::vector<double>& widths, double prior_std, bool biased, bool need_x,
                                           bool need_log_var) {
  const FlushToZero flush;  // of the tables
  const int64_t N = x.size(0), D = x.size(1);
  const double exponent = std::round(std::log2(prior_std * std::sqrt(double(D))));
  const double squared_unit = std::exp2(-2 * exponent) * D * prior_std * prior_std;  // D σ² in the kernels' units
  for (double& rate : rates) rate /= squared_unit;
  const double prior_variance = squared_unit / D;
  // At a stride of a power of two the columns would share a few cache sets.
  const int64_t stride = round_up(N, kPanelRows) + 16, size = stride * D;
  const int64_t nodes = static_cast<int64_t>(rates.size()), work = log_var ? 4 * D * nodes : 2 * D + 32;
  const bool gradient = need_x || need_log_var;
  const int64_t gradients = gradient ? size : 0, tables = 4 * nodes, polynomials = 3 * WideNodes<T>::kTerms * nodes;
  Arena<T> arena(Scratch::launch, size, log_var ? size : 0, gradients, log_var ? gradients : 0, tables, tables, kMaxPanels,
                 kMaxPanels, polynomials);
  Tensor value = empty(x, {}), dx = empty(x, {need_x ? N : 0, need_x ? D : 0});
  Tensor dlog_var = empty(x, {need_log_var ? N : 0, need_log_var ? D : 0});
  const auto groups = imq_groups<T>(widths, squared_unit);

  NormalMmd<T> p{};
  p.N = N, p.D = D, p.panel = panel_rows(N, work), p.stride = stride;
  p.unit = static_cast<T>(std::exp2(-exponent)), p.prior_variance = static_cast<T>(prior_variance);
  p.x = x.const_data_ptr<T>(), p.x_strides[0] = x.stride(0), p.x_strides[1] = x.stride(1);
  p.xt = arena.take(size), p.dxt = gradient ? arena.take(size) : nullptr;
  p.imq = groups.data(), p.imq_count = static_cast<int64_t>(groups.size());
  p.pair_weight = biased ? 2.0 / (double(N) * N) : 2.0 / (double(N) * (N - 1));
  p.cross_weight = -2.0 / N, p.self_weight = biased ? 0.5 : 0.0;
  if (need_x) p.dx = dx.mutable_data_ptr<T>();
  double constant = 0;  // the prior with itself, and points with themselves
  for (int64_t q = 0; q < nodes; ++q) constant += weights[q] * std::exp(-0.5 * D * std::log1p(4 * rates[q] * prior_variance));
  if (log_var) {
    p.log_var = log_var->const_data_ptr<T>();
    p.log_var_strides[0] = log_var->stride(0), p.log_var_strides[1] = log_var->stride(1);
    p.vt = arena.take(size), p.dvt = gradient ? arena.take(size) : nullptr;
    p.largest = arena.take(kMaxPanels), p.mean = arena.take(kMaxPanels);
    p.cross = unsmoothed(rates, weights, D, arena.take(tables));
    if (need_log_var) p.dlog_var = dlog_var.mutable_data_ptr<T>();
  } else {
    p.cross = smoothed(rates, weights, prior_variance, D, arena.take(tables));
    p.pairs = smoothed(rates, weights, 0.0, D, arena.take(tables));
    if (biased) constant += (widths.empty() ? rates.size() : widths.size()) / double(N);
  }

  std::vector<NodeGroup<T>> slopes;
  const int64_t panels = ceil_div(N, p.panel);
  for_each_task_flushed(panels, [&](int64_t panel) { kernels<T>().mmd_normal.pack(p, panel); });
  if (log_var) {
    const T largest = *std::max_element(p.largest, p.largest + panels);
    p.span = largest + std::max(largest, p.prior_variance);
    const double mean = std::accumulate(p.mean, p.mean + panels, 0.0) / double(panels);
    p.wide = wide_nodes(p.cross, p.span, 2 * mean, D, arena.take(polynomials));
    if (gradient) slopes = node_groups(p.cross, p.span), p.groups = slopes.data(), p.group_count = slopes.size();
  }
  const double total = constant + sum_of_games(panels, gradient, [&](int64_t a, int64_t b, bool first, bool last) {
    const FlushToZero flush;
    double sum = 0;
    for (const int64_t panel : {a, b})
      if (first && panel < panels) sum += kernels<T>().mmd_normal.rows(p, panel);
    if (b < panels) sum += kernels<T>().mmd_normal.pairs(p, a, b);
    for (const int64_t panel : {a, b})
      if (last && gradient && panel < panels) kernels<T>().mmd_normal.finish(p, panel);
    return sum;
  });
  *value.mutable_data_ptr<T>() = static_cast<T>(total);
  return {value, dx, dlog_var};
}

std::tuple<Tensor, Tensor, Tensor> mmd_normal_fwd(const Tensor& x, const std::optional<Tensor>& log_var,
                                                  const std::vector<double>& rates, const std::vector<double>& weights,
                                                  const std::vector<double>& widths, double prior_std, bool biased, bool need_x,
                                                  bool need_log_var) {
  const auto f = x.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(x, log_var, rates, weights, widths, prior_std, biased, need_x, need_log_var);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) { m.impl("mmd_normal_fwd", TORCH_BOX(&mmd_normal_fwd)); }

}  // namespace
}  // namespace latent_engine
