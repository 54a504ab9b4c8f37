// CPU kernels of mmd2_to_normal: raw pointers and sizes. The maths is in kernels/mmd_normal.py; here lengths are in units of the
// power of two nearest to √D σ, so that scaling rounds nothing.
#pragma once

#include <cstdint>

namespace latent_engine {

// Σ_s C_s / (C_s + r²) over a few of the scales, as y P(y) / Q(y) in y = C / (C + r²) with C the smallest of them, and its
// derivative as −y² R(y) / (C Q(y)²). With C_s / C = 1 + β_s: Q = Π (1 + β_s y), P = Σ_s (1 + β_s) Π_{j≠s} (1 + β_j y) and
// R = Σ_s (1 + β_s) Π_{j≠s} (1 + β_j y)². Every coefficient is positive: nothing cancels. Two divisions serve all scales.
template <class T>
struct ImqGroup {
  static constexpr int kMost = 8;
  int count;
  T width;
  T p[kMost], q[kMost], r[2 * kMost - 1];  // ascending powers
};

// A sum of Gaussian kernels. Posteriors have their nodes in descending order of the widths 1/(2a).
template <class T>
struct GaussianSum {
  int64_t count;
  const T *rates, *weights;
  const T *widths, *powers, *rests;  // of posteriors; D log2 of a width is a whole number and a rest in nats
};

// Nodes so wide beside the variances that polynomials in u = scale·s − center stand for the functions of t = s + width:
// log(t / width), 1/t and 1/t². The first coefficient of the logarithm is that of all D dimensions.
template <class T>
struct WideNodes {
  static constexpr int kTerms = 8;
  int64_t count;
  T scale, center;
  const T *weights, *log_t, *inverse, *inverse_square;  // the polynomials are [count][kTerms], in ascending powers
};

// A few of the other nodes. Σ_q e_q / t_q = N/Q and Σ_q e_q / t_q² = R/Q² with Q = Π t_q, N = Σ_q e_q Π_{j≠q} t_j and
// R = Σ_q e_q Π_{j≠q} t_j², polynomials in scale·s without negative coefficients: nothing cancels, and one division serves all.
template <class T>
struct NodeGroup {
  static constexpr int kMost = 6, kBlock = 8, kTerms = 24;  // terms in whole blocks: 3 count − 1, then zeros
  int64_t count;
  T scale;
  T denominator[kMost];         // ascending powers below the highest, whose coefficient is 1
  T numerators[kMost][kTerms];  // what e_q adds to N, then what it adds to R

  int64_t blocks() const { return (3 * count - 1 + kBlock - 1) / kBlock; }
};

// Rows in panels, of a multiple of 64 bytes of them; the arrays [D][stride] have room for N rows padded to that.
template <class T>
struct NormalMmd {
  int64_t N, D, panel, stride;
  const T *x, *log_var;  // [N, D], with strides; log_var null: points
  int64_t x_strides[2], log_var_strides[2];
  T unit, prior_variance;  // reciprocal of the unit of length; σ² in squared units
  T *xt, *vt;    // [D][stride]
  T *dxt, *dvt;  // the gradients of the value, or null: both or none of them for posteriors
  T *largest, *mean;  // [panels] variances of posteriors
  T span;             // no sum of two variances is larger
  WideNodes<T> wide;
  GaussianSum<T> cross;  // the other nodes of posteriors; all of points
  const NodeGroup<T>* groups;  // of these
  int64_t group_count;
  GaussianSum<T> pairs;        // Gaussian kernels between points; count 0: `imq`
  const ImqGroup<T>* imq;
  int64_t imq_count;
  double pair_weight, cross_weight, self_weight;  // of an unordered pair, of a row against the prior, and with itself
  T *dx, *dlog_var;                               // [N, D] or null
};

template <class T>
struct NormalMmdKernels {
  void (*pack)(const NormalMmd<T>&, int64_t panel);
  double (*rows)(const NormalMmd<T>&, int64_t panel);  // the cross term of a panel and the pairs inside
  double (*pairs)(const NormalMmd<T>&, int64_t panel, int64_t other);
  void (*finish)(const NormalMmd<T>&, int64_t panel);  // writes the gradients of a panel
};

}  // namespace latent_engine
