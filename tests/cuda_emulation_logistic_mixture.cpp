// The kernels of csrc/cuda/logistic_mixture.cuh on the host; called by test_gpu_logistic_mixture.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/logistic_mixture.cuh"

using namespace latent_engine;

// Mirrored by `Arguments` in test_gpu_logistic_mixture.py.
struct Call {
  const float* x;
  const void* params;
  const bool* mask;
  int64_t images, N, C, K, P, type, backwards;

  logistic_mixture::Problem problem() const {
    reversed = backwards != 0;
    return {x, params, static_cast<Scalar>(type), mask, images, N, C, K, P};
  }
};

extern "C" void emulate_forward(const Call* call, float* log_prob, float* stats) {
  Workspace workspace;
  logistic_mixture::forward(call->problem(), log_prob, stats, workspace, 0);
}

extern "C" void emulate_backward(const Call* call, const float* grad, const float* stats, void* grad_params) {
  logistic_mixture::backward(call->problem(), grad, stats, grad_params, 0);
}
