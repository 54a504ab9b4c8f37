// pairwise_kl_fwd, pairwise_kl_bwd and pairwise_kl_diversity_fwd on CPU tensors: allocation, the cut into tasks, launch.
// Arguments are checked in kernels/pairwise_kl.py.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "binding.h"

namespace latent_engine {
namespace {

constexpr int64_t kFewTasks = 8;
constexpr int64_t kExp = 10;  // in multiplications
constexpr int64_t kColumnWork = 3 * kExp;
constexpr int64_t kFetch = 8;         // a number from another core's cache, in multiplications
constexpr int64_t kGramRows = 256;    // rows of the batch of a Gram matrix, at least
constexpr int64_t kMomentRows = 128;  // rows of the batch of a task, at least

template <class T>
const PairwiseKlKernels<T>& ops() {
  return kernels<T>().pairwise_kl;
}

template <class T>
Posteriors<T> posteriors(const Tensor& mu, const Tensor& log_var) {
  return {mu.size(0), mu.size(1), mu.const_data_ptr<T>(), log_var.const_data_ptr<T>(), {mu.stride(0), mu.stride(1)},
          {log_var.stride(0), log_var.stride(1)}};
}

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);

template <class T>
int64_t padded(int64_t n) {
  return round_up(n, kLine<T>);
}

// The columns, made in `parts` of the dimensions, with ½ log₂ σ² for Eq. 8.
template <class T>
PairColumns<T> columns_of(Arena<T>& arena, const Posteriors<T>& batch, int64_t parts) {
  const int64_t stride = padded<T>(batch.N), size = batch.D * stride;
  const PairColumns<T> columns{stride, arena.take(size), arena.take(size), arena.take(size), arena.take(size)};
  const int64_t blocks = ceil_div(batch.D, kPairDims);
  for_each_task(parts, [&](int64_t part) {
    const int64_t last = std::min(batch.D, (part + 1) * blocks / parts * kPairDims);
    for (int64_t d = part * blocks / parts * kPairDims; d < last; d += kPairDims) {
      const int64_t end = std::min(last, d + kPairDims);
      ops<T>().columns(batch, columns, d, end);
      ops<T>().halves(batch, columns, d, end);
    }
  });
  return columns;
}

// Parts of the dimensions for `work` multiplications a posterior and dimension.
template <class T>
int64_t column_parts(const Posteriors<T>& batch, int64_t work) {
  return std::min(std::max<int64_t>(ceil_div(batch.D, kPairDims), 1), task_count(batch.D * padded<T>(batch.N) * work));
}

// Few dimensions are cut into splits of the second posteriors, so that there are tasks enough.
template <class T>
PairTasks<T> cut(const Posteriors<T>& batch, T scale) {
  const int64_t stride = padded<T>(batch.N);
  const int64_t splits = std::clamp<int64_t>(kFewTasks / std::max<int64_t>(batch.D, 1), 1, std::max<int64_t>(stride / 256, 1));
  const int64_t columns = padded<T>(ceil_div(stride, splits));
  return {ceil_div(stride, columns), columns, scale, nullptr};
}

// Multiplications of a pair and dimension.
template <class T>
int64_t pair_work(const PairwiseKlDiversity<T>& p) {
  return p.gradients ? 22 : 12;
}

// Σ softplus(−KL_d) with posteriors across lanes; the gradients in p.gradients unless null.
template <class T>
double column_diversity(PairwiseKlDiversity<T> p) {
  const Posteriors<T>& batch = p.batch;
  const int64_t size = batch.D * padded<T>(batch.N);
  p.tasks = cut(batch, p.tasks.scale);
  const int64_t gradients = p.gradients ? 2 * p.tasks.splits * size : 0;
  Arena<T> arena(Scratch::launch, size, size, size, size, gradients);
  p.columns = columns_of(arena, batch, column_parts(batch, kColumnWork));
  if (p.gradients) p.tasks.gradients = arena.take(gradients);
  std::vector<double> sums(batch.D * p.tasks.splits);
  p.sums = sums.data();
  in_parts(batch.D * p.tasks.splits, batch.N * p.tasks.columns * pair_work(p), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) ops<T>().diversity(p, task);
  });
  if (p.gradients)
    in_parts(batch.N, 4 * p.tasks.splits * batch.D, [&](int64_t first, int64_t last) {
      ops<T>().collect(batch, p.columns, p.tasks, p.gradients, first, last);
    });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

