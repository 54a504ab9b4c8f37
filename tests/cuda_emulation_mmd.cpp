// The kernels of csrc/cuda/mmd.cuh on the host; called by test_gpu_mmd.py.
struct float2 {
  float x, y;
};
#include "cuda_emulation.h"

#include "../csrc/cuda/mmd.cuh"

using namespace latent_engine;

// The arguments of both calls; mirrored by `Arguments` in test_gpu_mmd.py.
struct Call {
  const float *x, *y;
  const double *scales, *sections;
  int64_t N, M, D, x_row, x_col, y_row, y_col, kernel, count, estimator, wave, backwards;
  double unit;

  mmd::Profile profile() const {
    WAVE = static_cast<int>(wave), reversed = backwards != 0;
    mmd::Profile p{static_cast<MmdKernel>(kernel), static_cast<int>(count), static_cast<float>(unit), {}};
    for (int s = 0; s < count; ++s) p.scales[s] = static_cast<float>(scales[s]);
    return p;
  }
  mmd::Points points_x() const { return {x, N, x_row, x_col}; }
  mmd::Points points_y() const { return {y, M, y_row, y_col}; }
};

extern "C" void emulate_forward(const Call* call, float* value, float* grad_x, float* grad_y) {
  Workspace workspace;
  const std::vector<double> scales(call->scales, call->scales + call->count), sections(call->sections, call->sections + 3);
  const MmdWeights weights(static_cast<MmdKernel>(call->kernel), scales, static_cast<MmdEstimator>(call->estimator), sections,
                           call->N, call->M);
  mmd::forward(call->profile(), call->points_x(), call->points_y(), call->D, weights, value, grad_x, grad_y, workspace, 0);
}

extern "C" void emulate_matrix(const Call* call, float* out) {
  mmd::matrix(call->profile(), call->points_x(), call->points_y(), call->D, out, 0);
}
