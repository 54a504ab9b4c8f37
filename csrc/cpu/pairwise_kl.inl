// See pairwise_kl.h. One dimension at a time, so that its rows stay in the L1 cache: first posteriors i lie across lanes, a
// tile of four second posteriors j is broadcast. A pair of one dimension needs δ = μ_i − μ_j and p = σ²_i + δ². For weights
// g_ij of KL_d(i‖j) the gradients come from sums over j for each i, and over i for each j:
//
//     ∂μ_i = Σ_j g_ij δ_ij w_j − w_i Σ_k g_ki δ_ki                                    w = 1 / σ²
//     ∂log σ²_i = ½ [σ²_i Σ_j g_ij w_j − Σ_j g_ij + Σ_k g_ki − w_i Σ_k g_ki p_ki]

constexpr int64_t kPairTile = 4;
constexpr int64_t kPairRows = 1024;    // first posteriors a block: their values and sums take 24 KB
constexpr int64_t kPairColumns = 256;  // second posteriors whose sums are added up before they join the total
constexpr int kPairSums = 3;           // for each posterior, in each of its roles

// Σ f(i) over vectors of [0, n), a multiple of kGroup, in an order that no instruction-set level changes.
template <class T, class F>
static inline T sum_groups(int64_t n, const F& f) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[registers] = {};
  for (int64_t i = 0; i < n; i += kGroup<T>)
    for (int r = 0; r < registers; ++r) sums[r] += f(i + r * kLanes<T>);
  return sum_lanes<T>(sums);
}

