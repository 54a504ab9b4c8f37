// See importance.h. z is read once, in tiles of kImportanceRows samples of one data point, whose posterior is loaded once a
// tile. An element takes three multiplications and FMAs and a subtraction forward, up to four and three backward: less time than
// to read it from memory.

constexpr int kImportanceRows = 4;

// How far ahead of a tile z is fetched into the L2 cache: the next tile of the same data point, in four streams that the
// hardware does not follow over the ends of pages (at 4096 × 100 × 32 that takes a third of the time away). 0 where z lies in
// the cache.
template <class T>
static int64_t importance_ahead(int64_t S, int64_t row) {
  constexpr int64_t cache = (1 << 21) / sizeof(T), most = (1 << 18) / sizeof(T);
  return S * row > cache ? std::min(kImportanceRows * row, most) : 0;
}

// Data points ahead of which dz is fetched for writing, where it has left the L2 cache since it was last written or read.
constexpr int64_t kImportanceAhead = 4;

// Always inlined: GCC drops calls of a function that does nothing but fetch.
template <class T, int rows, bool write>
__attribute__((always_inline)) static inline void importance_prefetch(const T* z, int64_t stride, int64_t D, int64_t ahead) {
  if (ahead == 0) return;
  for (int i = 0; i < rows; ++i)
    for (int64_t d = 0; d < D; d += kGroup<T>) __builtin_prefetch(z + i * stride + d + ahead, write, write ? 3 : 2);
}

// A mask of the lanes of the last, broken group of dimensions.
template <class T>
struct ImportanceTail {
  typename Simd<T>::Int mask[kGroup<T>];
  int64_t count;

  explicit ImportanceTail(int64_t D) : count(D % kGroup<T>) {
    for (int64_t i = 0; i < kGroup<T>; ++i) mask[i] = i < count ? -1 : 0;
  }
  Vec<T> operator()(const T* group, int r) const {
    using IntVec = typename Simd<T>::IntVec;
    const Vec<T> bits = load(reinterpret_cast<const T*>(mask) + r * kLanes<T>);
    return (Vec<T>)((IntVec)load(group + r * kLanes<T>) & (IntVec)bits);
  }
};

// Calls f(d, z_d) for every group of dimensions of `rows` vectors, where z_d(i, r) loads register r of vector i. The last,
// broken group is read whole and masked, if that much memory is `readable`.
template <class T, int rows, class F>
static inline void importance_groups(const T* z, int64_t stride, int64_t D, const ImportanceTail<T>& tail, bool readable,
                                     const F& f) {
  int64_t d = 0;
  for (; d + kGroup<T> <= D; d += kGroup<T>) f(d, [&](int i, int r) { return load(z + i * stride + d + r * kLanes<T>); });
  if (d == D) return;
  if (readable) {
    f(d, [&](int i, int r) { return tail(z + i * stride + d, r); });
  } else {
    T copies[rows][kGroup<T>] = {};
    for (int i = 0; i < rows; ++i) std::copy_n(z + i * stride + d, tail.count, copies[i]);
    f(d, [&](int i, int r) { return load(copies[i] + r * kLanes<T>); });
  }
}

template <class T>
static inline void importance_gather(const T* in, int64_t stride, int64_t n, T* out) {
  if (stride == 1) {
    std::copy_n(in, n, out);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = in[i * stride];
  }
}

template <class T>
static void importance_pack(const ImportanceModel<T>& m, int64_t first, int64_t last) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  const T log_2pi = T(1.8378770664093453);
  for (int64_t n = first; n < last; ++n) {
    T *const mean = m.packed + n * 2 * m.padded, *const inverse = mean + m.padded;
    importance_gather(m.mu + n * m.mu_strides[0], m.mu_strides[1], m.D, mean);
    importance_gather(m.log_var + n * m.log_var_strides[0], m.log_var_strides[1], m.D, inverse);
    std::fill(mean + m.D, mean + m.padded, T(0));
    std::fill(inverse + m.D, inverse + m.padded, T(0));
    Vec<T> sums[registers] = {};
    for (int64_t d = 0; d < m.padded; d += kGroup<T>)
      for (int r = 0; r < registers; ++r) {
        T* const at = inverse + d + r * kLanes<T>;
        sums[r] += load(at);
        store(at, exp<T>(-load(at)));
      }
    std::fill(inverse + m.D, inverse + m.padded, T(0));
    m.constants[n] = T(0.5) * (sum_lanes<T>(sums) + (m.normal_prior ? T(0) : T(m.D) * log_2pi));
  }
}

// Σ_d δ²/σ², minus Σ_d z² with a standard-normal prior, for `rows` samples of one data point; whole vectors are written.
template <class T, int rows, bool normal_prior>
static inline void importance_distances(const T* z, int64_t stride, const T* mean, const T* inverse, int64_t D,
                                        const ImportanceTail<T>& tail, bool readable, T* out) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[rows][registers] = {};
  importance_groups<T, rows>(z, stride, D, tail, readable, [&](int64_t d, const auto& z_d) {
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      const Vec<T> mu = load(mean + d + r * kLanes<T>), factor = load(inverse + d + r * kLanes<T>);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        const Vec<T> x = z_d(i, r), delta = x - mu;
        sums[i][r] += (delta * factor) * delta;
        if (normal_prior) sums[i][r] -= x * x;
      }
    }
  });
  Vec<T> folded[rows];
  for (int i = 0; i < rows; ++i) folded[i] = fold_registers<T>(sums[i]);
  sum_halves_of<T>(folded, out);
}

