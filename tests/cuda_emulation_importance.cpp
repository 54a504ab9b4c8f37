// The kernels of csrc/cuda/importance.cuh on the host; called by test_gpu_importance.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/importance.cuh"

using namespace latent_engine;

// The arguments of all calls; mirrored by `Arguments` in test_gpu_importance.py.
struct Call {
  const void* z;
  const float *mu, *log_var, *log_px, *log_pz;
  int64_t S, N, D, strides[3], log_var_strides[2], z_type, groups, sign, extreme, wave, backwards;
  double scale, elbo_weight;

  void prepare() const { WAVE = static_cast<int>(wave), reversed = backwards != 0; }
  importance::Samples samples(Workspace& workspace) const {
    importance::Samples p{z, static_cast<Scalar>(z_type), strides[0], strides[1], strides[2], S, N, D, !log_pz, mu, nullptr,
                          nullptr};
    importance::prepare_posterior(p, log_var, log_var_strides[0], log_var_strides[1], workspace, 0);
    return p;
  }
};

extern "C" void emulate_forward(const Call* call, float* bound, float* log_w, float* weights) {
  Workspace workspace;
  call->prepare();
  if (call->z) importance::all_log_weights(call->samples(workspace), call->log_px, call->log_pz, log_w, 0);
  const importance::Order order{static_cast<float>(call->sign), static_cast<float>(call->scale), call->extreme != 0};
  importance::reduce(call->z ? log_w : call->log_px, call->S, call->N,
                     {call->groups, order, static_cast<float>(call->elbo_weight)}, bound, weights, workspace, 0);
}

extern "C" void emulate_backward(const Call* call, const float* weights, const float* grad, void* grad_z, float* grad_mu,
                                 float* grad_log_var, float* grad_log_w) {
  Workspace workspace;
  call->prepare();
  const importance::Upstream up{weights, grad, grad_log_w};
  importance::backward_samples(call->samples(workspace), up, grad_z, grad_mu, grad_log_var, workspace, 0);
}

extern "C" void emulate_moments(const Call* call, const double* state, double* out) {
  Workspace workspace;
  call->prepare();
  importance::add_moments(call->log_px, call->S, call->N, state, out, workspace, 0);
}