// The same with dimensions across lanes.
template <class T>
double line_diversity(PairwiseKlDiversity<T> p) {
  const int64_t N = p.batch.N, D = p.batch.D, lines = ceil_div(D, kLine<T>);
  const int64_t wanted = std::clamp<int64_t>(kFewTasks / std::max<int64_t>(lines, 1), 1, std::max<int64_t>(N / 64, 1));
  p.tasks.columns = round_up(ceil_div(N, wanted), kPairTile), p.tasks.splits = ceil_div(N, p.tasks.columns);
  const int64_t splits = p.tasks.splits, size = lines * kLine<T> * round_up(N, kPairTile);
  const int64_t gradients = p.gradients && splits > 1 ? 2 * splits * size : 0;
  Arena<T> arena(Scratch::launch, gradients);
  p.tasks.gradients = arena.take(gradients);
  std::vector<double> sums(lines * splits);
  p.sums = sums.data();
  in_parts(lines * splits, kLine<T> * N * p.tasks.columns * pair_work(p), [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) ops<T>().lines_diversity(p, task);
  });
  if (gradients)
    in_parts(N, 4 * splits * D, [&](int64_t first, int64_t last) { ops<T>().lines_collect(p, first, last); });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

template <class T>
std::tuple<Tensor, Tensor> diversity(const Tensor& mu, const Tensor& log_var, bool need_grad) {
  const int64_t N = mu.size(0), D = mu.size(1);
  Tensor value = empty(mu, {}), unit = empty(mu, {need_grad ? 2 : 0, N, D});
  const double pairs = static_cast<double>(N) * (N - 1);
  PairwiseKlDiversity<T> p{posteriors<T>(mu, log_var), {}, {}};
  p.tasks.scale = static_cast<T>(-1 / pairs);
  p.gradients = need_grad ? unit.mutable_data_ptr<T>() : nullptr;
  // Beside the lanes that stay empty, columns pay for sums over lanes: as if there were 40 posteriors more.
  const bool lines = padded<T>(D) * N <= D * (padded<T>(N) + 40);
  const double total = lines ? line_diversity(p) : column_diversity(p);
  *value.mutable_data_ptr<T>() = static_cast<T>(total / pairs);
  return {value, unit};
}

template <class T>
double mean_of(const T* values, int64_t n) {
  return std::accumulate(values, values + n, 0.0) / n;
}

// Parts of the dimensions whose totals each are a matrix of their own, together at most half of the batch; 0 where these
// would be too few. Shorter ones than half a run pay more for sums over lanes than they gain.
template <class T>
int64_t total_parts(const Posteriors<T>& batch) {
  const int64_t stride = padded<T>(batch.N), wanted = column_parts(batch, kColumnWork + 3 * stride);
  const int64_t parts = std::min({wanted, batch.D / (2 * stride), batch.D / (kPairDims * kPairRun / 2)});
  return parts >= std::min(wanted, kFewTasks / 2) ? parts : 0;
}

// The totals in `parts` of the dimensions, each with its own values, which stay in the cache.
template <class T>
void split_totals(const PairwiseKlDirect<T>& p, const PairwiseKlMean<T>& means, int64_t parts, double* log_dets) {
  const int64_t N = p.batch.N, lines = ceil_div(p.batch.D, kLine<T>), pitch = kPairRun | 1;
  for_each_task(parts, [&](int64_t part) {
    const int64_t first = part * lines / parts, last = (part + 1) * lines / parts;
    Arena<T> arena(Scratch::task, PairValues<T>::size(N, pitch));
    T* const data = arena.take(PairValues<T>::size(N, pitch));
    for (int64_t begin = first; begin < last; begin += kPairRun) {
      const int64_t end = std::min(last, begin + kPairRun);
      const PairValues<T> values{data, begin, pitch};
      ops<T>().pack(p.batch, values, begin, end, log_dets + part * p.stride);
      for (int64_t line = begin; line < end; ++line) ops<T>().means(means, values, line);
      ops<T>().totals(values, begin, end, 0, round_up(N, kPairTile), begin > first,
                      p.deviations + part * p.stride * p.stride, p.stride);
    }
  });
}

// The totals from values that all tasks share: each takes a tile of posteriors against all before it, and one as far from the
// other end.
template <class T>
void shared_totals(const PairwiseKlDirect<T>& p, const PairwiseKlMean<T>& means, int64_t parts, const PairValues<T>& values,
                   double* log_dets) {
  const int64_t lines = ceil_div(p.batch.D, kLine<T>), tiles = ceil_div(p.batch.N, kPairTile);
  for_each_task(parts, [&](int64_t part) {
    const int64_t last = (part + 1) * lines / parts;
    for (int64_t begin = part * lines / parts; begin < last; begin += kPairRun)
      ops<T>().pack(p.batch, values, begin, std::min(last, begin + kPairRun), log_dets + part * p.stride);
    for (int64_t line = part * lines / parts; line < last; ++line) ops<T>().means(means, values, line);
  });
  in_parts(ceil_div(tiles, 2), 3 * kPairTile * p.stride * p.batch.D, [&](int64_t first, int64_t last) {
    for (int64_t begin = 0; begin < std::max<int64_t>(lines, 1); begin += kPairRun) {
      const auto totals = [&](int64_t tile, int64_t end_tile) {
        ops<T>().totals(values, begin, std::min(lines, begin + kPairRun), tile * kPairTile, end_tile * kPairTile, begin > 0,
                        p.deviations, p.stride);
      };
      totals(first, last);
      totals(std::max(last, tiles - last), tiles - first);
    }
  });
}

