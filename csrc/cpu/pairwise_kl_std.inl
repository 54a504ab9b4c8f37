// The deviation of the total KL over ordered pairs, and its gradients. Two ways, of which the binding takes the cheaper:
// from the pair matrix, 2 FMAs a pair and dimension and 5 more for the gradients, or from Gram matrices in float64, 4 D² FMAs
// a posterior and 8 D² more.

constexpr int kPairVectors = LATENT_VECTOR_BYTES == 64 ? 4 : 2;  // of first posteriors in a register tile
// Dimensions added up before they join the total: over D = 1024 a plain sum is off by 4 eps. Their columns stay in the L1 cache.
constexpr int64_t kTotalRun = 32;
// Dimensions whose ones leave the sum of p w − 1 in one subtraction, which shares its ports with the FMAs on some processors.
constexpr int64_t kOnesRun = 4;

// Σ (p w − 1) over the dimensions [d, end), 2 KL less the difference of the log-determinants, for a tile of second posteriors
// and `vectors` of first ones: set, or added to what is there.
template <class T, int vectors>
static inline void pair_total_tile(const PairColumns<T>& columns, int64_t d, int64_t end, int64_t j, int64_t i, bool add,
                                   T* totals) {
  const int64_t stride = columns.stride;
  const T *mu_i = columns.mu + d * stride + i, *var_i = columns.var + d * stride + i;
  const T *mu_j = columns.mu + d * stride + j, *inverse_j = columns.inverse + d * stride + j;
  Vec<T> sums[kPairTile][vectors];
#pragma GCC unroll 4
  for (int t = 0; t < kPairTile; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[t][v] = Vec<T>{};
  for (int64_t run = std::min(end, d + kOnesRun); d < end; run = std::min(end, d + kOnesRun)) {
#pragma GCC unroll 4
    for (int t = 0; t < kPairTile; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[t][v] -= T(run - d);
    for (; d < run; ++d, mu_i += stride, var_i += stride, mu_j += stride, inverse_j += stride) {
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> mu = load(mu_i + v * kLanes<T>), var = load(var_i + v * kLanes<T>);
#pragma GCC unroll 4
        for (int t = 0; t < kPairTile; ++t) {
          const Vec<T> delta = mu - broadcast(mu_j[t]);
          sums[t][v] += (delta * delta + var) * broadcast(inverse_j[t]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kPairTile; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* const at = totals + (j + t) * stride + i + v * kLanes<T>;
      store(at, add ? load(at) + sums[t][v] : sums[t][v]);
    }
}

// Those of the dimensions [begin, end), which may be none, for the second posteriors [first, last), into
// totals[stride][stride].
template <class T>
static void pair_totals(const PairColumns<T>& columns, int64_t begin, int64_t end, int64_t first, int64_t last, T* totals) {
  int64_t d = begin;
  do {
    in_tiles<kPairVectors>(columns.stride / kLanes<T>, [&](auto vectors, int64_t v) {
      for (int64_t j = first; j < last; j += kPairTile)
        pair_total_tile<T, vectors()>(columns, d, std::min(end, d + kTotalRun), j, v * kLanes<T>, d > begin, totals);
    });
  } while ((d += kTotalRun) < end);
}

// Σ_d log σ² of each posterior less that of the first one.
template <class T>
static void pair_log_dets(const PairwiseKlDirect<T>& p) {
  const int64_t stride = p.columns.stride;
  for (int64_t i = 0; i < stride; i += kLanes<double>) {
    Vec<double> sum = {};
    for (int64_t block = 0; block * kPairDims < p.batch.D; ++block) sum += load_as<double>(p.levels + block * stride + i);
    for (int k = 0; k < kLanes<double>; ++k) p.log_det[i + k] = T(sum[k]);
  }
}

// KL − mean of the second posteriors [first, last) from the totals of all parts, and their sums.
template <class T>
static void pair_divergences(const PairwiseKlDirect<T>& p, int64_t first, int64_t last) {
  const int64_t stride = p.columns.stride, N = p.batch.N;
  for (int64_t j = first; j < last; ++j) {
    T* const row = p.deviations + j * stride;
    for (int64_t i = 0; i < stride; i += kLanes<T>) {
      Vec<T> total = load(row + i);
      for (int64_t part = 1; part < p.parts; ++part) total += load(row + part * stride * stride + i);
      store(row + i, T(0.5) * (total + (broadcast(p.log_det[j]) - load(p.log_det + i))) - p.mean);
    }
    if (j < N) std::fill(row + N, row + stride, T(0)), row[j] = 0;
    else std::fill_n(row, stride, T(0));
    p.sums[j] = sum_groups<T>(stride, [&](int64_t k) { return load(row + k); });
  }
}

// Takes the mean of the deviations out of them, which rounding left there, and adds up their squares.
template <class T>
static void pair_deviations(const PairwiseKlDirect<T>& p, T error, int64_t first, int64_t last) {
  const int64_t stride = p.columns.stride, N = p.batch.N;
  for (int64_t j = first; j < last; ++j) {
    T* const row = p.deviations + j * stride;
    for (int64_t i = 0; i < (j < N ? N : 0); ++i) row[i] -= i == j ? T(0) : error;
    p.squares[j] = sum_groups<double>(stride, [&](int64_t k) { return load_as<double>(row + k) * load_as<double>(row + k); });
  }
}

// Rows [first, last) of the transposed deviations, times unit; Σ_k g_ki − Σ_j g_ij, which all dimensions share.
template <class T>
static void pair_turn(const PairwiseKlDirect<T>& p, int64_t first, int64_t last) {
  const int64_t stride = p.columns.stride;
  transpose(p.deviations + first, stride, 1, p.turned + first * stride, stride, stride, last - first);
  for (int64_t i = first; i < last; ++i) {
    const T* const second = p.deviations + i * stride;
    T* const first_role = p.turned + i * stride;
    for (int64_t k = 0; k < stride; ++k) first_role[k] *= p.unit;
    p.balance[i] = sum_groups<T>(stride, [&](int64_t k) { return p.unit * load(second + k) - load(first_role + k); });
  }
}

// The gradients of dimension d for `vectors` vectors of posteriors i, in both roles: no sum is one over lanes.
template <class T, int vectors>
static inline void pair_gradient_tile(const PairwiseKlDirect<T>& p, int64_t d, int64_t i, T* dmu, T* dlog_var) {
  enum { gw, gwd, hd, hp, kSums };  // g = g_ij, h = g_ji
  const int64_t N = p.batch.N, stride = p.columns.stride;
  const PairColumn<T> c(p.columns, d);
  Vec<T> mu[vectors], totals[kSums][vectors] = {};
  for (int v = 0; v < vectors; ++v) mu[v] = load(c.mu + i + v * kLanes<T>);
  for (int64_t j0 = 0; j0 < N; j0 += kPairColumns) {
    Vec<T> sums[kSums][vectors] = {};
    for (int64_t j = j0; j < std::min(N, j0 + kPairColumns); ++j) {
      const T *const as_first = p.deviations + j * stride + i, *const as_second = p.turned + j * stride + i;
      const Vec<T> mu_j = broadcast(c.mu[j]), var_j = broadcast(c.var[j]);
      const Vec<T> inverse_j = broadcast(p.unit * c.inverse[j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> delta = mu[v] - mu_j, h = load(as_second + v * kLanes<T>);
        const Vec<T> weighted = load(as_first + v * kLanes<T>) * inverse_j;
        sums[gw][v] += weighted, sums[gwd][v] += weighted * delta;
        sums[hd][v] += h * delta, sums[hp][v] += h * (delta * delta + var_j);
      }
    }
    for (int s = 0; s < kSums; ++s)
      for (int v = 0; v < vectors; ++v) totals[s][v] += sums[s][v];
  }
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = i + v * kLanes<T>;
    const Vec<T> w = load(c.inverse + at), balance = load(p.balance + at);
    store(dmu + at, p.scale * (totals[gwd][v] + w * totals[hd][v]));
    store(dlog_var + at, p.scale * T(0.5) * ((load(c.var + at) * totals[gw][v] - w * totals[hp][v]) + balance));
  }
}

// The gradients of dimensions [first, last).
template <class T>
static void pair_direct_gradient(const PairwiseKlDirect<T>& p, int64_t first, int64_t last) {
  const int64_t N = p.batch.N, D = p.batch.D, stride = p.columns.stride;
  Arena<T> arena(Scratch::task, kPairDims * stride, kPairDims * stride);
  T *const dmu = arena.take(kPairDims * stride), *const dlog_var = arena.take(kPairDims * stride);
  for (int64_t d0 = first; d0 < last; d0 += kPairDims) {
    const int64_t count = std::min(kPairDims, last - d0);
    for (int64_t k = 0; k < count; ++k)
      in_tiles<kPairVectors>(stride / kLanes<T>, [&](auto vectors, int64_t v) {
        pair_gradient_tile<T, vectors()>(p, d0 + k, v * kLanes<T>, dmu + k * stride, dlog_var + k * stride);
      });
    transpose(dmu, stride, 1, p.gradients + d0, D, count, N);
    transpose(dlog_var, stride, 1, p.gradients + N * D + d0, D, count, N);
  }
}
