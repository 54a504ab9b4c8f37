// The deviation of the total KL over ordered pairs, and its gradients. Two ways, of which the binding takes the cheaper:
// from the pair matrix, 2 FMAs a pair and dimension and 5 more for the gradients, or from Gram matrices in float64, 4 D² FMAs
// a posterior and 8 D² more.

constexpr int64_t kTotalRun = 32;  // dimensions added up before they join the total: over D = 1024 a plain sum is off by 4 eps

// 2 KL less the difference of the log-determinants, Σ_d (p w − 1), of a tile of second posteriors and `vectors` of first ones.
template <class T, int vectors>
static inline void pair_total_tile(const PairwiseKlDirect<T>& p, int64_t j, int64_t i) {
  const int64_t stride = p.columns.stride;
  Vec<T> totals[kPairTile][vectors] = {};
  for (int64_t d0 = 0; d0 < p.batch.D; d0 += kTotalRun) {
    Vec<T> sums[kPairTile][vectors] = {};
    for (int64_t d = d0; d < std::min(p.batch.D, d0 + kTotalRun); ++d) {
      const PairColumn<T> c(p.columns, d);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> mu = load(c.mu + i + v * kLanes<T>), var = load(c.var + i + v * kLanes<T>);
#pragma GCC unroll 4
        for (int t = 0; t < kPairTile; ++t) {
          const Vec<T> delta = mu - broadcast(c.mu[j + t]);
          sums[t][v] += (delta * delta + var) * broadcast(c.inverse[j + t]) - T(1);
        }
      }
    }
    for (int t = 0; t < kPairTile; ++t)
      for (int v = 0; v < vectors; ++v) totals[t][v] += sums[t][v];
  }
  for (int t = 0; t < kPairTile; ++t)
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> determinants = broadcast(p.log_det[j + t]) - load(p.log_det + i + v * kLanes<T>);
      store(p.deviations + (j + t) * stride + i + v * kLanes<T>, T(0.5) * (totals[t][v] + determinants) - p.mean);
    }
}

// KL − mean of the second posteriors [first, last), and their sums.
template <class T>
static void pair_totals(const PairwiseKlDirect<T>& p, int64_t first, int64_t last) {
  const int64_t stride = p.columns.stride, N = p.batch.N;
  constexpr int vectors = LATENT_VECTOR_BYTES == 64 ? 4 : 2;
  for (int64_t j = first; j < last; j += kPairTile) {
    int64_t i = 0;
    for (; i + vectors * kLanes<T> <= stride; i += vectors * kLanes<T>) pair_total_tile<T, vectors>(p, j, i);
    for (; i < stride; i += kLanes<T>) pair_total_tile<T, 1>(p, j, i);
    for (int t = 0; t < kPairTile; ++t) {
      T* const row = p.deviations + (j + t) * stride;
      if (j + t < N) std::fill(row + N, row + stride, T(0)), row[j + t] = 0;
      else std::fill_n(row, stride, T(0));
      p.sums[j + t] = sum_groups<T>(stride, [&](int64_t k) { return load(row + k); });
    }
  }
}

// Takes the mean of the deviations out of them, which rounding left there, and adds up their squares.
template <class T>
static void pair_deviations(const PairwiseKlDirect<T>& p, T error, int64_t first, int64_t last) {
  const int64_t stride = p.columns.stride, N = p.batch.N;
  for (int64_t j = first; j < last; ++j) {
    T* const row = p.deviations + j * stride;
    for (int64_t i = 0; i < (j < N ? N : 0); ++i) row[i] -= i == j ? T(0) : error;
    p.squares[j] = sum_groups<T>(stride, [&](int64_t k) { return load(row + k) * load(row + k); });
  }
}

template <class T>
struct GivenTile {
  static constexpr bool gradients = true;
  const T* weights;
  int64_t stride;

  template <bool on_diagonal>
  inline __attribute__((always_inline)) Vec<T> weight(int t, int64_t i, Vec<T>) const {
    return load(weights + t * stride + i);
  }
};

template <class T>
struct GivenWeights {
  static constexpr bool gradients = true, masked = false;  // they are 0 on the diagonal
  const T* weights;
  int64_t stride;

  GivenTile<T> begin(int64_t j, int) const { return {weights + j * stride, stride}; }
  void end(const GivenTile<T>&, int) {}
  void done(int64_t) {}
};

template <class T>
static void pair_direct_gradient(const PairwiseKlDirect<T>& p, int64_t task) {
  GivenWeights<T> weights{p.deviations, p.columns.stride};
  pair_task(p.columns, p.tasks, weights, p.batch.D, task);
}
