// The mean over ordered pairs of each dimension from sums over the posteriors, and its gradient; see pairwise_kl.inl.

// A row over some of the columns: m = μ − centre, log σ², σ² and 1 / σ²; 0, 0, 1 and 1 from `count` to a whole group.
template <class T>
struct CentredRow {
  T mu[kMomentColumns], log_var[kMomentColumns], var[kMomentColumns], inverse[kMomentColumns];

  void read(const Posteriors<T>& p, int64_t n, int64_t first, int64_t count, const T* centre) {
    const T *const mu_row = p.mu + n * p.mu_strides[0], *const log_var_row = p.log_var + n * p.log_var_strides[0];
    for (int64_t k = 0; k < round_up(count, kGroup<T>); k += kLanes<T>) {
      const int64_t d = first + k, left = std::max<int64_t>(count - k, 0);
      store(mu + k, load_strided(mu_row + d * p.mu_strides[1], p.mu_strides[1], left) - load_lanes(centre + k, left));
      const Vec<T> x = load_strided(log_var_row + d * p.log_var_strides[1], p.log_var_strides[1], left);
      Vec<T> w;
      store(log_var + k, x);
      store(var + k, exp<T>(x, w));
      store(inverse + k, w);
    }
  }
};

// Σ_ij KL_d(i‖j) = ½ [Σ v Σ w + Σ m² Σ w − 2 Σ m Σ m w + N Σ m² w − N²], since the log-variances cancel over all pairs.
// `sums` are `stride` apart.
template <class T>
static void pairwise_kl_mean_of(const PairwiseKlMean<T>& p, int64_t d, const double* sums, int64_t stride) {
  const auto moment = [&](Moment k) -> T& { return p.moments[k * p.batch.D + d]; };
  const double N = p.batch.N, m = sums[of_m * stride], w = sums[of_w * stride], mw = sums[of_mw * stride];
  const double v_m2 = sums[of_v * stride] + sums[of_m2 * stride];
  const double total = v_m2 * w - 2 * m * mw + N * sums[of_m2w * stride] - N * N;
  p.mean[d] = T(0.5 * total / (N * (N - 1)));
  moment(sum_m) = T(m), moment(sum_w) = T(w), moment(sum_mw) = T(mw), moment(sum_v_m2) = T(v_m2);
}

// Half h of the lanes, as double.
template <class T, int h>
static inline Vec<double> wide_half(Vec<T> x) {
  if constexpr (sizeof(T) == 8)
    return x;
  else
    return widen<double, T>(lanes_from<h * kLanes<double>, T>(x, std::make_integer_sequence<int, kLanes<double>>{}));
}

// Sums over rows [first, last) for the dimensions of one vector from d on. What μ is against, the mean of the first part of
// the batch, goes to `middle`.
template <class T, class Load>
static inline void moment_strip(const PairwiseKlMean<T>& p, int64_t first, int64_t last, int64_t d, const Load& read,
                                T (&middle)[kLanes<T>], double (&sums)[kMomentSums][kLanes<T>]) {
  constexpr int halves = kLanes<T> / kLanes<double>;
  const Posteriors<T>& b = p.batch;
  const T *mu = b.mu + d * b.mu_strides[1], *log_var = b.log_var + d * b.log_var_strides[1];
  const int64_t rows = std::min(b.N, p.rows);
  Vec<double> middles[halves] = {};
  for (int64_t n = 0; n < rows; ++n) {
    const Vec<T> x = read(mu + n * b.mu_strides[0], b.mu_strides[1]);
    middles[0] += wide_half<T, 0>(x);
    if constexpr (halves == 2) middles[1] += wide_half<T, 1>(x);
  }
  for (int k = 0; k < kLanes<T>; ++k) middle[k] = T(middles[k / kLanes<double>][k % kLanes<double>] / rows);
  const Vec<T> mu0 = load(middle), log_var0 = read(log_var, b.log_var_strides[1]);
  Vec<double> totals[kMomentSums][halves] = {};
  for (int64_t n = first; n < last; ++n) {
    const Vec<T> x = read(mu + n * b.mu_strides[0], b.mu_strides[1]);
    const Vec<T> y = read(log_var + n * b.log_var_strides[0], b.log_var_strides[1]);
    Vec<T> inverse;
    const Vec<T> var = exp<T>(y, inverse);
    const auto add = [&](auto half) {
      constexpr int h = half();
      const Vec<double> m = wide_half<T, h>(x) - wide_half<T, h>(mu0), v = wide_half<T, h>(var);
      const Vec<double> w = wide_half<T, h>(inverse), mw = m * w;
      totals[of_m][h] += m, totals[of_v][h] += v, totals[of_w][h] += w, totals[of_mw][h] += mw;
      totals[of_m2][h] += m * m, totals[of_m2w][h] += m * mw;
      totals[of_level][h] += wide_half<T, h>(y) - wide_half<T, h>(log_var0);
    };
    add(std::integral_constant<int, 0>{});
    if constexpr (halves == 2) add(std::integral_constant<int, 1>{});
  }
  for (int s = 0; s < kMomentSums; ++s)
    for (int h = 0; h < halves; ++h) store(sums[s] + h * kLanes<double>, totals[s][h]);
}

