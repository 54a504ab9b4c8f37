// Reductions of log-weights along samples, for importance.inl: data points lie across lanes, narrow rows several at a time.

// Several whole rows of [rows, N] taken as one vector, so that narrow rows fill the lanes.
struct ImportancePeriod {
  int64_t N, rows, size;

  template <class T>
  static ImportancePeriod of(int64_t N, int64_t rows) {
    const int64_t taken = std::clamp<int64_t>(64 / std::max<int64_t>(N, 1), 1, rows);
    return {N, taken, round_up(taken * N, kGroup<T>)};
  }
  // Calls f(x, 0) for every period: whole groups, of which the last may read into the next row, at most one; so the last
  // period goes through `buffer`, padded with `fill`.
  template <class T, class F>
  void each(const T* x, int64_t all, T fill, T* buffer, const F& f) const {
    int64_t row = 0;
    for (; row + rows < all; row += rows) f(x + row * N, row);
    T* const end = std::copy_n(x + row * N, (all - row) * N, buffer);
    std::fill(end, buffer + size, fill);
    f(buffer, row);
  }
  // values[n] = fold over the lanes of column n, from `start`, and back to all of them.
  template <class T, class F>
  void fold(T* lanes, T start, T* values, const F& f) const {
    for (int64_t n = 0; n < N; ++n) {
      T value = start;
      for (int64_t i = n; i < rows * N; i += N) value = f(value, lanes[i]);
      values[n] = value;
    }
    spread(values, lanes);
  }
  template <class T>
  void spread(const T* values, T* lanes) const {
    for (int64_t i = 0; i < rows; ++i) std::copy_n(values, N, lanes + i * N);
    std::fill(lanes + rows * N, lanes + size, T(0));
  }
};

// The shift of the exponent: the largest, or 0 where that is infinite, unless only the largest count.
template <class T>
static inline Vec<T> importance_shift(Vec<T> top, T scale) {
  return scale == kInf<T> ? top : gmm_shift<T>(top);
}

// exp(scale · (x − shift)); 1 for the largest and 0 for all others where scale is infinite.
template <class T>
static inline Vec<T> importance_power(Vec<T> x, Vec<T> shift, T scale) {
  if (scale != kInf<T>) return exp<T>(scale * (x - shift));
  const Vec<T> other = x == x ? Vec<T>{} : x;
  return x == shift ? broadcast(T(1)) : other;
}

template <class T, class In>
static void importance_moments(const In* log_w, int64_t rows, int64_t N, ImportanceOrder<T> order, T* moments, int64_t stride) {
  const ImportancePeriod period = ImportancePeriod::of<T>(N, rows);
  const int64_t size = period.size;
  Arena<T> arena(Scratch::task, size, size, size, size);
  T *const top = arena.take(size), *const sum = arena.take(size), *const square = arena.take(size);
  In* const buffer = reinterpret_cast<In*>(arena.take(size));
  const In least = order.sign > T(0) ? -kInf<In> : kInf<In>;
  const auto add = [](T a, T b) { return a + b; };
  std::fill_n(moments, kImportanceMoments * stride, T(0));
  std::fill_n(sum, size, T(0));
  period.each(log_w, rows, In(0), buffer, [&](const In* x, int64_t) {
    for (int64_t i = 0; i < size; i += kLanes<T>) store(sum + i, load(sum + i) + load_as<T>(x + i));
  });
  period.fold(sum, T(0), moments + 3 * stride, add);
  std::fill_n(top, size, -kInf<T>);
  period.each(log_w, rows, least, buffer, [&](const In* x, int64_t) {
    for (int64_t i = 0; i < size; i += kLanes<T>) store(top + i, larger(order.sign * load_as<T>(x + i), load(top + i)));
  });
  period.fold(top, -kInf<T>, moments, [](T a, T b) { return std::max(a, b); });
  std::fill_n(sum, size, T(0));
  std::fill_n(square, size, T(0));
  period.each(log_w, rows, least, buffer, [&](const In* x, int64_t) {
    for (int64_t i = 0; i < size; i += kLanes<T>) {
      const Vec<T> shift = importance_shift<T>(load(top + i), order.scale);
      const Vec<T> e = importance_power<T>(order.sign * load_as<T>(x + i), shift, order.scale);
      store(sum + i, load(sum + i) + e);
      store(square + i, load(square + i) + e * e);
    }
  });
  period.fold(sum, T(0), moments + stride, add);
  period.fold(square, T(0), moments + 2 * stride, add);
}

template <class T>
static void importance_merge(T* moments, int64_t blocks, int64_t stride, T scale) {
  if (blocks == 1) return;
  for (int64_t i = 0; i < stride; i += kLanes<T>) {
    const auto at = [&](int64_t block, int64_t moment) { return moments + (block * kImportanceMoments + moment) * stride + i; };
    Vec<T> top = broadcast(-kInf<T>), sum = {}, square = {}, total = {};
    for (int64_t b = 0; b < blocks; ++b) top = larger(load(at(b, 0)), top);
    const Vec<T> shift = importance_shift<T>(top, scale);
    for (int64_t b = 0; b < blocks; ++b) {
      const Vec<T> factor = importance_power<T>(load(at(b, 0)), shift, scale);
      sum += load(at(b, 1)) * factor;
      square += load(at(b, 2)) * (factor * factor);
      total += load(at(b, 3));
    }
    store(at(0, 0), top), store(at(0, 1), sum), store(at(0, 2), square), store(at(0, 3), total);
  }
}

