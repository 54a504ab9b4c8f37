// The kernels of csrc/cuda/likelihood.cuh on the host; called by test_gpu_likelihood.py.
#include "cuda_emulation.h"

#include "../csrc/cuda/likelihood.cuh"

using namespace latent_engine;

// Mirrored by `Arguments` in test_gpu_likelihood.py; strides of x, a, b and mask, sizes of x, a and b.
struct Call {
  const void *x, *a, *b, *mask;
  int64_t S, N, P, kind, a_type, backwards, strides[4][3], sizes[3][3];

  likelihood::Problem problem() const {
    reversed = backwards != 0;
    likelihood::Problem p{static_cast<const float*>(x), a, static_cast<Scalar>(a_type), static_cast<const float*>(b),
                          static_cast<const bool*>(mask), S, N, P, {}, {}, {}, {}};
    for (int i = 0; i < 3; ++i) {
      if (i < 2) p.x_strides[i] = strides[0][i], p.a_strides[i] = strides[1][i];
      p.b_strides[i] = strides[2][i], p.mask_strides[i] = strides[3][i];
    }
    return p;
  }
};

extern "C" void emulate_forward(const Call* call, float* log_prob) {
  likelihood::forward(call->problem(), call->kind, log_prob, 0);
}

extern "C" void emulate_backward(const Call* call, const float* grad, void* dx, void* da, void* db) {
  Workspace workspace;
  void* const data[3] = {dx, da, db};
  likelihood::Output outputs[3];
  for (int k = 0; k < 3; ++k) {
    outputs[k] = {data[k], k == 1 ? static_cast<Scalar>(call->a_type) : Scalar::f32, {}};
    std::copy_n(call->sizes[k], 3, outputs[k].sizes);
  }
  likelihood::backward(call->problem(), call->kind, grad, outputs, workspace, 0);
}
