// The kernels of csrc/cuda/pairwise_kl.cuh on the host; called by test_gpu_pairwise_kl.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/pairwise_kl.cuh"

using namespace latent_engine;

// Mirrored by `Arguments` in test_gpu_pairwise_kl.py.
struct Call {
  const float *mu, *log_var;
  int64_t N, D, mu_row, mu_col, log_var_row, log_var_col, wave, backwards;

  pairwise_kl::Batch batch() const {
    WAVE = static_cast<int>(wave), reversed = backwards != 0;
    return {mu, log_var, {mu_row, mu_col}, {log_var_row, log_var_col}, N, D};
  }
};

extern "C" void emulate_diversity(const Call* call, float* value, float* unit) {
  Workspace workspace;
  pairwise_kl::diversity(call->batch(), value, unit, workspace, 0);
}

extern "C" void emulate_statistics(const Call* call, float* mean, float* moments, float* deviation, float* unit) {
  Workspace workspace;
  pairwise_kl::statistics(call->batch(), mean, moments, deviation, unit, workspace, 0);
}

extern "C" void emulate_backward(const Call* call, const float* moments, const float* grad_mean, const float* grad_std,
                                 const float* unit, float* by_mu, float* by_log_var) {
  pairwise_kl::backward(call->batch(), moments, {grad_mean, grad_std, unit, 1}, by_mu, by_log_var, 0);
}
