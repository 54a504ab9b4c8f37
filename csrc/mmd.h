// What the options of mmd_fwd mean; shared by the CPU and CUDA bindings. The maths is in kernels/mmd.py.
#pragma once

#include <cstdint>
#include <vector>

namespace latent_engine {

enum class MmdKernel : int64_t { gaussian, imq, laplacian, rational_quadratic, energy };
enum class MmdEstimator : int64_t { sum, unbiased, biased };

// Weights of the sums over the ordered pairs i ≠ j of x, of y, and over all pairs of x and y; `constant` is what the pairs
// i = j add.
struct MmdWeights {
  double xx, yy, xy, constant;

  // `sections` are the factors of the three sums or means.
  MmdWeights(MmdKernel kernel, const std::vector<double>& scales, MmdEstimator estimator, const std::vector<double>& sections,
             int64_t N, int64_t M)
      : xx(sections[0]), yy(sections[1]), xy(sections[2]), constant(0) {
    if (estimator == MmdEstimator::sum) return;
    const double n = static_cast<double>(N), m = static_cast<double>(M), less = estimator == MmdEstimator::unbiased ? 1 : 0;
    const double at_zero = less || kernel == MmdKernel::energy ? 0 : static_cast<double>(scales.size());
    constant = at_zero * (xx / n + yy / m);
    xx /= n * (n - less), yy /= m * (m - less), xy /= n * m;
  }
};

}  // namespace latent_engine
