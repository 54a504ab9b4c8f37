// Pairs of points: distances, then all scales of the kernel, then the gradients. Per pair and dimension a
// subtraction and an FMA, and for the gradients of both points a subtraction and two FMAs.

// A tile whose distances are held in memory at once. Its rows share the loads and stores of the columns' gradients, which come
// from the L2 cache; 16 registers have no room for eight.
constexpr int64_t kPointRows = LATENT_VECTOR_BYTES == 64 ? 8 : 4, kPointColumns = 512;
constexpr int kDistanceRows = 4, kPointVectors = LATENT_VECTOR_BYTES == 64 ? 4 : 2;

// Squared distances of kDistanceRows rows from `vectors` vectors of columns.
template <class T, int vectors>
static inline void mmd_points_distances(const T* rows, const T* columns, int64_t stride, int64_t D, T* out) {
  Vec<T> sums[kDistanceRows][vectors] = {};
  for (int64_t d = 0; d < D; ++d, rows += stride, columns += stride) {
    Vec<T> x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = load(columns + v * kLanes<T>);
#pragma GCC unroll 4
    for (int k = 0; k < kDistanceRows; ++k) {
      const Vec<T> row = broadcast(rows[k]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> delta = x[v] - row;
        sums[k][v] += delta * delta;
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kDistanceRows; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(out + k * kPointColumns + v * kLanes<T>, sums[k][v]);
}

// n squared distances become kernel values, and `slopes`, if asked for, −scale times their derivatives.
template <class T, bool slopes_too>
static void mmd_imq(const ImqGroup<T>* groups, int64_t count, T scale, T* values, T* slopes, int64_t n) {
  constexpr int V = kPointVectors;
  for (int64_t i = 0; i < n; i += V * kLanes<T>) {
    Vec<T> square[V], value[V] = {}, slope[V] = {};
    for (int v = 0; v < V; ++v) square[v] = load(values + i + v * kLanes<T>);
    for (const ImqGroup<T>* g = groups; g != groups + count; ++g) {
      const int top = g->count - 1;
      Vec<T> y[V], p[V], q[V], r[V];
      for (int v = 0; v < V; ++v) {
        y[v] = g->width / (square[v] + g->width);
        p[v] = broadcast(g->p[top]), q[v] = broadcast(g->q[top]), r[v] = broadcast(g->r[2 * top]);
      }
      for (int c = top - 1; c >= 0; --c)
        for (int v = 0; v < V; ++v) p[v] = p[v] * y[v] + g->p[c], q[v] = q[v] * y[v] + g->q[c];
      if (slopes_too)
        for (int c = 2 * top - 1; c >= 0; --c)
          for (int v = 0; v < V; ++v) r[v] = r[v] * y[v] + g->r[c];
      const T factor = scale / g->width;
      for (int v = 0; v < V; ++v) {
        const Vec<T> ratio = y[v] / q[v];
        value[v] += ratio * p[v];
        if (slopes_too) slope[v] += (ratio * ratio) * (r[v] * factor);
      }
    }
    for (int v = 0; v < V; ++v) {
      store(values + i + v * kLanes<T>, value[v]);
      if (slopes_too) store(slopes + i + v * kLanes<T>, slope[v]);
    }
  }
}

// The same for Σ_q w_q exp(−a_q r²).
template <class T, bool slopes_too>
static void mmd_gaussian(const GaussianSum<T>& sum, T scale, T* values, T* slopes, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> square = load(values + i);
    Vec<T> value = {}, slope = {};
    for (int64_t q = 0; q < sum.count; ++q) {
      const Vec<T> term = sum.weights[q] * exp<T>(square * -sum.rates[q]);
      value += term;
      if (slopes_too) slope += term * sum.rates[q];
    }
    store(values + i, value);
    if (slopes_too) store(slopes + i, slope * scale);
  }
}

// dx_j += w_kj δ_kj and dx_k −= Σ_j w_kj δ_kj over a tile, where δ = x_j − x_k; w[kPointRows][kPointColumns].
template <class T>
static void mmd_gradient_tile(const T* rows, T* drows, const T* columns, T* dcolumns, const T* w, int64_t stride, int64_t D,
                              int64_t n) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  for (int64_t d = 0; d < D; ++d, rows += stride, drows += stride, columns += stride, dcolumns += stride) {
    Vec<T> sums[kPointRows][registers] = {};
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      Vec<T> sum[kPointRows] = {}, row[kPointRows];
#pragma GCC unroll 8
      for (int k = 0; k < kPointRows; ++k) row[k] = broadcast(rows[k]);
      for (int64_t i = r * kLanes<T>; i < n; i += kLine<T>) {
        const Vec<T> x = load(columns + i);
        Vec<T> dx = load(dcolumns + i);
#pragma GCC unroll 8
        for (int k = 0; k < kPointRows; ++k) {
          const Vec<T> delta = x - row[k], weight = load(w + k * kPointColumns + i);
          dx += weight * delta;
          sum[k] += weight * delta;
        }
        store(dcolumns + i, dx);
      }
#pragma GCC unroll 8
      for (int k = 0; k < kPointRows; ++k) sums[k][r] = sum[k];
    }
    for (int k = 0; k < kPointRows; ++k) drows[k] -= sum_lanes<T>(sums[k]);
  }
}

