// CPU kernels of mmd2: raw pointers and sizes. The maths is in kernels/mmd.py.
#pragma once

#include <cstdint>

#include "../mmd.h"

namespace latent_engine {

constexpr int64_t kMmdBlock = 64;  // points of a block; a tile is the pairs of two blocks

// k(u) of the squared distance u, and its slope −dk/du.
template <class T>
struct MmdProfile {
  MmdKernel kernel;
  int64_t scales;
  T unit;            // imq: what u is divided by in the polynomials; rational_quadratic: C
  T limit;           // imq: largest u for which the polynomials stay finite
  T slope_unit;      // gradients are summed so many times as large
  const T* widths;   // [scales]: imq: C; rational_quadratic: α
  const T* rates;    // [scales]: factor of u, or of √u for laplacian
  const T *numerator, *denominator, *slope;  // imq: [scales], [scales + 1], [2 scales − 1]

  static int64_t size(int64_t scales) { return 6 * scales + 1; }
};

template <class T>
struct MmdPoints {
  int64_t count;
  const T* data;
  int64_t strides[2];
  T* grad;  // [count, D], or null if not needed

  int64_t blocks() const { return (count + kMmdBlock - 1) / kMmdBlock; }
};

// Points are cut into blocks of their own set, those of x first, and blocks into groups; a task is the tiles of two groups.
// In a round every group is in at most one task, so tasks of a round add to gradients without meeting, in an order that
// depends on sizes only. Small samples have copies of points and gradients instead, a task each.
template <class T>
struct MmdProblem {
  MmdProfile<T> profile;
  MmdPoints<T> x, y;
  int64_t D;
  MmdWeights weights;
  int64_t group;   // blocks a group
  int64_t copies;
  T* blocks;       // [copies][blocks][D][kMmdBlock], the last point of a set repeated to fill its last block
  T* grads;        // the same for the gradients, or null

  int64_t block_count() const { return x.blocks() + y.blocks(); }
  int64_t groups() const { return (block_count() + group - 1) / group; }
  int64_t size() const { return block_count() * D * kMmdBlock; }  // of a copy
  MmdProblem copy(int64_t i) const {
    MmdProblem p = *this;
    p.blocks += i * size();
    if (grads) p.grads += i * size();
    return p;
  }
};

template <class T>
struct MmdKernels {
  void (*pack_profile)(MmdProfile<T>&, const double* scales, double unit, T* memory);
  void (*load)(const MmdProblem<T>&, int64_t first, int64_t last);                     // blocks [first, last)
  double (*pairs)(const MmdProblem<T>&, int64_t group, int64_t other);                 // weighted sum; adds to grads
  void (*store_grads)(const MmdProblem<T>&, int64_t first, int64_t last);              // blocks [first, last), all copies
  void (*matrix)(const MmdProblem<T>&, T* out, int64_t first, int64_t last);           // k(x, y), blocks of x
};

}  // namespace latent_engine