// Lanes of T as double.
template <class T>
static inline Vec<double> load_wide(const T* p) {
  typedef T Part __attribute__((vector_size(kLanes<double> * sizeof(T)), aligned(sizeof(T)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Part*>(p), Vec<double>);
}

// f(number of vectors, first of them) over n vectors, `most` at a time.
template <int most, class F>
static inline void in_tiles(int64_t n, const F& f, int64_t first = 0) {
  for (; first + most <= n; first += most) f(std::integral_constant<int, most>{}, first);
  if constexpr (most > 1) in_tiles<most - 1>(n, f, first);
}

template <class T>
static void pair_columns(const Posteriors<T>& p, const PairColumns<T>& c, int64_t first, int64_t last) {
  transpose(p.mu + first * p.mu_strides[1], p.mu_strides[0], p.mu_strides[1], c.mu + first * c.stride, c.stride, p.N,
            last - first);
  transpose(p.log_var + first * p.log_var_strides[1], p.log_var_strides[0], p.log_var_strides[1],
            c.log_var + first * c.stride, c.stride, p.N, last - first);
  for (int64_t d = first; d < last; ++d) {
    T *mu = c.mu + d * c.stride, *log_var = c.log_var + d * c.stride;
    T *var = c.var + d * c.stride, *inverse = c.inverse + d * c.stride;
    std::fill(mu + p.N, mu + c.stride, T(0));
    std::fill(log_var + p.N, log_var + c.stride, T(0));
    for (int64_t i = 0; i < c.stride; i += kLanes<T>) {
      const Vec<T> x = load(log_var + i);
      store(var + i, exp<T>(x));
      store(inverse + i, exp<T>(-x));
    }
    std::fill(var + p.N, var + c.stride, T(0));
    std::fill(inverse + p.N, inverse + c.stride, T(0));
  }
}

// first, first + 1, …
template <class T>
static inline Vec<T> lane_numbers(int64_t first) {
  Vec<T> numbers;
  for (int i = 0; i < kLanes<T>; ++i) numbers[i] = T(i);
  return numbers + T(first);
}

// One dimension of the batch.
template <class T>
struct PairColumn {
  const T *mu, *var, *inverse;

  PairColumn(const PairColumns<T>& c, int64_t d)
      : mu(c.mu + d * c.stride), var(c.var + d * c.stride), inverse(c.inverse + d * c.stride) {}
};

// The tile of second posteriors j, …, j + 3 against first posteriors first, first + kGroup, … below last, with the weights that
// `tile` gives. Sums of the first posteriors join rows[kPairSums][kPairRows], those of the second ones `sums`.
template <class T, bool on_diagonal, class Tile>
static inline __attribute__((always_inline)) void pair_steps(const PairColumn<T>& c, Tile& tile, int64_t j, int64_t first,
                                                             int64_t last, T* rows, Vec<T> (&sums)[kPairSums][kPairTile]) {
  for (int64_t i = first; i < last; i += kGroup<T>, rows += kGroup<T>) {
    const Vec<T> mu = load(c.mu + i), var = load(c.var + i);
    Vec<T> g_sum = {}, gw_sum = {}, gwd_sum = {};
    if (Tile::gradients)
      g_sum = load(rows), gw_sum = load(rows + kPairRows), gwd_sum = load(rows + 2 * kPairRows);
#pragma GCC unroll 4
    for (int t = 0; t < kPairTile; ++t) {
      const Vec<T> delta = mu - broadcast(c.mu[j + t]), p = delta * delta + var;
      const Vec<T> g = tile.template weight<on_diagonal>(t, i, p);
      if (!Tile::gradients) continue;
      const Vec<T> gw = g * broadcast(c.inverse[j + t]);
      g_sum += g, gw_sum += gw, gwd_sum += gw * delta;
      sums[0][t] += g, sums[1][t] += g * delta, sums[2][t] += g * p;
    }
    if (Tile::gradients)
      store(rows, g_sum), store(rows + kPairRows, gw_sum), store(rows + 2 * kPairRows, gwd_sum);
  }
}

// a and b hold blocks of lanes: the lower half of every block plus its upper half.
template <class T, int block, int... i>
static inline Vec<T> add_halves(Vec<T> a, Vec<T> b, std::integer_sequence<int, i...>) {
  constexpr int half = block / 2;
  return __builtin_shufflevector(a, b, (i / half * block + i % half)...) +
         __builtin_shufflevector(a, b, (i / half * block + half + i % half)...);
}

// out[t] += the sum of the lanes of parts[t], for all four at once: as sum_lanes adds them, in 15 operations instead of 36.
template <class T>
static inline void add_lane_sums(const Vec<T> (&parts)[kPairTile][64 / LATENT_VECTOR_BYTES], T* out) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES, lanes = kLanes<T>;
  constexpr std::make_integer_sequence<int, lanes> all{};
  Vec<T> v[kPairTile];
  for (int t = 0; t < kPairTile; ++t) {
    Vec<T> folded[registers];
    for (int r = 0; r < registers; ++r) folded[r] = parts[t][r];
#pragma GCC unroll 4
    for (int half = registers / 2; half; half /= 2)
      for (int r = 0; r < half; ++r) folded[r] += folded[r + half];
    v[t] = folded[0];
  }
  T sums[2 * lanes];
  const Vec<T> first = add_halves<T, lanes>(v[0], v[1], all), second = add_halves<T, lanes>(v[2], v[3], all);
  if constexpr (lanes == 2) {
    store(sums, first), store(sums + 2, second);
  } else {
    Vec<T> sum = add_halves<T, lanes / 2>(first, second, all);
    if constexpr (lanes >= 8) sum = add_halves<T, lanes / 4>(sum, sum, all);
    if constexpr (lanes >= 16) sum = add_halves<T, lanes / 8>(sum, sum, all);
    store(sums, sum);
  }
  for (int t = 0; t < kPairTile; ++t) out[t] += sums[t];
}

// All pairs of the first posteriors [i0, i1) and the second ones [j0, j1), whole groups both.
template <class T, class Weights>
static void pair_block(const PairColumn<T>& c, Weights& weights, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* rows,
                       T* columns, int64_t stride) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  for (int64_t j = j0; j < j1; j += kPairTile) {
    const int64_t diagonal = std::clamp(j / kGroup<T> * kGroup<T>, i0, i1);
    const int64_t after = j < i0 ? i0 : std::min(i1, diagonal + kGroup<T>);
    Vec<T> parts[kPairSums][kPairTile][registers];
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      const int64_t at = r * kLanes<T>;
      Vec<T> sums[kPairSums][kPairTile] = {};
      auto tile = weights.begin(j, r);
      pair_steps<T, false>(c, tile, j, i0 + at, diagonal, rows + at, sums);
      pair_steps<T, true>(c, tile, j, diagonal + at, after, rows + diagonal - i0 + at, sums);
      pair_steps<T, false>(c, tile, j, after + at, i1, rows + after - i0 + at, sums);
      weights.end(tile, r);
      for (int s = 0; s < kPairSums; ++s)
        for (int t = 0; t < kPairTile; ++t) parts[s][t][r] = sums[s][t];
    }
    if (Weights::gradients)
      for (int s = 0; s < kPairSums; ++s)
        add_lane_sums<T>(parts[s], columns + s * stride + j);
    weights.done(i1 - i0);
  }
}