template <class T, int rows, bool normal_prior>
static void importance_rows(const ImportanceModel<T>& m, const ImportanceSamples<T>& p, int64_t s, Range points,
                            const ImportanceTail<T>& tail) {
  const int64_t N = m.N, D = m.D, end = p.S * N * D, ahead = importance_ahead<T>(p.S, N * D);
  const T *z = p.z + (s * N + points.first) * D, *mean = m.packed + points.first * 2 * m.padded;
  T* log_w = p.log_w + s * N + points.first;
  for (int64_t n = points.first; n < points.last; ++n, z += D, mean += 2 * m.padded, ++log_w) {
    importance_prefetch<T, rows, false>(z, N * D, D, ahead);
    T out[rows + kLanes<T>];  // room for whole vectors
    importance_distances<T, rows, normal_prior>(z, N * D, mean, mean + m.padded, D, tail,
                                                ((s + rows - 1) * N + n) * D + m.padded <= end, out);
    for (int i = 0; i < rows; ++i) log_w[i * N] = out[i];
  }
  for (int64_t row = s * N; row < (s + rows) * N; row += N) {
    T* const w = p.log_w + row;
    for (int64_t n = points.first; n < points.last; ++n) w[n] = p.log_px[row + n] + (m.constants[n] + T(0.5) * w[n]);
    if (!normal_prior)
      for (int64_t n = points.first; n < points.last; ++n) w[n] += p.log_pz[row + n];
  }
}

template <class T>
static void importance_log_weights(const ImportanceModel<T>& m, const ImportanceSamples<T>& p, Range rows, Range points) {
  const ImportanceTail<T> tail(m.D);
  const auto tile = m.normal_prior ? importance_rows<T, kImportanceRows, true> : importance_rows<T, kImportanceRows, false>;
  const auto row = m.normal_prior ? importance_rows<T, 1, true> : importance_rows<T, 1, false>;
  int64_t s = rows.first;
  for (; s + kImportanceRows <= rows.last; s += kImportanceRows) tile(m, p, s, points, tail);
  for (; s < rows.last; ++s) row(m, p, s, points, tail);
}

// What becomes of dz.
enum class ImportanceDz { none, stored, past_cache };

// For `rows` samples of one data point: dz = coef · (δ/σ² − z), and sums += (Σ coef · δ/σ², Σ coef · δ²/σ²).
template <class T, int rows, bool normal_prior, ImportanceDz use, bool need_posterior>
static inline void importance_gradient_tile(const ImportanceModel<T>& m, int64_t n, const T* z, int64_t stride,
                                            const T (&coefs)[rows], const ImportanceTail<T>& tail, bool readable, bool writable,
                                            T* dz, T* sums) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  const T *const mean = m.packed + n * 2 * m.padded, *const inverse = mean + m.padded;
  importance_groups<T, rows>(z, stride, m.D, tail, readable, [&](int64_t d, const auto& z_d) {
    const bool whole = writable || d + kGroup<T> <= m.D;
    T ends[rows][kGroup<T>];
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      const int64_t at = d + r * kLanes<T>;
      const Vec<T> mu = load(mean + at), factor = load(inverse + at);
      Vec<T> first = need_posterior ? load(sums + at) : Vec<T>{};
      Vec<T> second = need_posterior ? load(sums + m.padded + at) : Vec<T>{};
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i) {
        const Vec<T> x = z_d(i, r), delta = x - mu, scaled = delta * factor;
        const Vec<T> gradient = coefs[i] * (normal_prior ? scaled - x : scaled);
        if (use == ImportanceDz::past_cache) store_past_cache(dz + i * stride + at, gradient);
        if (use == ImportanceDz::stored) store(whole ? dz + i * stride + at : ends[i] + r * kLanes<T>, gradient);
        if (need_posterior) {
          const Vec<T> weighted = coefs[i] * scaled;
          first += weighted;
          second += weighted * delta;
        }
      }
      if (need_posterior) store(sums + at, first), store(sums + m.padded + at, second);
    }
    if (use == ImportanceDz::stored && !whole)
      for (int i = 0; i < rows; ++i) std::copy_n(ends[i], tail.count, dz + i * stride + d);
  });
}