// The pairs i < j of kPointRows rows from i with columns [begin, end), end ≤ begin + kPointColumns; adds the kernel to `sum`, a
// row at a time, for levels differ in kPointRows.
template <class T, bool gradient>
static void mmd_points_tile(const NormalMmd<T>& p, int64_t i, int64_t begin, int64_t end, T* values, T* slopes, double& sum) {
  constexpr int64_t wide = kPointVectors * kLanes<T>;
  const int64_t n = (end - begin + kLine<T> - 1) / kLine<T> * kLine<T>;
  for (int64_t k = 0; k < kPointRows; k += kDistanceRows) {
    int64_t j = 0;
    for (; j + wide <= n; j += wide)
      mmd_points_distances<T, kPointVectors>(p.xt + i + k, p.xt + begin + j, p.stride, p.D, values + k * kPointColumns + j);
    for (; j < n; j += kLanes<T>)
      mmd_points_distances<T, 1>(p.xt + i + k, p.xt + begin + j, p.stride, p.D, values + k * kPointColumns + j);
  }
  const T scale = T(-2 * p.pair_weight);
  for (int64_t k = 0; k < kPointRows; ++k) {
    T *const value = values + k * kPointColumns, *const slope = slopes + k * kPointColumns;
    if (p.imq_count) mmd_imq<T, gradient>(p.imq, p.imq_count, scale, value, slope, n);
    else mmd_gaussian<T, gradient>(p.pairs, scale, value, slope, n);
    const int64_t skipped = i + k < p.N ? std::clamp<int64_t>(i + k + 1 - begin, 0, n) : n;
    for (T* row : {value, slope}) {
      std::fill(row, row + skipped, T(0));
      std::fill(row + (end - begin), row + n, T(0));
    }
    sum += mmd_sum(value, n);
  }
  if (gradient)
    mmd_gradient_tile(p.xt + i, p.dxt + i, p.xt + begin, p.dxt + begin, slopes, p.stride, p.D, n);
}

template <class T>
static double mmd_points_pairs(const NormalMmd<T>& p, int64_t panel, int64_t other) {
  Arena<T> arena(Scratch::task, kPointRows * kPointColumns, kPointRows * kPointColumns);
  T *const values = arena.take(kPointRows * kPointColumns), *const slopes = arena.take(kPointRows * kPointColumns);
  const auto tile = p.dxt ? mmd_points_tile<T, true> : mmd_points_tile<T, false>;
  const int64_t last_row = std::min(p.N, (panel + 1) * p.panel), last = std::min(p.N, (other + 1) * p.panel);
  double sum = 0;
  for (int64_t block = other * p.panel; block < last; block += kPointColumns) {
    const int64_t end = std::min(last, block + kPointColumns);
    for (int64_t i = panel * p.panel; i < std::min(last_row, end); i += kPointRows)
      tile(p, i, std::max(block, i / kLine<T> * kLine<T>), end, values, slopes, sum);
  }
  return p.pair_weight * sum;
}

// Rows [first, last) against the prior: Σ_q w_q exp(−a_q |x|²) with the prior's smoothing in w and a.
template <class T>
static double mmd_points_cross(const NormalMmd<T>& p, int64_t first, int64_t last) {
  Arena<T> arena(Scratch::task, kPointColumns, kPointColumns);
  T *const values = arena.take(kPointColumns), *const slopes = arena.take(kPointColumns);
  double sum = 0;
  for (int64_t i = first; i < last; i += kPointColumns) {
    const int64_t n = std::min(kPointColumns, last - i), padded = (n + kLine<T> - 1) / kLine<T> * kLine<T>;
    std::fill_n(values, padded, T(0));
    for (int64_t d = 0; d < p.D; ++d) {
      const T* x = p.xt + d * p.stride + i;
      for (int64_t j = 0; j < padded; ++j) values[j] += x[j] * x[j];
    }
    mmd_gaussian<T, true>(p.cross, T(-2 * p.cross_weight), values, slopes, padded);
    std::fill(values + n, values + padded, T(0));
    sum += mmd_sum(values, padded);
    for (int64_t d = 0; p.dxt && d < p.D; ++d) {
      const T* x = p.xt + d * p.stride + i;
      T* dx = p.dxt + d * p.stride + i;
      for (int64_t j = 0; j < padded; ++j) dx[j] = slopes[j] * x[j];
    }
  }
  return p.cross_weight * sum;
}
