// The kernels of csrc/cuda/gmm.cuh on the host; called by test_gpu_kernels.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/gmm.cuh"

using namespace latent_engine;

// The arguments of both calls; mirrored by `Arguments` in test_gpu_kernels.py.
struct Call {
  const void* z;
  const float *means, *log_vars, *log_weights;
  const int64_t* labels;
  const bool* allowed;
  int64_t N, K, D, z_row, z_col, log_vars_row, log_vars_col, z_type, wave, backwards;

  gmm::Problem problem(Workspace& workspace) const {
    WAVE = static_cast<int>(wave), reversed = backwards != 0;
    gmm::Problem p{z, static_cast<Scalar>(z_type), z_row, z_col, means, nullptr, nullptr, labels, allowed, N, K, D};
    gmm::prepare_mixture(p, gmm::LogVars{log_vars, log_vars_row, log_vars_col}, log_weights, workspace, 0);
    return p;
  }
};

extern "C" void emulate_forward(const Call* call, float* log_prob, float* responsibilities) {
  Workspace workspace;
  gmm::forward(call->problem(workspace), log_prob, responsibilities, workspace, 0);
}

extern "C" void emulate_backward(const Call* call, const float* grad, const float* log_prob, const float* coef,
                                 void* grad_z, float* grad_means, float* grad_log_vars, float* grad_log_weights) {
  Workspace workspace;
  const gmm::Problem p = call->problem(workspace);
  const gmm::Upstream up{grad, log_prob, coef};
  gmm::backward_z(p, up, grad_z, workspace, 0);
  gmm::backward_mixture(p, up, grad_means, grad_log_vars, grad_log_weights, false, workspace, 0);
}

extern "C" void emulate_moments(const Call* call, const float* weights, const float* log_prob, float* counts, float* first,
                                float* second) {
  Workspace workspace;
  const gmm::Problem p = call->problem(workspace);
  gmm::backward_mixture(p, gmm::Upstream{weights, log_prob, nullptr}, first, second, counts, true, workspace, 0);
}
