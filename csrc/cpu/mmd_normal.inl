// See mmd_normal.h. Rows lie across lanes: arrays are [D][stride], with zeros in the padding. A tile is a few broadcast rows
// against a block of columns. A pair i < j is visited once and gives to the gradients of both.

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // lanes of 64 bytes, the unit of reductions

// Values [first, first + n), padded to whole lines, of each column, scaled; the padding is zero.
template <class T>
static void mmd_pack(const T* from, const int64_t (&strides)[2], int64_t first, int64_t n, int64_t padded, int64_t D, T scale,
                     T* to, int64_t stride) {
  transpose(from + first * strides[0], strides[0], strides[1], to + first, stride, n, D);
  for (int64_t d = 0; d < D; ++d) {
    T* column = to + d * stride + first;
    for (int64_t i = 0; i < n; ++i) column[i] *= scale;
    std::fill(column + n, column + padded, T(0));
  }
}

// Sum of n values, a multiple of kLine.
template <class T>
static T mmd_sum(const T* values, int64_t n) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[registers] = {};
  for (int64_t i = 0; i < n; i += kLine<T>)
    for (int r = 0; r < registers; ++r) sums[r] += load(values + i + r * kLanes<T>);
  return sum_lanes<T>(sums);
}

#include "mmd_normal_points.inl"
#include "mmd_normal_posteriors.inl"

template <class T>
static double mmd_normal_pairs(const NormalMmd<T>& p, int64_t panel, int64_t other) {
  return p.vt ? mmd_posteriors_pairs(p, panel, other) : mmd_points_pairs(p, panel, other);
}

template <class T>
static void mmd_normal_pack(const NormalMmd<T>& p, int64_t panel) {
  const int64_t first = panel * p.panel, n = std::min(p.panel, p.N - first), padded = std::min(p.panel, p.stride - first);
  mmd_pack(p.x, p.x_strides, first, n, padded, p.D, p.unit, p.xt, p.stride);
  if (p.vt) mmd_pack_variances(p, panel, padded);
}

template <class T>
static double mmd_normal_rows(const NormalMmd<T>& p, int64_t panel) {
  const int64_t first = panel * p.panel, last = std::min(p.N, first + p.panel);
  return (p.vt ? mmd_posteriors_cross(p, panel) : mmd_points_cross(p, first, last)) + mmd_normal_pairs(p, panel, panel);
}

template <class T>
static void mmd_normal_finish(const NormalMmd<T>& p, int64_t panel) {
  const int64_t first = panel * p.panel, n = std::min(p.panel, p.N - first);
  for (int64_t d = 0; d < p.D; ++d) {
    T* dx = p.dxt + d * p.stride + first;
    for (int64_t i = 0; i < n; ++i) dx[i] *= p.unit;
    if (!p.dlog_var) continue;
    T* dv = p.dvt + d * p.stride + first;
    const T* v = p.vt + d * p.stride + first;
    for (int64_t i = 0; i < n; ++i) dv[i] *= v[i];
  }
  if (p.dx) transpose(p.dxt + first, p.stride, 1, p.dx + first * p.D, p.D, p.D, n);
  if (p.dlog_var) transpose(p.dvt + first, p.stride, 1, p.dlog_var + first * p.D, p.D, p.D, n);
}

template <class T>
static constexpr NormalMmdKernels<T> mmd_normal_kernels() {
  return {mmd_normal_pack<T>, mmd_normal_rows<T>, mmd_normal_pairs<T>, mmd_normal_finish<T>};
}
