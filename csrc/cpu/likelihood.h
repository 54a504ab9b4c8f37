// CPU kernels of the likelihoods: raw pointers and sizes. The maths is in kernels/likelihood.py.
#pragma once

#include <cstdint>

namespace latent_engine {

constexpr int kLikelihoods = 4;         // in the order of kernels/likelihood.py
constexpr int kLikelihoodDerived = 3;   // numbers kept for each value of the second parameter, at most
constexpr int64_t kLikelihoodPad = 16;  // values that stand behind one that serves all features

// Bytes of x that a task reads again for each sample. Sums of the Gaussian take 14 % longer with x in the L2 cache; gradients
// are written too, and gain from long stretches.
constexpr int64_t likelihood_cache(bool gradient) { return gradient ? 1 << 19 : 1 << 14; }

// One of the arguments [S, N, P]; those along which it is broadcast have stride 0.
template <class T>
struct LikelihoodOperand {
  const T* data;
  int64_t strides[2];  // of s and n
  int64_t step;        // of p: 1 or 0

  const T* at(int64_t s, int64_t n, int64_t p) const { return data + s * strides[0] + n * strides[1] + p * step; }
};

template <class T>
struct LikelihoodInputs {
  int64_t S, N, P;
  LikelihoodOperand<T> x, a, b;    // b.data null if the likelihood has one parameter
  LikelihoodOperand<bool> mask;    // data null if every entry counts
  T* derived;                      // [kLikelihoodDerived][derived_size] where b is the same for all rows, else null
  int64_t derived_size;
};

// S × N rows are cut into chunks that differ by one row at most, one task each. The cut depends on sizes only.
struct LikelihoodGrid {
  int64_t s_chunks, n_chunks;

  int64_t tasks() const { return s_chunks * n_chunks; }
};

template <class T>
struct LikelihoodForward {
  LikelihoodInputs<T> inputs;
  LikelihoodGrid grid;
  T* log_prob;  // [S, N]
};

// The gradient of one argument. One that is broadcast is summed: over the rows of a task in `partial`, whose sizes are
// [S or chunks, N or chunks, P or 1], and over tasks by the binding.
template <class T>
struct LikelihoodGradient {
  T* full;          // [S, N, P] where nothing is summed, else null
  double* partial;  // null if `full` is set, or the gradient is not needed
  bool per_s, per_n, per_p;

  bool needed() const { return full || partial; }
};

template <class T>
struct LikelihoodBackward {
  LikelihoodInputs<T> inputs;
  LikelihoodGrid grid;
  const T* grad;
  int64_t grad_strides[2];
  LikelihoodGradient<T> gradients[3];  // of x, a and b
};

template <class T>
struct LikelihoodKernels {
  void (*derive)(const LikelihoodInputs<T>&);           // fills `derived`, before forward
  void (*derive_backward)(const LikelihoodInputs<T>&);  // before backward, which needs other numbers
  void (*forward)(const LikelihoodForward<T>&, int64_t task);
  void (*backward)(const LikelihoodBackward<T>&, int64_t task);
};

}  // namespace latent_engine