// The pairs of one task: the gradients of its dimension in tasks.gradients, all the rest in `weights`.
template <class T, class Weights>
static void pair_task(const PairColumns<T>& columns, const PairTasks<T>& tasks, Weights& weights, int64_t D, int64_t task) {
  const int64_t split = task % tasks.splits, d = task / tasks.splits, stride = columns.stride;
  const int64_t first = split * tasks.columns, last = std::min(stride, first + tasks.columns);
  const int64_t sums = Weights::gradients ? kPairSums * stride : 0;
  Arena<T> arena(Scratch::task, sums, sums, kPairSums * kPairRows);
  T *const first_role = arena.take(sums), *const second_role = arena.take(sums);
  T* const rows = arena.take(kPairSums * kPairRows);
  std::fill_n(first_role, sums, T(0));
  std::fill_n(second_role, sums, T(0));
  const PairColumn<T> c(columns, d);
  for (int64_t i0 = 0; i0 < stride; i0 += kPairRows) {
    const int64_t i1 = std::min(stride, i0 + kPairRows);
    for (int64_t j0 = first; j0 < last; j0 += kPairColumns) {
      for (int s = 0; s < (Weights::gradients ? kPairSums : 0); ++s) std::fill_n(rows + s * kPairRows, i1 - i0, T(0));
      pair_block(c, weights, i0, i1, j0, std::min(last, j0 + kPairColumns), rows, second_role, stride);
      if (!Weights::gradients) continue;
      for (int s = 0; s < kPairSums; ++s)
        for (int64_t i = i0; i < i1; ++i) first_role[s * stride + i] += rows[s * kPairRows + i - i0];
    }
  }
  if (!Weights::gradients) return;
  const T *a = first_role, *b = second_role;
  T* const dmu = tasks.gradients + ((split * 2) * D + d) * stride;
  T* const dlog_var = dmu + D * stride;
  for (int64_t i = 0; i < stride; ++i) {
    const T w = c.inverse[i];
    dmu[i] = tasks.scale * (a[2 * stride + i] - w * b[stride + i]);
    dlog_var[i] = tasks.scale * T(0.5) * ((c.var[i] * a[stride + i] - a[i]) + (b[i] - w * b[2 * stride + i]));
  }
}

// Rows [first, last) of both gradients[2][N][D]: the splits added up in order, and transposed.
template <class T>
static void pair_collect(const Posteriors<T>& p, const PairColumns<T>& c, const PairTasks<T>& tasks, T* gradients,
                         int64_t first, int64_t last) {
  const int64_t size = p.D * c.stride;
  for (int part = 0; part < 2; ++part) {
    T* const sums = tasks.gradients + part * size;
    for (int64_t split = 1; split < tasks.splits; ++split)
      for (int64_t d = 0; d < p.D; ++d)
        for (int64_t i = d * c.stride + first; i < d * c.stride + last; ++i) sums[i] += sums[2 * split * size + i];
    transpose(sums + first, c.stride, 1, gradients + part * p.N * p.D + first * p.D, p.D, p.D, last - first);
  }
}

