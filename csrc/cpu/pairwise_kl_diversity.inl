// Σ softplus(−KL_d) over ordered pairs, and its gradients; see pairwise_kl.inl for the sums over pairs. With e = exp(−KL_d)
// the value is the logarithm of Π (1 + e), gathered as q ← q + e + q e, and the weight of the gradient is e / (1 + e).
// A pair and dimension costs 9 multiplications and FMAs forward and 7 additions, with gradients 13, 11 and a division.

template <class T>
struct PairExp;

template <>
struct PairExp<float> {
  // (2^r − 1) / r on |r| ≤ ½: minimax in the relative error of 2^r, 9.1e-8.
  static constexpr float poly[] = {0.693146977591495f, 0.24022242080363407f, 0.05550733754247134f, 0.009671512869550286f,
                                   0.0013264723893100735f};
  static constexpr float min = -126;
  static constexpr int64_t factors = 120;  // 1 + e up to 2, whose product is still finite: two tiles of kPairRows
};

template <>
struct PairExp<double> {
  // Chebyshev interpolant of the same function, 2e-17.
  static constexpr double poly[] = {0.6931471805599453, 0.24022650695910097, 0.0555041086648216, 0.009618129107606888,
                                    0.0013333558146416936, 0.0001540353044173605, 1.525273382983612e-05,
                                    1.321544258792169e-06, 1.0178062445845774e-07, 7.072585949269223e-09,
                                    4.4549605981865186e-10};
  static constexpr double min = -1022;
  static constexpr int64_t factors = 1000;
};

// 2^x for x below 100; 0 below the smallest normal result; NaN stays NaN. The argument is exact to its own rounding, so
// unlike exp it needs no reduction in two parts: 2/3 of the time.
template <class T, int n>
static inline __attribute__((always_inline)) void exp2_below(Vec<T> (&x)[n]) {
  using S = Simd<T>;
  constexpr auto& poly = PairExp<T>::poly;
  constexpr int last = sizeof(poly) / sizeof(T) - 1;
  Vec<T> shifted[n], whole[n], r[n], y[n];
  together<n>([&](int t) { shifted[t] = x[t] + S::biased_round; });
  together<n>([&](int t) { whole[t] = shifted[t] - S::biased_round; });
  together<n>([&](int t) { r[t] = x[t] - whole[t]; });
  together<n>([&](int t) { y[t] = r[t] * poly[last] + poly[last - 1]; });
#pragma GCC unroll 16
  for (int k = last - 2; k >= 0; --k) together<n>([&](int t) { y[t] = y[t] * r[t] + poly[k]; });
  together<n>([&](int t) { y[t] = y[t] * r[t] + T(1); });
  together<n>([&](int t) { y[t] = scale<T>(y[t], whole[t], shifted[t]); });
  together<n>([&](int t) { x[t] = x[t] < PairExp<T>::min ? Vec<T>{} : y[t]; });
}

// The second posteriors j, ….
template <class Layout, class T, bool need_gradients>
struct SoftplusTile {
  static constexpr bool gradients = need_gradients;
  static constexpr int step = pair_step(gradients);
  const T* halves;
  int64_t j;
  Vec<T> factors[step], offsets[step], q[step];

  template <bool on_diagonal>
  inline __attribute__((always_inline)) void weights(int64_t i, const Vec<T> (&p)[step], Vec<T> (&g)[step]) {
    const Vec<T> half = load(halves + i);
    Vec<T> e[step];
    together<step>([&](int t) { e[t] = p[t] * factors[t] + (half + offsets[t]); });
    exp2_below<T>(e);
    if (on_diagonal) together<step>([&](int t) { e[t] = Layout::without(e[t], i, j + t); });
    together<step>([&](int t) { q[t] = q[t] * e[t] + (q[t] + e[t]); });
    together<step>([&](int t) { g[t] = e[t] / (e[t] + T(1)); });
  }
};

// c.halves are ½ log₂ σ² less a constant.
template <class Layout, class T, bool need_gradients>
class SoftplusWeights {
 public:
  static constexpr bool gradients = need_gradients;
  using Tile = SoftplusTile<Layout, T, gradients>;

