// The kernels of csrc/cuda/gmm_full.cuh on the host; called by test_gpu_gmm_full.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/gmm_full.cuh"

using namespace latent_engine;

// The arguments of all calls; mirrored by `Arguments` in test_gpu_gmm_full.py.
struct Call {
  const void* z;
  const float *means, *chol, *log_weights;
  int64_t N, K, D, z_row, z_col, z_type, wave, backwards;

  gmm_full::Problem problem(Workspace& workspace) const {
    WAVE = static_cast<int>(wave), reversed = backwards != 0;
    gmm_full::Problem p{z, static_cast<Scalar>(z_type), z_row, z_col, means, chol, nullptr, N, K, D};
    gmm_full::prepare_mixture(p, log_weights, workspace, 0);
    return p;
  }
};

extern "C" void emulate_forward(const Call* call, float* log_prob, float* responsibilities) {
  Workspace workspace;
  gmm_full::forward(call->problem(workspace), log_prob, responsibilities, workspace, 0);
}

extern "C" void emulate_backward(const Call* call, const float* grad, const float* log_prob, const float* coef, void* grad_z,
                                 double* weight, double* first, double* second) {
  Workspace workspace;
  const gmm_full::Problem p = call->problem(workspace);
  const gmm_full::Upstream up{grad, log_prob, coef};
  gmm_full::backward_z(p, up, grad_z, workspace, 0);
  gmm_full::moments(p, up, {weight, first, second}, workspace, 0);
}
