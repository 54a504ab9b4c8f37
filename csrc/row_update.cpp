// The row updates on CPU tensors: segments of equal rows, the cut of work. Arguments are checked in kernels/row_update.py, but
// for what is in `index` and `step`, which costs less here.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <functional>
#include <optional>
#include <vector>

#include "binding.h"

namespace latent_engine {
namespace {

constexpr int64_t kRowLatency = 256;  // multiplications in the time that a row takes to arrive from memory

// Positions of `index` in the order of their rows, equal rows in the order of their positions: many by their digits, of which
// the time is linear.
std::vector<int64_t> sorted_positions(const int64_t* index, int64_t n, int64_t largest) {
  constexpr int bits = 11;
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  if (n < 1 << (bits - 2)) {
    const auto is_before = [&](int64_t a, int64_t b) { return index[a] != index[b] ? index[a] < index[b] : a < b; };
    std::sort(order.begin(), order.end(), is_before);
    return order;
  }
  std::vector<int64_t> next(n);
  for (int shift = 0; shift < 63 && largest >> shift; shift += bits) {
    const auto digit = [&](int64_t i) { return index[i] >> shift & ((1 << bits) - 1); };
    std::vector<int64_t> places((1 << bits) + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++places[digit(i) + 1];
    for (int d = 0; d < 1 << bits; ++d) places[d + 1] += places[d];
    for (const int64_t i : order) next[places[digit(i)]++] = i;
    order.swap(next);
  }
  return order;
}

// The distinct rows of an index, and where their gradients are.
class Segments {
 public:
  // `rows` are those of the table.
  Segments(const int64_t* index, int64_t n, int64_t rows) : index_(index), count_(n) {
    int64_t smallest = 0, largest = 0;
    for (int64_t i = 0; i < n; ++i) smallest = std::min(smallest, index[i]), largest = std::max(largest, index[i]);
    STD_TORCH_CHECK(smallest >= 0 && (n == 0 || largest < rows), "an index is out of range");
    is_plain_ = std::adjacent_find(index, index + n, std::greater_equal<int64_t>()) == index + n;
    if (is_plain_ || n == 0) return;
    order_ = sorted_positions(index, n, largest);
    for (int64_t i = 0; i < n; ++i)
      if (i == 0 || index[order_[i]] != index[order_[i - 1]]) rows_.push_back(index[order_[i]]), starts_.push_back(i);
    count_ = static_cast<int64_t>(rows_.size());
    starts_.push_back(n);
  }

  template <class T>
  RowBatch<T> batch(int64_t D, const T* grad, int64_t grad_stride) const {
    if (is_plain_) return {count_, D, index_, nullptr, nullptr, grad, grad_stride};
    return {count_, D, rows_.data(), starts_.data(), order_.data(), grad, grad_stride};
  }

 private:
  const int64_t* index_;
  int64_t count_;
  bool is_plain_;  // increasing without repetition
  std::vector<int64_t> order_, rows_, starts_;
};

template <class T>
RowArray<T> rows_of(const Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.stride(0)};
}

template <class T>
RowMoments<T> moments(const Tensor& table, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step) {
  return {rows_of<T>(table), rows_of<T>(exp_avg), rows_of<T>(exp_avg_sq), step.mutable_data_ptr<int32_t>()};
}

Segments segments(const Tensor& index, const Tensor& table) {
  return {index.const_data_ptr<int64_t>(), index.size(0), table.size(0)};
}

template <class T>
void sgd(const Tensor& table, const std::optional<Tensor>& velocity, const Tensor& index, const Tensor& grad, double lr,
         double momentum, double weight_decay, bool decoupled) {
  const Segments rows = segments(index, table);
  const RowSgd<T> p{rows.batch(table.size(1), grad.const_data_ptr<T>(), grad.stride(0)),
                    rows_of<T>(table),
                    velocity ? rows_of<T>(*velocity) : RowArray<T>{nullptr, 0},
                    T(lr),
                    T(momentum),
                    T(decoupled ? 0 : weight_decay),
                    T(decoupled ? 1 - lr * weight_decay : 1)};
  in_parts(p.batch.segments, kRowLatency + 4 * p.batch.D,
           [&](int64_t first, int64_t last) { kernels<T>().row_update.sgd(p, first, last); });
}

template <class T>
void adam(const Tensor& table, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step, const Tensor& index,
          const Tensor& grad, double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
  const Segments rows = segments(index, table);
  const RowAdam<T> p{rows.batch(table.size(1), grad.const_data_ptr<T>(), grad.stride(0)),
                     moments<T>(table, exp_avg, exp_avg_sq, step),
                     lr,
                     beta1,
                     beta2,
                     std::log(beta1),
                     std::log(beta2),
                     T(eps),
                     T(decoupled ? 0 : weight_decay),
                     T(decoupled ? 1 - lr * weight_decay : 1)};
  in_parts(p.batch.segments, 2 * kRowLatency + 16 * p.batch.D,
           [&](int64_t first, int64_t last) { kernels<T>().row_update.adam(p, first, last); });
}

// base^1 to base^n; in a wider type, since the rounding of a factor counts n times.
std::vector<double> powers(long double base, int64_t n) {
  std::vector<double> p(n);
  long double power = 1;
  for (double& value : p) value = static_cast<double>(power *= base);
  return p;
}

template <class T>
void catch_up(const Tensor& table, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& step,
              const std::optional<Tensor>& index, const Tensor& history, int64_t now, double beta1, double beta2, double eps,
              int64_t terms) {
  const int64_t steps = history.size(1);
  if (steps == 0) return;
  terms = std::min(terms, steps);
  const Segments rows = index ? segments(*index, table) : Segments(nullptr, 0, 0);
  const RowBatch<T> every{table.size(0), table.size(1), nullptr, nullptr, nullptr, nullptr, 0};
  const auto mean_powers = powers(beta1, terms), root_powers = powers(std::sqrt(static_cast<long double>(beta2)), terms);
  const double* const rates = history.const_data_ptr<double>();
  const RowCatchUp<T> p{index ? rows.batch<T>(table.size(1), nullptr, 0) : every,
                        moments<T>(table, exp_avg, exp_avg_sq, step),
                        rates,
                        rates + history.stride(0),
                        rates + 2 * history.stride(0),
                        now - steps + 1,
                        now,
                        terms,
                        mean_powers.data(),
                        root_powers.data(),
                        beta1,
                        beta2,
                        T(eps)};
  for (int64_t i = 0; i < p.batch.segments; ++i) {
    const int64_t at = p.state.step[p.batch.row(i)];
    STD_TORCH_CHECK(at >= now - steps && at <= now, "a step is out of range");
  }
  in_parts(p.batch.segments, 2 * kRowLatency + 16 * p.batch.D * (1 + terms / 4),
           [&](int64_t first, int64_t last) { kernels<T>().row_update.catch_up(p, first, last); });
}

bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

void row_sgd_(Tensor table, std::optional<Tensor> velocity, Tensor index, std::optional<Tensor>, Tensor grad, double lr,
              double momentum, double weight_decay, bool decoupled) {
  (is_double(table) ? sgd<double> : sgd<float>)(table, velocity, index, grad, lr, momentum, weight_decay, decoupled);
}

void row_adam_(Tensor table, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor index, std::optional<Tensor>, Tensor grad,
               double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
  (is_double(table) ? adam<double> : adam<float>)(table, exp_avg, exp_avg_sq, step, index, grad, lr, beta1, beta2, eps,
                                                  weight_decay, decoupled);
}

void row_catch_up_(Tensor table, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, std::optional<Tensor> index, Tensor history,
                   int64_t now, double beta1, double beta2, double eps, int64_t terms) {
  (is_double(table) ? catch_up<double> : catch_up<float>)(table, exp_avg, exp_avg_sq, step, index, history, now, beta1, beta2,
                                                          eps, terms);
}

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CPU, m) {
  m.impl("row_sgd_", TORCH_BOX(&row_sgd_));
  m.impl("row_adam_", TORCH_BOX(&row_adam_));
  m.impl("row_catch_up_", TORCH_BOX(&row_catch_up_));
}

}  // namespace
}  // namespace latent_engine