// The samples from s on, `rows` of them.
template <class T, int rows, bool normal_prior, ImportanceDz use, bool need_posterior>
static void importance_gradient_rows(const ImportanceGradient<T>& p, int64_t s, Range points, const ImportanceTail<T>& tail,
                                     T* sums) {
  const int64_t N = p.model.N, D = p.model.D, padded = p.model.padded, ahead = importance_ahead<T>(p.S, N * D);
  const T* const weights = (p.grad ? p.dlog_w : p.weights) + s * N;
  if (need_posterior)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = points.first; n < points.last; ++n) sums[N * 2 * padded + n] += weights[row * N + n];
  for (int64_t n = points.first; n < points.last; ++n) {
    T coefs[rows];
    for (int i = 0; i < rows; ++i) coefs[i] = weights[i * N + n];
    const int64_t at = (s * N + n) * D;
    importance_prefetch<T, rows, false>(p.z + at, N * D, D, ahead);
    if (use == ImportanceDz::stored) importance_prefetch<T, rows, true>(p.dz + at, N * D, D, kImportanceAhead * D);
    importance_gradient_tile<T, rows, normal_prior, use, need_posterior>(
        p.model, n, p.z + at, N * D, coefs, tail, at + (rows - 1) * N * D + padded <= p.S * N * D,
        n * D + padded <= points.last * D,  // else it would write to the data points of another task
        p.dz + at, sums + n * 2 * padded);
  }
}

template <class T, bool normal_prior, ImportanceDz use, bool need_posterior>
static void importance_gradient_chunk(const ImportanceGradient<T>& p, Range rows, Range points, T* sums) {
  const ImportanceTail<T> tail(p.model.D);
  int64_t s = rows.first;
  for (; s + kImportanceRows <= rows.last; s += kImportanceRows)
    importance_gradient_rows<T, kImportanceRows, normal_prior, use, need_posterior>(p, s, points, tail, sums);
  for (; s < rows.last; ++s) importance_gradient_rows<T, 1, normal_prior, use, need_posterior>(p, s, points, tail, sums);
}

template <class T, bool normal_prior>
static void importance_gradient(const ImportanceGradient<T>& p, Range rows, Range points, T* sums) {
  using Dz = ImportanceDz;
  if (!p.dz && !sums) return;
  const auto chunk = !p.dz          ? importance_gradient_chunk<T, normal_prior, Dz::none, true>
                     : p.past_cache ? (sums ? importance_gradient_chunk<T, normal_prior, Dz::past_cache, true>
                                            : importance_gradient_chunk<T, normal_prior, Dz::past_cache, false>)
                     : sums         ? importance_gradient_chunk<T, normal_prior, Dz::stored, true>
                                    : importance_gradient_chunk<T, normal_prior, Dz::stored, false>;
  chunk(p, rows, points, sums);
}

// Values of a chunk's sums.
template <class T>
static inline int64_t importance_sums(const ImportanceModel<T>& m) {
  return m.N * (2 * m.padded + 1);
}

template <class T>
static void importance_backward(const ImportanceGradient<T>& p, int64_t chunk, Range points) {
  const int64_t N = p.model.N, size = 2 * p.model.padded;
  const Range rows{chunk * p.rows, std::min(p.S, (chunk + 1) * p.rows)};
  T* const sums = p.sums ? p.sums + chunk * importance_sums(p.model) : nullptr;
  if (sums) {
    std::fill(sums + points.first * size, sums + points.last * size, T(0));
    std::fill(sums + N * size + points.first, sums + N * size + points.last, T(0));
  }
  if (p.grad)
    for (int64_t s = rows.first; s < rows.last; ++s)
      for (int64_t n = points.first; n < points.last; ++n)
        p.dlog_w[s * N + n] = p.weights[s * N + n] * p.grad[n * p.grad_stride];
  (p.model.normal_prior ? importance_gradient<T, true> : importance_gradient<T, false>)(p, rows, points, sums);
  if (p.past_cache) fence_stores();
}

template <class T>
static void importance_merge_backward(const ImportanceGradient<T>& p, int64_t first, int64_t last) {
  const int64_t N = p.model.N, D = p.model.D, padded = p.model.padded, size = importance_sums(p.model);
  const int64_t chunks = (p.S + p.rows - 1) / p.rows;
  const auto add = [&](int64_t begin, int64_t end) {
    for (int64_t c = 1; c < chunks; ++c)
      for (int64_t i = begin; i < end; ++i) p.sums[i] += p.sums[c * size + i];
  };
  if (chunks == 0) std::fill_n(p.sums, size, T(0));
  add(first * 2 * padded, last * 2 * padded);
  add(N * 2 * padded + first, N * 2 * padded + last);
  for (int64_t n = first; n < last; ++n) {
    const T* const sums = p.sums + n * 2 * padded;
    const T total = p.sums[N * 2 * padded + n];
    for (int64_t d = 0; d < D; ++d) {
      p.dmu[n * D + d] = -sums[d];
      p.dlog_var[n * D + d] = T(0.5) * (total - sums[padded + d]);
    }
  }
}

template <class T>
static constexpr ImportanceKernels<T> importance_kernels() {
  return {importance_pack<T>,    importance_log_weights<T>, importance_moments<T, T>, importance_moments<double, T>,
          importance_merge<T>,   importance_bound<T>,       importance_excess<T>,     importance_correct<T>,
          importance_weights<T>, importance_backward<T>,    importance_merge_backward<T>};
}
