// The row updates for the CUDA dispatch key; schemas and the meaning of the arguments are in kernels/row_update.py.
#include <optional>

#include <torch/csrc/stable/library.h>

#include "binding.cuh"
#include "row_update.cuh"

namespace latent_engine {
namespace {

row_update::Rows rows(const char* op, const Tensor& t) {
  floats(op, t);
  return {output(t), t.stride(0)};
}

const int64_t* positions(const Tensor& t) { return t.const_data_ptr<int64_t>(); }

row_update::Batch batch(const char* op, const Tensor& index, const std::optional<Tensor>& order, const Tensor& grad) {
  STD_TORCH_CHECK(order.has_value(), op, ": on CUDA the index must be sorted, and come with the order of its gradients.");
  return {index.size(0), grad.size(1), positions(index), positions(*order), floats(op, grad), grad.stride(0)};
}

row_update::Moments moments(const char* op, const Tensor& table, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                            const Tensor& step) {
  return {rows(op, table), rows(op, exp_avg), rows(op, exp_avg_sq), step.mutable_data_ptr<int32_t>()};
}

void row_sgd_(Tensor table, std::optional<Tensor> velocity, Tensor index, std::optional<Tensor> order, Tensor grad, double lr,
              double momentum, double weight_decay, bool decoupled) {
  const char* op = "row_sgd_";
  const Launch call(op, table, table);
  const row_update::Sgd p{rows(op, table),
                          velocity ? rows(op, *velocity) : row_update::Rows{nullptr, 0},
                          static_cast<float>(lr),
                          static_cast<float>(momentum),
                          static_cast<float>(decoupled ? 0 : weight_decay),
                          static_cast<float>(decoupled ? 1 - lr * weight_decay : 1)};
  row_update::run_sgd(batch(op, index, order, grad), p, call.stream);
}

void row_adam_(Tensor table, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, Tensor index, std::optional<Tensor> order,
               Tensor grad, double lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
  const char* op = "row_adam_";
  const Launch call(op, table, table);
  const row_update::Adam p{moments(op, table, exp_avg, exp_avg_sq, step),
                           lr,
                           beta1,
                           beta2,
                           static_cast<float>(eps),
                           static_cast<float>(decoupled ? 0 : weight_decay),
                           static_cast<float>(decoupled ? 1 - lr * weight_decay : 1)};
  row_update::run_adam(batch(op, index, order, grad), p, call.stream);
}

void row_catch_up_(Tensor table, Tensor exp_avg, Tensor exp_avg_sq, Tensor step, std::optional<Tensor> index, Tensor history,
                   int64_t now, double beta1, double beta2, double eps, int64_t terms) {
  const char* op = "row_catch_up_";
  const Launch call(op, table, table);
  const int64_t count = index ? index->size(0) : table.size(0), stride = history.stride(0);
  const double* const rates = history.const_data_ptr<double>();
  const row_update::CatchUp p{moments(op, table, exp_avg, exp_avg_sq, step),
                              rates,
                              rates + stride,
                              rates + 2 * stride,
                              now - history.size(1) + 1,
                              now,
                              terms,
                              beta1,
                              beta2,
                              static_cast<float>(eps)};
  const row_update::Batch rows(count, table.size(1), index ? positions(*index) : nullptr, nullptr, nullptr, 0);
  row_update::run_catch_up(rows, p, call.stream);
}

}  // namespace
}  // namespace latent_engine

STABLE_TORCH_LIBRARY_IMPL(latent_engine, CUDA, m) {
  m.impl("row_sgd_", TORCH_BOX(&latent_engine::row_sgd_));
  m.impl("row_adam_", TORCH_BOX(&latent_engine::row_adam_));
  m.impl("row_catch_up_", TORCH_BOX(&latent_engine::row_catch_up_));
}