// The first n lanes of values that are `stride` apart, zero in the others.
template <class T>
static inline Vec<T> load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_lanes(p, n);
  T lanes[kLanes<T>] = {};
  for (int64_t k = 0; k < std::min<int64_t>(n, kLanes<T>); ++k) lanes[k] = p[k * stride];
  return load(lanes);
}

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
      store(log_var + k, x);
      store(var + k, exp<T>(x));
      store(inverse + k, exp<T>(-x));
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

// Dimensions [first, last) of the mean from columns, in whose padding nothing counts, and Σ log σ² over them by posterior.
// Log-determinants of close posteriors must not lose digits to a common level, that of the first one.
template <class T>
static void pair_means(const PairwiseKlMean<T>& p, const PairColumns<T>& c, double* levels, int64_t first, int64_t last) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES, lanes = kLanes<double>;
  for (int64_t i = 0; i < c.stride; i += lanes) {
    Vec<double> sum = {};
    for (const T* log_var = c.log_var + first * c.stride; log_var < c.log_var + last * c.stride; log_var += c.stride)
      sum += load_wide(log_var + i) - double(log_var[0]);
    store(levels + i, sum);
  }
  for (int64_t d = first; d < last; ++d) {
    T* const mu = c.mu + d * c.stride;
    const T *const var = c.var + d * c.stride, *const inverse = c.inverse + d * c.stride;
    const double total = sum_groups<double>(c.stride, [&](int64_t i) { return load_wide(mu + i); });
    const T middle = p.moments[centre * p.batch.D + d] = T(total / p.batch.N);
    std::fill(mu + p.batch.N, mu + c.stride, middle);
    Vec<double> parts[kMeanSums][registers] = {}, folded[kMeanSums];
    for (int64_t i = 0; i < c.stride; i += kGroup<double>)
#pragma GCC unroll 4
      for (int r = 0; r < registers; ++r) {
        const int64_t at = i + r * lanes;
        const Vec<double> m = load_wide(mu + at) - double(middle), v = load_wide(var + at), w = load_wide(inverse + at);
        const Vec<double> mw = m * w;
        parts[of_m][r] += m, parts[of_v][r] += v, parts[of_w][r] += w, parts[of_mw][r] += mw;
        parts[of_m2][r] += m * m, parts[of_m2w][r] += m * mw;
      }
    for (int k = 0; k < kMeanSums; ++k) folded[k] = fold_registers<double>(parts[k]);
    double sums[8];  // whole vectors
    sum_halves_of<double>(folded, sums);
    pairwise_kl_mean_of(p, d, sums, 1);
  }
}

// Half h of the lanes, as double.
template <class T, int h>
static inline Vec<double> widen(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    using Part = typename Sized<T, kLanes<double> * sizeof(T)>::Vec;
    const Part part = lanes_from<h * kLanes<double>, T>(x, std::make_integer_sequence<int, kLanes<double>>{});
    return __builtin_convertvector(part, Vec<double>);
  }
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
    middles[0] += widen<T, 0>(x);
    if constexpr (halves == 2) middles[1] += widen<T, 1>(x);
  }
  for (int k = 0; k < kLanes<T>; ++k) middle[k] = T(middles[k / kLanes<double>][k % kLanes<double>] / rows);
  const Vec<T> mu0 = load(middle), log_var0 = read(log_var, b.log_var_strides[1]);
  Vec<double> totals[kMomentSums][halves] = {};
  for (int64_t n = first; n < last; ++n) {
    const Vec<T> x = read(mu + n * b.mu_strides[0], b.mu_strides[1]);
    const Vec<T> y = read(log_var + n * b.log_var_strides[0], b.log_var_strides[1]), var = exp<T>(y), inverse = exp<T>(-y);
    const auto add = [&](auto half) {
      constexpr int h = half();
      const Vec<double> m = widen<T, h>(x) - widen<T, h>(mu0), v = widen<T, h>(var), w = widen<T, h>(inverse), mw = m * w;
      totals[of_m][h] += m, totals[of_v][h] += v, totals[of_w][h] += w, totals[of_mw][h] += mw;
      totals[of_m2][h] += m * m, totals[of_m2w][h] += m * mw;
      totals[of_level][h] += widen<T, h>(y) - widen<T, h>(log_var0);
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
