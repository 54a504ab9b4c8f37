// The polynomials of WideNodes. With s = h (1 + x) and t = s + b = m (1 + ρx), m = b + h, ρ = h / m and ρ = 2r / (1 + r²):
//
//     log(1 + ρx) = −log(1 + r²) − 2 Σ_k (−r)^k / k · T_k(x)
//     1 / (1 + ρx) = 1/c + 2 Σ_k (−r)^k / c · T_k(x)                                  c = √(1 − ρ²)
//     1 / (1 + ρx)² = 1/c³ + 2 Σ_k (−r)^k (1 + k c) / c³ · T_k(x)
//
// in Chebyshev polynomials T_k, k ≥ 1 (the second is the generating function of the T_k, the others its integral and derivative
// over ρ). A series cut before T_K errs by some r^K, where Taylor's would by ρ^K. Their powers are of u = x less its mean, so
// that the moments of high-dimensional posteriors stay small.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cpu/mmd_normal.h"

namespace latent_engine {

// Σ_k c_k T_k(x) in ascending powers of x − center.
template <size_t n>
std::array<double, n> powers_of_chebyshev(const std::array<double, n>& c, double center) {
  std::array<double, n> sum{}, previous{}, current{};  // T_{k−1} and T_k
  current[0] = 1;
  for (size_t k = 0; k < n; ++k) {
    for (size_t i = 0; i < n; ++i) sum[i] += c[k] * current[i];
    std::array<double, n> next{};
    for (size_t i = 0; i < n; ++i)
      next[i] = (k == 0 ? 1 : 2) * (center * current[i] + (i ? current[i - 1] : 0)) - previous[i];
    previous = current, current = next;
  }
  return sum;
}

// Moves the wide ones of `nodes`, the first, to the result; `memory` has room for three polynomials of every node. Sums s of
// variances lie in [0, span]. A node is wide if the series of 1/t² errs by less than four roundings, and those of the
// logarithm, summed over D dimensions, by less than one.
template <class T>
WideNodes<T> wide_nodes(GaussianSum<T>& nodes, double span, double mean, int64_t D, T* memory) {
  constexpr int terms = WideNodes<T>::kTerms;
  const double h = 0.5 * std::max(span, 4.0 * std::numeric_limits<T>::min()), center = mean / h;
  const double tolerance = std::numeric_limits<T>::epsilon() / 4 * std::min(1.0, 64.0 / D);
  const auto ratio = [&](int64_t q) {
    const double rho = h / (nodes.widths[q] + h);
    return rho / (1 + std::sqrt(1 - rho * rho));
  };
  int64_t count = 0;
  while (count < nodes.count && std::pow(ratio(count), terms) <= tolerance) ++count;

  T *const log_t = memory, *const inverse = log_t + count * terms, *const inverse_square = inverse + count * terms;
  for (int64_t q = 0; q < count; ++q) {
    const double b = nodes.widths[q], m = b + h, r = ratio(q), c = (1 - r * r) / (1 + r * r);
    std::array<double, terms> first, second, third;
    first[0] = std::log1p(h / b) - std::log1p(r * r), second[0] = 1 / (c * m), third[0] = 1 / (c * c * c * m * m);
    for (int k = 1; k < terms; ++k) {
      const double power = 2 * std::pow(-r, k);
      first[k] = -power / k, second[k] = power * second[0], third[k] = power * (1 + k * c) * third[0];
    }
    first = powers_of_chebyshev(first, center - 1), second = powers_of_chebyshev(second, center - 1);
    third = powers_of_chebyshev(third, center - 1);
    first[0] *= D;
    std::copy(first.begin(), first.end(), log_t + q * terms);
    std::copy(second.begin(), second.end(), inverse + q * terms);
    std::copy(third.begin(), third.end(), inverse_square + q * terms);
  }
  const WideNodes<T> wide{count, static_cast<T>(1 / h), static_cast<T>(center), nodes.weights, log_t, inverse, inverse_square};
  nodes.count -= count, nodes.weights += count, nodes.widths += count, nodes.powers += count, nodes.rests += count;
  return wide;
}

}  // namespace latent_engine
