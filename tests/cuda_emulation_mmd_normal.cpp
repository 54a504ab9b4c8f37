// The kernels of csrc/cuda/mmd_normal.cuh on the host; called by test_gpu_mmd_normal.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/mmd_normal.cuh"

using namespace latent_engine;

// Mirrored by `Arguments` in test_gpu_mmd_normal.py.
struct Call {
  const void* x;
  const float *log_var, *rates, *weights, *widths;
  float *values, *dx, *dlog_var, *value;
  int64_t N, D, x_row, x_col, x_type, log_var_row, log_var_col, nodes, count, biased, backwards;
  double unit, prior_variance, constant;
};

extern "C" void emulate_forward(const Call* c) {
  reversed = c->backwards != 0;
  const double pairs = static_cast<double>(c->N) * static_cast<double>(c->biased ? c->N : c->N - 1);
  mmd_normal::Problem p{c->x, static_cast<Scalar>(c->x_type), c->x_row, c->x_col, c->log_var, c->log_var_row, c->log_var_col,
                        c->N, c->D, c->rates, c->weights, static_cast<int>(c->nodes), c->widths, static_cast<int>(c->count),
                        static_cast<float>(c->unit), static_cast<float>(c->prior_variance), static_cast<float>(1 / pairs),
                        static_cast<float>(-2.0 / static_cast<double>(c->N)), c->biased != 0};
  mmd_normal::forward(p, {c->values, c->dx, c->dlog_var}, c->constant, c->value, 0);
}