  SoftplusWeights(const Layout& c, int64_t N) : c_(c), N_(N) {}

  Tile begin(int64_t j, int r) const {
    constexpr T log2_e = T(1.4426950408889634);
    const int64_t lane = r * kLanes<T>;
    Tile tile;
    tile.halves = c_.halves, tile.j = j;
    together<Tile::step>([&](int t) {
      tile.factors[t] = T(-0.5) * log2_e * c_.second(c_.inverse, j + t, lane);
      tile.offsets[t] = j + t < N_ ? T(0.5) * log2_e - c_.second(c_.halves, j + t, lane) : broadcast(T(-1e30));
      tile.q[t] = products_[j % kPairTile + t][r];
    });
    return tile;
  }

  void end(const Tile& tile, int r) {
    together<Tile::step>([&](int t) { products_[tile.j % kPairTile + t][r] = tile.q[t]; });
  }

  // After a tile with `rows` values of first posteriors, of which no later one has more.
  void done(int64_t rows) {
    count_ += rows / kGroup<T>;
    if (count_ + rows / kGroup<T> > PairExp<T>::factors) flush();
  }

  // Of the first n lanes of a group.
  double sum(int64_t n) {
    flush();
    T lanes[kGroup<T>];
    for (int r = 0; r < kRegisters; ++r) store(lanes + r * kLanes<T>, sums_[r]);
    double total = 0;
    for (int64_t lane = 0; lane < n; ++lane) total += lanes[lane];
    return total;
  }

 private:
  static constexpr int kRegisters = 64 / LATENT_VECTOR_BYTES;

  // Compensated sums: N / 60 terms a lane would cost digits otherwise.
  void flush() {
    for (int t = 0; t < kPairTile; ++t)
      for (int r = 0; r < kRegisters; ++r) {
        const Vec<T> term = log1p<T>(products_[t][r]) - errors_[r], sum = sums_[r] + term;
        errors_[r] = (sum - sums_[r]) - term;
        sums_[r] = sum;
        products_[t][r] = Vec<T>{};
      }
    count_ = 0;
  }

  const Layout& c_;
  int64_t N_, count_ = 0;
  Vec<T> products_[kPairTile][kRegisters] = {}, sums_[kRegisters] = {}, errors_[kRegisters] = {};
};

template <class T, bool gradients>
static double pair_diversity(const PairwiseKlDiversity<T>& p, int64_t task) {
  const int64_t split = task % p.tasks.splits, d = task / p.tasks.splits, D = p.batch.D, stride = p.columns.stride;
  const int64_t first = split * p.tasks.columns, last = std::min(stride, first + p.tasks.columns);
  Arena<T> arena(Scratch::task, pair_task_size(stride, gradients));
  const PairColumn<T> c(p.columns, d);
  SoftplusWeights<PairColumn<T>, T, gradients> weights(c, p.batch.N);
  T* const memory = arena.take(pair_task_size(stride, gradients));
  T *dmu = nullptr, *dlog_var = nullptr;
  if (gradients) dmu = p.tasks.gradients + (2 * split * D + d) * stride, dlog_var = dmu + D * stride;
  pair_task(c, stride, first, last, p.tasks.scale, weights, memory, dmu, dlog_var);
  return weights.sum(kGroup<T>);
}

template <class T>
static void pairwise_kl_diversity(const PairwiseKlDiversity<T>& p, int64_t task) {
  p.sums[task] = p.gradients ? pair_diversity<T, true>(p, task) : pair_diversity<T, false>(p, task);
}

// log σ² of columns [first, last) becomes ½ log₂ σ² less its mean, which KL is free of; −1e30 in the padding makes e = 0.
template <class T>
static void pairwise_kl_halves(const Posteriors<T>& p, const PairColumns<T>& c, int64_t first, int64_t last) {
  for (int64_t d = first; d < last; ++d) {
    T* const column = c.log_var + d * c.stride;
    const T mean = sum_groups<T>(c.stride, [&](int64_t i) { return load(column + i); }) / T(p.N);
    for (int64_t i = 0; i < c.stride; ++i) column[i] = i < p.N ? (column[i] - mean) * T(0.5 * 1.4426950408889634) : T(-1e30);
  }
}