// The means, and the deviation from the pair matrix, with its gradients in `unit` if needed. Tasks take dimensions, so that
// what one core writes no other reads, or where that takes too much memory posteriors.
template <class T>
double direct_deviation(const PairwiseKlMean<T>& means, bool need_grad, const Tensor& unit) {
  const Posteriors<T>& batch = means.batch;
  const int64_t N = batch.N, D = batch.D, stride = padded<T>(N), split = total_parts(batch);
  const int64_t parts = split ? split : column_parts(batch, kColumnWork);
  PairwiseKlDirect<T> p{batch, stride};
  p.parts = std::max<int64_t>(split, 1);
  const int64_t pitch = ceil_div(D, kLine<T>) | 1, shared = split ? 0 : PairValues<T>::size(N, pitch);
  Arena<T> arena(Scratch::launch, p.parts * stride * stride, stride, stride, shared);
  p.deviations = arena.take(p.parts * stride * stride), p.log_det = arena.take(stride), p.sums = arena.take(stride);
  std::vector<double> squares(stride), log_dets(parts * stride);
  p.squares = squares.data();
  if (split)
    split_totals(p, means, parts, log_dets.data());
  else
    shared_totals(p, means, parts, PairValues<T>{arena.take(shared), 0, pitch}, log_dets.data());
  p.mean = static_cast<T>(std::accumulate(means.mean, means.mean + D, 0.0));
  for (int64_t i = 0; i < stride; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += log_dets[part * stride + i];
    p.log_det[i] = static_cast<T>(sum);
  }
  const int64_t pairs = N * (N - 1);
  in_parts(stride, p.parts * stride, [&](int64_t first, int64_t last) { ops<T>().divergences(p, first, last); });
  const T error = static_cast<T>(mean_of(p.sums, stride) * stride / pairs);
  in_parts(stride, stride, [&](int64_t first, int64_t last) { ops<T>().deviations(p, error, first, last); });
  const double spread = std::sqrt(mean_of(p.squares, stride) * stride / (pairs - 1));
  // Equal divergences may keep a rounding of their mean.
  const double deviation = spread <= std::numeric_limits<T>::epsilon() * std::abs(error) ? 0 : spread;
  if (!need_grad) return deviation;
  p.unit = static_cast<T>(deviation == 0 ? 0 : 1 / deviation), p.scale = static_cast<T>(1.0 / (pairs - 1));
  p.gradients = unit.mutable_data_ptr<T>();
  in_parts(ceil_div(D, kLine<T>), 6 * kLine<T> * N * N,
           [&](int64_t first, int64_t last) { ops<T>().direct_gradient(p, first, last); });
  return deviation;
}

// The means, from `sums` that the rows are added up in.
template <class T>
void row_means(const PairwiseKlMean<T>& p) {
  const int64_t N = p.batch.N, D = p.batch.D, parts = ceil_div(N, p.rows), blocks = ceil_div(D, kMomentColumns);
  const int64_t work = (2 * kExp + 16) * std::min(N, p.rows) * std::min(D, kMomentColumns);
  in_parts(parts * blocks, work, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t d = i % blocks * kMomentColumns;
      ops<T>().moments(p, i / blocks, d, std::min(D, d + kMomentColumns));
    }
  });
  in_parts(D, kMomentSums * (parts + 4), [&](int64_t first, int64_t last) { ops<T>().mean(p, first, last); });
}

