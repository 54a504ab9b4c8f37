// The kernels of csrc/cuda/row_update.cuh on the host; called by test_gpu_row_update.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/row_update.cuh"

using namespace latent_engine;
using namespace latent_engine::row_update;

// The arguments of all calls; mirrored by `Arguments` in test_gpu_row_update.py.
struct Call {
  float *table, *velocity, *mean, *square;
  int32_t* step;
  const int64_t *index, *order;
  const float* grad;
  const double* history;
  int64_t count, D, table_row, velocity_row, mean_row, square_row, grad_row, steps, now, terms, backwards;
  double lr, momentum, beta1, beta2, eps, coupled, kept;

  Batch batch() const {
    reversed = backwards != 0;
    return {count, D, index, order, grad, grad_row};
  }
  Moments moments() const { return {{table, table_row}, {mean, mean_row}, {square, square_row}, step}; }
};

extern "C" void emulate_sgd(const Call* c) {
  run_sgd(c->batch(), {{c->table, c->table_row}, {c->velocity, c->velocity_row}, float(c->lr), float(c->momentum),
                       float(c->coupled), float(c->kept)}, 0);
}

extern "C" void emulate_adam(const Call* c) {
  run_adam(c->batch(), {c->moments(), c->lr, c->beta1, c->beta2, float(c->eps), float(c->coupled), float(c->kept)}, 0);
}

extern "C" void emulate_catch_up(const Call* c) {
  run_catch_up(c->batch(), {c->moments(), c->history, c->history + c->steps, c->history + 2 * c->steps, c->now - c->steps + 1,
                            c->now, c->terms, c->beta1, c->beta2, float(c->eps)}, 0);
}
