// The polynomials of NodeGroup, in σ = scale·s: with τ = scale·t = σ + scale·width the sums over 1/t are `scale` times those
// over 1/τ. The scale is near the reciprocal of the geometric mean of the least and the largest t.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/mmd_normal.h"

namespace latent_engine {

// The group of `count` nodes, for sums s in [0, span].
template <class T>
NodeGroup<T> node_group(const T* widths, int64_t count, double span) {
  const double middle = 0.5 * (std::log2(widths[0] + span) + std::log2(double(widths[count - 1])));
  const double scale = std::exp2(-std::round(middle));
  const auto product = [&](int64_t left_out, int times) {  // of τ^times of the other nodes
    std::vector<double> poly{1.0};
    for (int64_t k = 0; k < count * times; ++k) {
      if (k / times == left_out) continue;
      const double constant = scale * widths[k / times];
      poly.push_back(0.0);
      for (size_t i = poly.size() - 1; i > 0; --i) poly[i] = poly[i - 1] + constant * poly[i];
      poly[0] *= constant;
    }
    return poly;
  };
  NodeGroup<T> group{count, static_cast<T>(scale), {}, {}};
  std::copy_n(product(-1, 1).begin(), count, group.denominator);
  for (int64_t q = 0; q < count; ++q) {
    T* to = group.numerators[q];
    for (const double c : product(q, 1)) *to++ = static_cast<T>(scale * c);
    for (const double c : product(q, 2)) *to++ = static_cast<T>(scale * scale * c);
  }
  return group;
}

// Sums s of variances lie in [0, span]; nodes are in descending order of their widths. Q² and R keep their digits where as many
// factors as they have, of the ratio between the least and the largest t, stay in range.
template <class T>
std::vector<NodeGroup<T>> node_groups(const GaussianSum<T>& nodes, double span) {
  const double bits = sizeof(T) == 4 ? 100 : 940;
  const auto fit = [&](int64_t first, int64_t last) {
    return last <= nodes.count && last - first <= NodeGroup<T>::kMost &&
           (last - first) * std::log2((nodes.widths[first] + span) / nodes.widths[last - 1]) <= bits;
  };
  std::vector<NodeGroup<T>> groups;
  for (int64_t first = 0, last; first < nodes.count; first = last) {
    last = first + 1;
    while (fit(first, last + 1)) ++last;
    groups.push_back(node_group<T>(nodes.widths + first, last - first, span));
  }
  return groups;
}

}  // namespace latent_engine
