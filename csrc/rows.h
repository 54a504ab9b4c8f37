// Tensors whose last axes are features, as [S, N, P]; for the bindings of CPU and CUDA ops.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

namespace latent_engine {

// The last `event_dims` axes, which lie next to one another, are features [P]; up to two axes lead. An axis of size 1, or that
// is not there, has stride 0.
struct Rows {
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};

  Rows() = default;
  Rows(const torch::stable::Tensor& t, int64_t event_dims) {
    const int64_t leading = std::max<int64_t>(t.dim() - event_dims, 0);
    for (int64_t i = 0; i < leading; ++i) {
      const int64_t axis = i + 2 - leading;
      sizes[axis] = t.size(i);
      strides[axis] = t.size(i) == 1 ? 0 : t.stride(i);
    }
    for (int64_t i = leading; i < t.dim(); ++i) sizes[2] *= t.size(i);
    strides[2] = sizes[2] != 1;
  }
};

// As it is if features lie next to one another.
inline torch::stable::Tensor with_dense_features(const torch::stable::Tensor& t, int64_t event_dims) {
  int64_t next = 1;
  for (int64_t i = t.dim() - 1; i >= std::max<int64_t>(t.dim() - event_dims, 0); --i) {
    if (t.size(i) != 1 && t.stride(i) != next) return torch::stable::contiguous(t);
    next *= t.size(i);
  }
  return t;
}

inline std::optional<torch::stable::Tensor> with_dense_features(const std::optional<torch::stable::Tensor>& t,
                                                                int64_t event_dims) {
  return t ? std::optional(with_dense_features(*t, event_dims)) : std::nullopt;
}

}  // namespace latent_engine
