// Eq. 8 with a cache line of dimensions across lanes: a second posterior needs no sum over lanes, the batch no transposition,
// and few posteriors leave no lane empty. A task packs its line of all posteriors itself.

// [posteriors][kGroup]: the values of a posterior are those of one line of dimensions.
template <class T>
struct PairLines {
  static constexpr int64_t kDiagonal = kPairTile * kGroup<T>;
  T *mu, *var, *inverse, *halves;

  static int64_t stride(int64_t N) { return round_up(N, kPairTile) * kGroup<T>; }
  static Vec<T> second(const T* values, int64_t j, int64_t lane) { return load(values + j * kGroup<T> + lane); }
  static int64_t diagonal(int64_t j) { return j * kGroup<T>; }
  static Vec<T> without(Vec<T> e, int64_t i, int64_t j) { return i / kGroup<T> == j ? Vec<T>{} : e; }

  static void add(const Vec<T> (&parts)[kPairTile][64 / LATENT_VECTOR_BYTES], T* sums, int64_t j) {
    for (int t = 0; t < kPairTile; ++t)
      for (int r = 0; r < 64 / LATENT_VECTOR_BYTES; ++r) {
        T* const at = sums + (j + t) * kGroup<T> + r * kLanes<T>;
        store(at, load(at) + parts[t][r]);
      }
  }

  // The dimensions from d on. Those past D have equal posteriors, posteriors past N weigh nothing.
  void pack(const Posteriors<T>& p, int64_t d) const {
    for (int64_t lane = 0; lane < kGroup<T>; lane += kLanes<T>) {
      const int64_t left = std::max<int64_t>(p.D - d - lane, 0);
      const T *x = p.mu + (d + lane) * p.mu_strides[1], *y = p.log_var + (d + lane) * p.log_var_strides[1];
      Vec<T> sum = {};
      for (int64_t at = lane; at < p.N * kGroup<T>; at += kGroup<T>, x += p.mu_strides[0], y += p.log_var_strides[0]) {
        const Vec<T> log_var = load_strided(y, p.log_var_strides[1], left);
        Vec<T> w;
        store(mu + at, load_strided(x, p.mu_strides[1], left));
        store(var + at, exp<T>(log_var, w));
        store(inverse + at, w);
        store(halves + at, log_var);
        sum += log_var;
      }
      const Vec<T> mean = sum / T(p.N);
      for (int64_t at = lane; at < p.N * kGroup<T>; at += kGroup<T>)
        store(halves + at, (load(halves + at) - mean) * T(0.5 * 1.4426950408889634));
    }
    for (int64_t at = p.N * kGroup<T>; at < stride(p.N); ++at) mu[at] = mu[at - kGroup<T>];
    std::fill(var + p.N * kGroup<T>, var + stride(p.N), T(0));
    std::fill(inverse + p.N * kGroup<T>, inverse + stride(p.N), T(1));
    std::fill(halves + p.N * kGroup<T>, halves + stride(p.N), T(-1e30));
  }
};

// Values of [posteriors][kGroup] to the dimensions from d on of the posteriors [first, last) in out[N][D]; `value` gives them.
template <class T, class F>
static void pair_unpack(const Posteriors<T>& p, int64_t d, int64_t first, int64_t last, T* out, const F& value) {
  for (int64_t i = first; i < last; ++i)
    for (int64_t lane = 0; lane < std::min(kGroup<T>, p.D - d); lane += kLanes<T>)
      store_lanes(out + i * p.D + d + lane, p.D - d - lane, value(i * kGroup<T> + lane));
}

template <class T, bool gradients>
static double pair_lines_diversity(const PairwiseKlDiversity<T>& p, int64_t task) {
  const int64_t N = p.batch.N, D = p.batch.D, stride = PairLines<T>::stride(N), splits = p.tasks.splits;
  const int64_t split = task % splits, line = task / splits, d = line * kGroup<T>, lines = (D + kGroup<T> - 1) / kGroup<T>;
  const int64_t first = split * p.tasks.columns, last = std::min(round_up(N, kPairTile), first + p.tasks.columns);
  const int64_t size = pair_task_size(stride, gradients), own = gradients && splits == 1 ? stride : 0;
  Arena<T> arena(Scratch::task, stride, stride, stride, stride, size, own, own);
  const PairLines<T> c{arena.take(stride), arena.take(stride), arena.take(stride), arena.take(stride)};
  c.pack(p.batch, d);
  SoftplusWeights<PairLines<T>, T, gradients> weights(c, N);
  T* const memory = arena.take(size);
  T *dmu = arena.take(own), *dlog_var = arena.take(own);
  if (gradients && !own) dmu = p.tasks.gradients + (2 * split * lines + line) * stride, dlog_var = dmu + lines * stride;
  pair_task(c, stride, first, last, p.tasks.scale, weights, memory, dmu, dlog_var);
  if (own) {
    pair_unpack(p.batch, d, 0, N, p.gradients, [&](int64_t at) { return load(dmu + at); });
    pair_unpack(p.batch, d, 0, N, p.gradients + N * D, [&](int64_t at) { return load(dlog_var + at); });
  }
  return weights.sum(std::min(kGroup<T>, D - d));
}

template <class T>
static void pairwise_kl_lines_diversity(const PairwiseKlDiversity<T>& p, int64_t task) {
  p.sums[task] = p.gradients ? pair_lines_diversity<T, true>(p, task) : pair_lines_diversity<T, false>(p, task);
}

// Rows [first, last) of both gradients: the splits added up in order.
template <class T>
static void pair_lines_collect(const PairwiseKlDiversity<T>& p, int64_t first, int64_t last) {
  const int64_t N = p.batch.N, D = p.batch.D, stride = PairLines<T>::stride(N), lines = (D + kGroup<T> - 1) / kGroup<T>;
  for (int part = 0; part < 2; ++part)
    for (int64_t line = 0; line < lines; ++line) {
      const T* const sums = p.tasks.gradients + (part * lines + line) * stride;
      pair_unpack(p.batch, line * kGroup<T>, first, last, p.gradients + part * N * D, [&](int64_t at) {
        Vec<T> sum = load(sums + at);
        for (int64_t split = 1; split < p.tasks.splits; ++split) sum += load(sums + 2 * split * lines * stride + at);
        return sum;
      });
    }
}