// The deviation from Gram matrices.
template <class T>
double gram_deviation(const PairwiseKlMean<T>& means, bool need_grad, const Tensor& unit) {
  const Posteriors<T>& batch = means.batch;
  const int64_t N = batch.N, D = batch.D, width = round_up(2 * D, kGramTile);
  const int64_t stride = width | kLine<double>;
  const int64_t rows = std::max({kGramRows, width, ceil_div(N, kMaxTasks)}), parts = ceil_div(N, rows);
  Arena<double> arena(Scratch::launch, parts * GramSums::size(width, stride), D, width, width, width);
  PairwiseKlGram<T> p{batch, means.moments + centre * D, need_grad, width, stride, rows, parts};
  p.sums = arena.take(parts * GramSums::size(width, stride)), p.level = arena.take(D);
  p.a_mean = arena.take(width), p.b_mean = arena.take(width), p.inner = arena.take(width);
  const double mean = ops<T>().gram_means(p, means.sums);
  in_parts(parts, rows * width * width, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) ops<T>().gram_part(p, part);
  });
  in_parts(width / kGramTile, kGramTile * parts * width * kFetch,
           [&](int64_t first, int64_t last) { ops<T>().gram_sums(p, kGramTile * first, kGramTile * last); });
  const double pairs = static_cast<double>(N) * (N - 1), total = ops<T>().gram_total(p, mean);
  if (need_grad) {
    p.mean = -mean / (N - 1), p.unit = total == 0 ? 0 : 0.5 / std::sqrt(total * (pairs - 1));
    p.dmu = unit.mutable_data_ptr<T>(), p.dlog_var = p.dmu + N * D;
    in_parts(ceil_div(N, kGramBlock), 4 * kGramBlock * width * width,
             [&](int64_t first, int64_t last) { ops<T>().gram_gradient(p, first, last); });
  }
  return 0.5 * std::sqrt(total / (pairs - 1));
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& mu, const Tensor& log_var, bool need_std, bool need_grad) {
  const Posteriors<T> batch = posteriors<T>(mu, log_var);
  const int64_t N = batch.N, D = batch.D;
  need_grad = need_grad && need_std;
  Tensor mean = empty(mu, {D}), moments = empty(mu, {kMoments, D});
  Tensor deviation = need_std ? empty(mu, {}) : empty(mu, {0}), unit = empty(mu, {need_grad ? 2 : 0, N, D});
  PairwiseKlMean<T> p{batch, moments.mutable_data_ptr<T>(), mean.mutable_data_ptr<T>()};
  double value;
  if (need_std && N < 4 * D + 8) {
    value = direct_deviation(p, need_grad, unit);
  } else {
    p.rows = std::max(kMomentRows, ceil_div(N, kMaxTasks));
    std::vector<double> sums(ceil_div(N, p.rows) * kMomentSums * D);
    p.sums = sums.data();
    row_means(p);
    if (need_std) value = gram_deviation(p, need_grad, unit);
  }
  if (need_std) *deviation.mutable_data_ptr<T>() = static_cast<T>(value);
  return {mean, deviation, moments, unit};
}

template <class T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad_mean, const std::optional<Tensor>& grad_std, const Tensor& mu,
                                    const Tensor& log_var, const Tensor& moments_, const Tensor& unit_) {
  const Posteriors<T> batch = posteriors<T>(mu, log_var);
  const Tensor moments = as_contiguous(moments_), unit = as_contiguous(unit_);
  Tensor dmu = empty(mu, {batch.N, batch.D}), dlog_var = empty(mu, {batch.N, batch.D});
  PairwiseKlMean<T> p{batch, const_cast<T*>(moments.const_data_ptr<T>()), nullptr};
  p.grad_mean = grad_mean.const_data_ptr<T>(), p.grad_mean_stride = grad_mean.stride(0);
  if (grad_std) p.grad_std = grad_std->const_data_ptr<T>(), p.unit = unit.const_data_ptr<T>();
  p.dmu = dmu.mutable_data_ptr<T>(), p.dlog_var = dlog_var.mutable_data_ptr<T>();
  in_parts(batch.N, (2 * kExp + 16) * batch.D, [&](int64_t first, int64_t last) { ops<T>().mean_gradient(p, first, last); });
  return {dmu, dlog_var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pairwise_kl_fwd(const Tensor& mu, const Tensor& log_var, bool need_std,
                                                           bool need_grad) {
  const auto f = mu.scalar_type() == ScalarType::Double ? forward<double> : forward<float>;
  return f(mu, log_var, need_std, need_grad);
}

std::tuple<Tensor, Tensor> pairwise_kl_bwd(const Tensor& grad_mean, const std::optional<Tensor>& grad_std, const Tensor& mu,
                                           const Tensor& log_var, const Tensor& moments, const Tensor& unit) {
  const auto f = mu.scalar_type() == ScalarType::Double ? backward<double> : backward<float>;
  return f(grad_mean, grad_std, mu, log_var, moments, unit);
}

std::tuple<Tensor, Tensor> pairwise_kl_diversity_fwd(const Tensor& mu, const Tensor& log_var, bool need_grad) {
  const auto f = mu.scalar_type() == ScalarType::Double ? diversity<double> : diversity<float>;
  return f(mu, log_var, need_grad);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("pairwise_kl_fwd", TORCH_BOX(&pairwise_kl_fwd));
  m.impl("pairwise_kl_bwd", TORCH_BOX(&pairwise_kl_bwd));
  m.impl("pairwise_kl_diversity_fwd", TORCH_BOX(&pairwise_kl_diversity_fwd));
}

}  // namespace
}  // namespace latent_engine