// Sums over a part of the rows for dimensions [first, last).
template <class T>
static void pairwise_kl_moments(const PairwiseKlMean<T>& p, int64_t part, int64_t first, int64_t last) {
  const int64_t D = p.batch.D, row = part * p.rows, end = std::min(p.batch.N, row + p.rows);
  const bool contiguous = p.batch.mu_strides[1] == 1 && p.batch.log_var_strides[1] == 1;
  for (int64_t d = first; d < last; d += kLanes<T>) {
    const int64_t count = std::min<int64_t>(last - d, kLanes<T>);
    T middle[kLanes<T>];
    double sums[kMomentSums][kLanes<T>];
    if (contiguous && count == kLanes<T>)
      moment_strip(p, row, end, d, [](const T* x, int64_t) { return load(x); }, middle, sums);
    else
      moment_strip(p, row, end, d, [=](const T* x, int64_t stride) { return load_strided(x, stride, count); }, middle, sums);
    if (part == 0) std::copy_n(middle, count, p.moments + centre * D + d);
    for (int s = 0; s < kMomentSums; ++s) std::copy_n(sums[s], count, p.sums + (part * kMomentSums + s) * D + d);
  }
}

// Dimensions [first, last) of the means. The sums of the first part become those of all rows, against the centre.
template <class T>
static void pairwise_kl_mean(const PairwiseKlMean<T>& p, int64_t first, int64_t last) {
  const int64_t D = p.batch.D, size = kMomentSums * D;
  for (int s = 0; s < kMomentSums; ++s)
    for (int64_t part = 1; part * p.rows < p.batch.N; ++part)
      for (int64_t k = s * D + first; k < s * D + last; ++k) p.sums[k] += p.sums[part * size + k];
  for (int64_t d = first; d < last; ++d) {
    const auto sum = [&](MomentSum s) -> double& { return p.sums[s * D + d]; };
    const double N = p.batch.N, middle = p.moments[centre * D + d];
    const double shift = (p.moments[centre * D + d] = T(middle + sum(of_m) / N)) - middle;
    sum(of_m2w) -= shift * (2 * sum(of_mw) - shift * sum(of_w)), sum(of_mw) -= shift * sum(of_w);
    sum(of_m2) -= shift * (2 * sum(of_m) - shift * N), sum(of_m) -= shift * N;
    pairwise_kl_mean_of(p, d, p.sums + d, D);
  }
}

// Gradients of rows [first, last): those of the means, and of the deviation as `unit` times its gradient.
template <class T>
static void pairwise_kl_mean_gradient(const PairwiseKlMean<T>& p, int64_t first, int64_t last) {
  const int64_t N = p.batch.N, D = p.batch.D;
  const T pairs = T(N) * T(N - 1), of_std = p.grad_std ? *p.grad_std : T(0);
  CentredRow<T> row;
  T grad[kMomentColumns];
  for (int64_t d = 0; d < D; d += kMomentColumns) {
    const int64_t count = std::min(kMomentColumns, D - d);
    const auto moment = [&](Moment m) { return p.moments + m * D + d; };
    for (int64_t k = 0; k < count; ++k) grad[k] = p.grad_mean[(d + k) * p.grad_mean_stride] / pairs;
    for (int64_t n = first; n < last; ++n) {
      row.read(p.batch, n, d, count, moment(centre));
      T *const dmu = p.dmu + n * D + d, *const dlog_var = p.dlog_var + n * D + d;
      for (int64_t k = 0; k < count; ++k) {
        const T m = row.mu[k], w = row.inverse[k], nm = T(N) * m, s = moment(sum_m)[k];
        dmu[k] = grad[k] * ((m * moment(sum_w)[k] - moment(sum_mw)[k]) + (nm - s) * w);
        dlog_var[k] = grad[k] * T(0.5) * (row.var[k] * moment(sum_w)[k] - w * (moment(sum_v_m2)[k] + m * (nm - s - s)));
      }
      if (!p.grad_std) continue;
      const T *const unit_mu = p.unit + n * D + d, *const unit_log_var = unit_mu + N * D;
      for (int64_t k = 0; k < count; ++k) dmu[k] += of_std * unit_mu[k], dlog_var[k] += of_std * unit_log_var[k];
    }
  }
}
