// See row_update.h. A row is one task's alone, and its elements go through vectors, the last of them padded, so that the bits
// depend neither on threads nor on where a row ends. Rows lie anywhere in memory: the next ones are fetched ahead.

constexpr int64_t kRowsAhead = 4;
constexpr int64_t kFetchBytes = 512;  // of a row; the hardware follows a longer one itself

template <class T>
static inline void fetch_ahead(const T* row, int64_t D) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < D && i < kFetchBytes / int64_t(sizeof(T)); i += line) __builtin_prefetch(row + i, 1);
}

// Sum of the gradients of a segment, elements i and on.
template <class T>
static inline Vec<T> segment_gradient(const RowBatch<T>& b, int64_t segment, int64_t i) {
  if (!b.starts) return load_lanes(b.grad + segment * b.grad_stride + i, b.D - i);
  Vec<T> sum = load_lanes(b.grad + b.order[b.starts[segment]] * b.grad_stride + i, b.D - i);
  for (int64_t j = b.starts[segment] + 1; j < b.starts[segment + 1]; ++j)
    sum += load_lanes(b.grad + b.order[j] * b.grad_stride + i, b.D - i);
  return sum;
}

template <class T>
static void row_sgd(const RowSgd<T>& p, int64_t first, int64_t last) {
  const RowBatch<T>& b = p.batch;
  for (int64_t s = first; s < last; ++s) {
    if (s + kRowsAhead < last) {
      fetch_ahead(p.table[b.row(s + kRowsAhead)], b.D);
      if (p.velocity.data) fetch_ahead(p.velocity[b.row(s + kRowsAhead)], b.D);
    }
    T *const z = p.table[b.row(s)], *const v = p.velocity.data ? p.velocity[b.row(s)] : nullptr;
    for (int64_t i = 0; i < b.D; i += kLanes<T>) {
      const Vec<T> point = load_lanes(z + i, b.D - i), g = segment_gradient(b, s, i) + point * p.coupled;
      Vec<T> move = g * -p.lr;
      if (v) {
        move += load_lanes(v + i, b.D - i) * p.momentum;
        store_lanes(v + i, b.D - i, move);
      }
      store_lanes(z + i, b.D - i, point * p.kept + move);
    }
  }
}

// β1^n and β2^n.
struct BetaPowers {
  double mean, square;

  BetaPowers(double log_beta1, double log_beta2, int64_t n) {
    Vec<double> x{};
    x[0] = log_beta1 * n, x[1] = log_beta2 * n;
    x = exp<double>(x);
    mean = x[0], square = x[1];
  }
};

template <class T>
static void row_adam(const RowAdam<T>& p, int64_t first, int64_t last) {
  const RowBatch<T>& b = p.batch;
  const RowMoments<T>& state = p.state;
  int64_t known = 0;  // the step count that `rate` and `root` are of: rows of a batch often share it
  T rate = 0, root = 0;
  const T fresh1 = T(1 - p.beta1), fresh2 = T(1 - p.beta2), beta1 = T(p.beta1), beta2 = T(p.beta2);
  for (int64_t s = first; s < last; ++s) {
    if (s + kRowsAhead < last)
      for (const RowArray<T>& array : {state.table, state.mean, state.square}) fetch_ahead(array[b.row(s + kRowsAhead)], b.D);
    const int64_t row = b.row(s), step = ++state.step[row];
    if (step != known) {
      const BetaPowers power(p.log_beta1, p.log_beta2, step);
      known = step, rate = T(p.lr / (1 - power.mean)), root = T(1 / std::sqrt(1 - power.square));
    }
    T *const z = state.table[row], *const mean = state.mean[row], *const square = state.square[row];
    for (int64_t i = 0; i < b.D; i += kLanes<T>) {
      const int64_t n = b.D - i;
      const Vec<T> point = load_lanes(z + i, n), g = segment_gradient(b, s, i) + point * p.coupled;
      const Vec<T> m = load_lanes(mean + i, n) * beta1 + g * fresh1;
      const Vec<T> v = load_lanes(square + i, n) * beta2 + g * g * fresh2;
      store_lanes(mean + i, n, m);
      store_lanes(square + i, n, v);
      store_lanes(z + i, n, point * p.kept - m * rate / (square_root<T>(v) * root + p.eps));
    }
  }
}

// What the rows that were last at one step have in common: move j of `count` is m · weights[j] / (√v · scales[j] + ε), and
// `kept`, `mean`² and `square`² are left of z, m and v: roots, which are normal numbers where the powers no longer are.
template <class T>
struct RestedRows {
  int64_t step = -1, count = 0;
  T kept = 0, mean = 0, square = 0;
  T *weights, *scales;

  void prepare(const RowCatchUp<T>& p, int64_t since) {
    const int64_t skipped = p.now - since, at = since + 1 - p.first;
    const double decay = p.log_decays[p.now - p.first];
    step = since, count = std::min(skipped, p.terms);
    for (int64_t j = 0; j < count; ++j) {
      weights[j] = T(p.rates[at + j] * p.mean_powers[j]);
      scales[j] = T(p.roots[at + j] * p.root_powers[j]);
    }
    if (decay != 0)
      for (int64_t j = 0; j < count; ++j) weights[j] *= T(std::exp(decay - p.log_decays[at + j]));
    kept = T(std::exp(decay - (at > 0 ? p.log_decays[at - 1] : 0)));
    mean = T(std::pow(p.beta1, 0.5 * skipped)), square = T(std::pow(p.beta2, 0.5 * skipped));
  }
};

template <class T>
static void row_catch_up(const RowCatchUp<T>& p, int64_t first, int64_t last) {
  const RowBatch<T>& b = p.batch;
  const RowMoments<T>& state = p.state;
  Arena<T> arena(Scratch::task, p.terms, p.terms);
  RestedRows<T> rested;
  rested.weights = arena.take(p.terms), rested.scales = arena.take(p.terms);
  for (int64_t s = first; s < last; ++s) {
    const int64_t row = b.row(s), step = state.step[row];
    if (step >= p.now) continue;
    if (step != rested.step) rested.prepare(p, step);
    state.step[row] = static_cast<int32_t>(p.now);
    T *const z = state.table[row], *const mean = state.mean[row], *const square = state.square[row];
    const int64_t count = std::any_of(mean, mean + b.D, [](T m) { return m != 0; }) ? rested.count : 0;
    for (int64_t i = 0; i < b.D; i += kLanes<T>) {
      const int64_t n = b.D - i;
      const Vec<T> m = load_lanes(mean + i, n), v = load_lanes(square + i, n), root = square_root<T>(v);
      Vec<T> sum{};
      for (int64_t j = 0; j < count; ++j) sum += rested.weights[j] / (root * rested.scales[j] + p.eps);
      store_lanes(z + i, n, load_lanes(z + i, n) * rested.kept - m * sum);
      store_lanes(mean + i, n, m * rested.mean * rested.mean);
      store_lanes(square + i, n, v * rested.square * rested.square);
    }
  }
}

template <class T>
static constexpr RowUpdateKernels<T> row_update_kernels() {
  return {row_sgd<T>, row_adam<T>, row_catch_up<T>};
}
