// The kernels of csrc/cuda/reparametrize.cuh on the host; called by test_gpu_reparametrize.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/reparametrize.cuh"

using namespace latent_engine;
using namespace latent_engine::reparametrize;

// The arguments of all calls; mirrored by `Arguments` in test_gpu_reparametrize.py.
struct Call {
  const void* mean;
  const float *log_var, *noise, *grad_z, *grad_kl;
  int64_t S, N, D, mean_type, backwards, mean_strides[2], log_var_strides[2], noise_strides[3], grad_z_strides[3],
      grad_kl_strides[2];

  Inputs inputs() const {
    reversed = backwards != 0;
    Inputs in(S, N, D);
    in.mean = mean, in.type = static_cast<Scalar>(mean_type);
    in.mean_stride_n = mean_strides[0], in.mean_stride_d = mean_strides[1];
    in.log_var = {log_var, 0, log_var_strides[0], log_var_strides[1]};
    in.noise = {noise, noise_strides[0], noise_strides[1], noise_strides[2]};
    return in;
  }
};

extern "C" void emulate_forward(const Call* c, float* z, float* kl) { run_forward(c->inputs(), z, kl, 0); }

extern "C" void emulate_backward(const Call* c, void* dmean, float* dlog_var) {
  const Array grad_z{c->grad_z, c->grad_z_strides[0], c->grad_z_strides[1], c->grad_z_strides[2]};
  run_backward(c->inputs(), {grad_z, {c->grad_kl, 0, c->grad_kl_strides[0], c->grad_kl_strides[1]}, dmean, dlog_var}, 0);
}