// Close to the Rényi bound · sign of a group. log(Σ e / size) next to 1 has lost what the division by a small scale shows; the
// mean is closer where all log-weights are.
template <class T>
static inline Vec<T> importance_centre(Vec<T> rough, Vec<T> top, Vec<T> mean, T scale) {
  constexpr T narrow = T(1) / 1024;
  return scale * (top - mean) < broadcast(narrow) ? mean : rough;
}

template <class T>
static void importance_bound(const ImportanceBound<T>& p) {
  const T inverse_size = T(p.groups) / T(p.S);
  for (int64_t i = 0; i < p.N; i += kLanes<T>) {
    Vec<T> renyi = {}, total = {};
    for (int64_t g = 0; g < p.groups; ++g) {
      const T* const moments = p.moments + g * p.blocks * kImportanceMoments * p.stride + i;
      const Vec<T> top = load(moments), sum = load(moments + p.stride);
      const Vec<T> group_total = load(moments + 3 * p.stride);
      total += group_total;
      if (p.order.scale == kInf<T>) {
        renyi += p.order.sign * top + (sum - sum);
        continue;
      }
      Vec<T> value = gmm_shift<T>(top) + log<T>(sum * inverse_size) / p.order.scale;
      if (p.centres) {
        value = importance_centre<T>(value, top, p.order.sign * group_total * inverse_size, p.order.scale);
        store(p.centres + g * p.stride + i, value);
      }
      renyi += p.order.sign * value;
    }
    T lanes[kLanes<T>];
    const Vec<T> mean = total / T(p.S), bound = renyi / T(p.groups);
    store(lanes, p.elbo_weight == T(0)   ? bound
                 : p.elbo_weight == T(1) ? mean
                                         : p.elbo_weight * mean + (T(1) - p.elbo_weight) * bound);
    std::copy_n(lanes, std::min<int64_t>(kLanes<T>, p.N - i), p.bound + i);
  }
}

template <class T>
static void importance_excess(const ImportanceBound<T>& p, const T* centre, const T* log_w, int64_t rows, T* moments) {
  const ImportancePeriod period = ImportancePeriod::of<T>(p.N, rows);
  const int64_t size = period.size;
  Arena<T> arena(Scratch::task, size, size, size);
  T *const shift = arena.take(size), *const sum = arena.take(size), *const buffer = arena.take(size);
  period.spread(centre, shift);
  std::fill_n(sum, size, T(0));
  period.each(log_w, rows, T(0), buffer, [&](const T* x, int64_t row) {
    if (x == buffer)  // the padding has no excess
      for (int64_t i = (rows - row) * p.N; i < size; ++i) buffer[i] = p.order.sign * shift[i];
    for (int64_t i = 0; i < size; i += kLanes<T>)
      store(sum + i, load(sum + i) + expm1<T>(p.order.scale * (p.order.sign * load(x + i) - load(shift + i))));
  });
  period.fold(sum, T(0), moments + 2 * p.stride, [](T a, T b) { return a + b; });
}

template <class T>
static void importance_correct(const ImportanceBound<T>& p) {
  const T inverse_size = T(p.groups) / T(p.S), factor = (T(1) - p.elbo_weight) / T(p.groups);
  for (int64_t i = 0; i < p.N; i += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t g = 0; g < p.groups; ++g) {
      Vec<T> excess = {};
      for (int64_t b = 0; b < p.blocks; ++b)
        excess += load(p.moments + ((g * p.blocks + b) * kImportanceMoments + 2) * p.stride + i);
      const Vec<T> centre = load(p.centres + g * p.stride + i), correction = log1p<T>(excess * inverse_size) / p.order.scale;
      sum += centre - centre == T(0) ? correction : Vec<T>{};
    }
    T lanes[kLanes<T>];
    store(lanes, p.order.sign * factor * sum);
    for (int64_t j = 0; j < std::min<int64_t>(kLanes<T>, p.N - i); ++j) p.bound[i + j] += lanes[j];
  }
}

template <class T>
static void importance_weights(const ImportanceBound<T>& p, const T* moments, const T* log_w, int64_t rows, T* weights) {
  const T elbo = p.elbo_weight / T(p.S);
  if (p.elbo_weight == T(1)) {
    std::fill_n(weights, rows * p.N, elbo);
    return;
  }
  const ImportancePeriod period = ImportancePeriod::of<T>(p.N, rows);
  const int64_t size = period.size;
  Arena<T> arena(Scratch::task, size, size, size, p.stride);
  T *const shift = arena.take(size), *const factor = arena.take(size), *const buffer = arena.take(size);
  T* const column = arena.take(p.stride);
  period.spread(moments, shift);
  for (int64_t n = 0; n < p.N; ++n) {
    const T sum = moments[p.stride + n];
    column[n] = sum == T(0) ? T(0) : (T(1) - p.elbo_weight) / (T(p.groups) * sum);
  }
  period.spread(column, factor);
  period.each(log_w, rows, T(0), buffer, [&](const T* x, int64_t row) {
    // in place where x is the buffer: past the rows of this task lie those of another
    T* const out = x == buffer ? buffer : weights + row * p.N;
    for (int64_t i = 0; i < size; i += kLanes<T>) {
      const Vec<T> top = importance_shift<T>(load(shift + i), p.order.scale);
      const Vec<T> e = importance_power<T>(p.order.sign * load(x + i), top, p.order.scale);
      store(out + i, e * load(factor + i) + elbo);
    }
    if (x == buffer) std::copy_n(buffer, (rows - row) * p.N, weights + row * p.N);
  });
}
