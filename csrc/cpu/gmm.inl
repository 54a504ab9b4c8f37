// See gmm.h. Rows lie across lanes: a block of rows is transposed to [D][rows], a tile of kGmmTile components is broadcast,
// and the log-sum-exp over components runs lane by lane. Per pair and dimension forward costs one subtraction, one
// multiplication and one FMA; backward recomputes that and adds one subtraction's worth of additions, one multiplication
// and two FMAs for all three gradients.

constexpr int64_t kForwardRows = 64;       // rows a forward block
constexpr int64_t kBackwardRows = 512;     // at most; fewer for large D, so that z and dz stay in the L2 cache
constexpr int64_t kBackwardCache = 32768;  // rows · D
constexpr int64_t kComponents = 64;        // components whose logits are held at a time
constexpr int64_t kHeldLogits = 1 << 19;   // rows · K where all of a block's logits are held
constexpr int kRowTile = LATENT_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of rows a register tile

static int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T>
constexpr int64_t kGroup = 64 / sizeof(T);  // rows are padded to whole groups of 64 bytes

// The first of the tile's means [D][kGmmTile]; its inverse variances follow in the same layout.
template <class T>
static inline T* gmm_tile(const GmmMixture<T>& m, int64_t k) {
  return m.packed + k * m.D * 2;
}

template <class T>
static inline Vec<T> exp_negative(Vec<T> x) {
  return exp<T>(-x);
}

// Packs tiles [first, last).
template <class T>
static void gmm_pack(const GmmMixture<T>& m, int64_t first, int64_t last) {
  const T log_normaliser = T(0.5) * T(m.D) * T(1.8378770664093453);  // ½ D log 2π
  const int64_t size = m.D * kGmmTile;
  for (int64_t k = first * kGmmTile; k < last * kGmmTile; k += kGmmTile) {
    const int64_t n = std::min(kGmmTile, m.K - k);
    T *const means = gmm_tile(m, k), *const inverses = means + size;
    if (n < kGmmTile) std::fill_n(means, 2 * size, T(0));
    transpose(m.means + k * m.means_strides[0], m.means_strides[0], m.means_strides[1], means, kGmmTile, n, m.D);
    transpose(m.log_vars + k * m.log_vars_strides[0], m.log_vars_strides[0], m.log_vars_strides[1], inverses, kGmmTile, n, m.D);
    T sums[kGroup<T>] = {};  // of the log-variances, in lanes of a fixed number
    int64_t i = 0;
    for (; i + kGroup<T> <= size; i += kGroup<T>)
      for (int64_t j = 0; j < kGroup<T>; ++j) sums[j] += inverses[i + j];
    for (int64_t j = 0; i + j < size; ++j) sums[j] += inverses[i + j];
    for (int64_t j = kGroup<T> / 2; j >= kGmmTile; j /= 2)
      for (int64_t t = 0; t < j; ++t) sums[t] += sums[t + j];
    for (int64_t t = 0; t < kGmmTile; ++t)
      m.constants[k + t] = t < n ? m.log_weights[(k + t) * m.log_weights_stride] - (T(0.5) * sums[t] + log_normaliser) : -kInf<T>;
    apply<T, exp_negative<T>>(inverses, inverses, size);
  }
}

// Rows [first, first + n) as zt[D][stride], the last row repeated up to `padded`.
template <class T>
static void gmm_load_rows(const GmmRows<T>& rows, int64_t first, int64_t n, int64_t padded, int64_t D, T* zt, int64_t stride) {
  transpose(rows.z + first * rows.z_strides[0], rows.z_strides[0], rows.z_strides[1], zt, stride, n, D);
  for (int64_t d = 0; d < D; ++d)
    for (int64_t i = n; i < padded; ++i) zt[d * stride + i] = zt[d * stride + n - 1];
}

// logits[kGmmTile][stride] of one tile of components for `vectors` vectors of rows.
template <class T, int vectors>
static inline void gmm_logit_tile(const T* zt, const T* tile, const T* constants, int64_t D, T* logits, int64_t stride) {
  Vec<T> sums[kGmmTile][vectors] = {};
  const T* inverses = tile + D * kGmmTile;
  for (int64_t d = 0; d < D; ++d, zt += stride, tile += kGmmTile, inverses += kGmmTile) {
    Vec<T> z[vectors];
    for (int v = 0; v < vectors; ++v) z[v] = load(zt + v * kLanes<T>);
#pragma GCC unroll 4
    for (int k = 0; k < kGmmTile; ++k) {
      const Vec<T> mean = broadcast(tile[k]), inverse = broadcast(inverses[k]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> delta = z[v] - mean;
        sums[k][v] += (delta * inverse) * delta;
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kGmmTile; ++k)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      store(logits + k * stride + v * kLanes<T>, broadcast(constants[k]) - T(0.5) * sums[k][v]);
}

// logits[k − first][stride] for components [first, last), a multiple of the tile, and `padded` rows.
template <class T>
static void gmm_logits(const GmmMixture<T>& m, const T* zt, int64_t first, int64_t last, int64_t padded, T* logits,
                       int64_t stride) {
  constexpr int64_t wide = kRowTile * kLanes<T>;
  for (int64_t k = first; k < last; k += kGmmTile) {
    const T* tile = gmm_tile(m, k);
    T* out = logits + (k - first) * stride;
    int64_t i = 0;
    for (; i + wide <= padded; i += wide)
      gmm_logit_tile<T, kRowTile>(zt + i, tile, m.constants + k, m.D, out + i, stride);
    for (; i < padded; i += kLanes<T>) gmm_logit_tile<T, 1>(zt + i, tile, m.constants + k, m.D, out + i, stride);
  }
}

// −inf for the components that a row may not use.
template <class T>
static void gmm_mask(const GmmRows<T>& rows, int64_t K, int64_t row, int64_t n, int64_t first, int64_t last, T* logits,
                     int64_t stride) {
  if (!rows.labels && !rows.allowed) return;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t label = rows.labels ? rows.labels[row + i] : row + i;
    if (label < 0) continue;
    const bool* allowed = rows.allowed && label < rows.classes ? rows.allowed + label * K : nullptr;
    for (int64_t k = first; k < last; ++k)
      if (!(allowed ? allowed[k] : k == label && !rows.allowed)) logits[(k - first) * stride + i] = -kInf<T>;
  }
}

// The shift of a log-sum-exp: the maximum, or 0 where that is infinite.
template <class T>
static inline Vec<T> gmm_shift(Vec<T> maximum) {
  const Vec<T> finite = maximum == kInf<T> ? Vec<T>{} : maximum;
  return maximum == -kInf<T> ? Vec<T>{} : finite;
}

// Online log-sum-exp: folds logits[components][stride] into maxima and sums of `padded` rows.
template <class T>
static void gmm_fold(const T* logits, int64_t stride, int64_t components, int64_t padded, T* maxima, T* sums) {
  for (int64_t i = 0; i < padded; i += kLanes<T>) {
    const Vec<T> before = load(maxima + i);
    Vec<T> maximum = before;
    for (int64_t k = 0; k < components; ++k) maximum = larger(load(logits + k * stride + i), maximum);
    const Vec<T> shift = gmm_shift<T>(maximum);
    Vec<T> sum = load(sums + i) * exp<T>(before - shift);
    for (int64_t k = 0; k < components; ++k) sum += exp<T>(load(logits + k * stride + i) - shift);
    store(maxima + i, maximum);
    store(sums + i, sum);
  }
}

template <class T>
static void gmm_log_sum(const T* maxima, const T* sums, int64_t padded, T* out) {
  for (int64_t i = 0; i < padded; i += kLanes<T>)
    store(out + i, gmm_shift<T>(load(maxima + i)) + log<T>(load(sums + i)));
}

// resp[n, K] holds logits and becomes exp(logit − log_prob); a row of density zero has none.
template <class T>
static void gmm_normalise(T* resp, const T* log_prob, int64_t n, int64_t K) {
  for (int64_t i = 0; i < n; ++i, resp += K) {
    const T shift = log_prob[i] == -kInf<T> ? kInf<T> : log_prob[i];
    int64_t k = 0;
    for (; k + kLanes<T> <= K; k += kLanes<T>) store(resp + k, exp<T>(load(resp + k) - shift));
    if (k == K) continue;
    T tail[kLanes<T>] = {};
    for (int64_t j = k; j < K; ++j) tail[j - k] = resp[j];
    store(tail, exp<T>(load(tail) - shift));
    for (int64_t j = k; j < K; ++j) resp[j] = tail[j - k];
  }
}

template <class T>
static void gmm_forward(const GmmForward<T>& p, int64_t task) {
  const int64_t K = p.mixture.K, D = p.mixture.D, N = p.rows.N, split = task % p.grid.splits;
  const int64_t begin = task / p.grid.splits * p.grid.rows, end = std::min(N, begin + p.grid.rows);
  const int64_t k0 = split * p.grid.components, k1 = std::min(round_up(K, kGmmTile), k0 + p.grid.components);
  constexpr int64_t stride = kForwardRows;
  Arena<T> arena(Scratch::task, D * stride, kComponents * stride, kForwardRows, kForwardRows, kForwardRows);
  T *const zt = arena.take(D * stride), *const logits = arena.take(kComponents * stride);
  T *const maxima = arena.take(kForwardRows), *const sums = arena.take(kForwardRows), *const result = arena.take(kForwardRows);
  for (int64_t row = begin; row < end; row += kForwardRows) {
    const int64_t n = std::min(kForwardRows, end - row), padded = round_up(n, kGroup<T>);
    gmm_load_rows(p.rows, row, n, padded, D, zt, stride);
    std::fill_n(maxima, padded, -kInf<T>);
    std::fill_n(sums, padded, T(0));
    for (int64_t k = k0; k < k1; k += kComponents) {
      const int64_t last = std::min(k1, k + kComponents), real = std::min(K, last);
      gmm_logits(p.mixture, zt, k, last, padded, logits, stride);
      gmm_mask(p.rows, K, row, n, k, real, logits, stride);
      gmm_fold(logits, stride, real - k, padded, maxima, sums);
      if (p.responsibilities)
        transpose(logits, stride, 1, p.responsibilities + row * K + k, K, real - k, n);
    }
    if (p.grid.splits > 1) {
      std::copy_n(maxima, n, p.maxima + split * N + row);
      std::copy_n(sums, n, p.sums + split * N + row);
      continue;
    }
    gmm_log_sum(maxima, sums, padded, result);
    std::copy_n(result, n, p.log_prob + row);
    if (p.responsibilities) gmm_normalise(p.responsibilities + row * K, result, n, K);
  }
}

template <class T>
static void gmm_merge_forward(const GmmForward<T>& p) {
  const int64_t N = p.rows.N;
  for (int64_t row = 0; row < N; row += kGroup<T>) {
    const int64_t n = std::min(kGroup<T>, N - row);
    T maxima[kGroup<T>], sums[kGroup<T>] = {}, result[kGroup<T>];
    std::fill_n(maxima, kGroup<T>, -kInf<T>);
    for (int64_t s = 0; s < p.grid.splits; ++s)
      for (int64_t i = 0; i < n; ++i) maxima[i] = std::max(maxima[i], p.maxima[s * N + row + i]);
    for (int64_t s = 0; s < p.grid.splits; ++s) {
      T factors[kGroup<T>] = {};
      std::copy_n(p.maxima + s * N + row, n, factors);
      for (int64_t i = 0; i < kGroup<T>; i += kLanes<T>)
        store(factors + i, exp<T>(load(factors + i) - gmm_shift<T>(load(maxima + i))));
      for (int64_t i = 0; i < n; ++i) sums[i] += p.sums[s * N + row + i] * factors[i];
    }
    gmm_log_sum(maxima, sums, kGroup<T>, result);
    std::copy_n(result, n, p.log_prob + row);
  }
}

// logits[k][stride] become the coefficients a_nk = g_n exp(logit − log_prob); shift is +inf for rows of density zero.
template <class T>
static void gmm_coefficients(T* logits, int64_t stride, int64_t components, int64_t padded, const T* grad, const T* shift) {
  for (int64_t k = 0; k < components; ++k, logits += stride)
    for (int64_t i = 0; i < padded; i += kLanes<T>)
      store(logits + i, load(grad + i) * exp<T>(load(logits + i) - load(shift + i)));
}

template <class T>
static T gmm_sum(const T* values, int64_t padded) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[registers] = {};
  for (int64_t i = 0; i < padded; i += kGroup<T>)
    for (int r = 0; r < registers; ++r) sums[r] += load(values + i + r * kLanes<T>);
  return sum_lanes<T>(sums);
}

// Sums of one tile over rows: [D][Σ a δ, Σ a δ²][kGmmTile], then Σ a [kGmmTile].
static int64_t gmm_moments_size(int64_t D) { return kGmmTile * (2 * D + 1); }

// For one tile of components: dzt[D][stride] −= Σ_k a δ / σ², and the rows are added to its moments.
template <class T, bool need_z, bool need_mixture>
static void gmm_gradient_tile(const T* zt, T* dzt, const T* coefs, int64_t stride, const T* tile, int64_t D, int64_t padded,
                              T* moments) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  const T* inverses = tile + D * kGmmTile;
  for (int64_t d = 0; d < D; ++d, zt += stride, dzt += stride, tile += kGmmTile, inverses += kGmmTile) {
    Vec<T> sums[2 * kGmmTile] = {};
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      Vec<T> s1[kGmmTile] = {}, s2[kGmmTile] = {}, mean[kGmmTile], inverse[kGmmTile];
#pragma GCC unroll 4
      for (int k = 0; k < kGmmTile; ++k) mean[k] = broadcast(tile[k]), inverse[k] = broadcast(inverses[k]);
      for (int64_t i = r * kLanes<T>; i < padded; i += kGroup<T>) {
        const Vec<T> z = load(zt + i);
        Vec<T> dz = need_z ? load(dzt + i) : Vec<T>{};
#pragma GCC unroll 4
        for (int k = 0; k < kGmmTile; ++k) {
          const Vec<T> delta = z - mean[k], weighted = load(coefs + k * stride + i) * delta;
          if (need_z) dz -= weighted * inverse[k];
          if (need_mixture) s1[k] += weighted, s2[k] += weighted * delta;
        }
        if (need_z) store(dzt + i, dz);
      }
#pragma GCC unroll 4
      for (int k = 0; k < kGmmTile; ++k) {
        sums[k] = r ? sums[k] + s1[k] : s1[k];
        sums[kGmmTile + k] = r ? sums[kGmmTile + k] + s2[k] : s2[k];
      }
    }
    if (!need_mixture) continue;
    T totals[std::max<int>(2 * kGmmTile, kLanes<T>)];
    sum_halves_of<T>(sums, totals);
    for (int64_t i = 0; i < 2 * kGmmTile; ++i) moments[d * 2 * kGmmTile + i] += totals[i];
  }
}

// Of one task: the transposed points and their gradient, and per row the incoming gradient and the shift of its logits.
template <class T>
struct GmmBlock {
  int64_t stride;
  T *zt, *dzt, *coefs, *grad, *shift;
};

// The log-density of rows [row, row + n), with the logits of all components left in coefs.
template <class T>
static void gmm_block_value(const GmmBackward<T>& p, const GmmBlock<T>& b, int64_t row, int64_t n, int64_t padded) {
  const int64_t K = p.mixture.K;
  gmm_logits(p.mixture, b.zt, 0, round_up(K, kGmmTile), padded, b.coefs, b.stride);
  gmm_mask(p.rows, K, row, n, 0, K, b.coefs, b.stride);
  std::fill_n(b.grad, padded, -kInf<T>);
  std::fill_n(b.shift, padded, T(0));
  gmm_fold(b.coefs, b.stride, K, padded, b.grad, b.shift);
  gmm_log_sum(b.grad, b.shift, padded, b.shift);
  std::copy_n(b.shift, n, p.value + row);
}

template <class T, bool need_z, bool need_mixture>
static void gmm_backward_block(const GmmBackward<T>& p, const GmmBlock<T>& b, int64_t row, int64_t n, int64_t k0, int64_t k1,
                               T* moments) {
  const int64_t K = p.mixture.K, D = p.mixture.D, padded = round_up(n, kGroup<T>), stride = b.stride;
  gmm_load_rows(p.rows, row, n, padded, D, b.zt, stride);
  if (p.value) gmm_block_value(p, b, row, n, padded);
  const T* log_prob = p.value ? p.value : p.log_prob;
  for (int64_t i = 0; i < padded; ++i) {  // the padding weighs nothing, whatever its logits
    const bool counts = i < n && log_prob[row + i] != -kInf<T>;
    b.grad[i] = counts ? p.grad[(row + i) * p.grad_stride] : T(0);
    b.shift[i] = counts ? log_prob[row + i] : kInf<T>;
  }
  if (need_z) std::fill_n(b.dzt, D * stride, T(0));
  for (int64_t k = k0; k < k1; k += kComponents) {
    const int64_t last = std::min(k1, k + kComponents), real = std::min(K, last) - k;
    T* const coefs = b.coefs + (p.value ? k * stride : 0);
    if (p.coef) {
      std::fill_n(coefs, (last - k) * stride, T(0));
      transpose(p.coef + row * K + k, K, 1, coefs, stride, n, real);
    } else {
      if (!p.value) {
        gmm_logits(p.mixture, b.zt, k, last, padded, coefs, stride);
        gmm_mask(p.rows, K, row, n, k, k + real, coefs, stride);
      }
      gmm_coefficients(coefs, stride, last - k, padded, b.grad, b.shift);
    }
    for (int64_t j = k; j < last; j += kGmmTile) {
      T* const out = moments + (j - k0) * (2 * D + 1);
      gmm_gradient_tile<T, need_z, need_mixture>(b.zt, b.dzt, coefs + (j - k) * stride, stride, gmm_tile(p.mixture, j), D,
                                                 padded, out);
      if (need_mixture)
        for (int64_t t = 0; t < kGmmTile; ++t) out[2 * D * kGmmTile + t] += gmm_sum(coefs + (j - k + t) * stride, padded);
    }
  }
}

template <class T>
static void gmm_backward(const GmmBackward<T>& p, int64_t task) {
  const int64_t K = p.mixture.K, D = p.mixture.D, N = p.rows.N;
  const int64_t split = task % p.grid.splits, chunk = task / p.grid.splits, padded_K = round_up(K, kGmmTile);
  const int64_t begin = chunk * p.grid.rows, end = std::min(N, begin + p.grid.rows);
  const int64_t k0 = split * p.grid.components, k1 = std::min(padded_K, k0 + p.grid.components);
  const int64_t held = p.value ? padded_K : kComponents;
  int64_t fitting = kBackwardCache / std::max<int64_t>(D, 1);
  if (p.value) fitting = std::min(fitting, kHeldLogits / std::max<int64_t>(held, 1));
  const int64_t block_rows = std::min({kBackwardRows, std::max<int64_t>(fitting / 64 * 64, 64), round_up(end - begin, kGroup<T>)});
  // At a stride of a power of two the columns would share a few cache sets: 7 % slower at D = 64.
  const int64_t stride = block_rows + kGroup<T>;
  const int64_t moments_size = p.moments ? (k1 - k0) * (2 * D + 1) : 0;
  Arena<T> arena(Scratch::task, D * stride, D * stride, held * stride, stride, stride, moments_size);
  GmmBlock<T> block{stride};
  block.zt = arena.take(D * stride), block.dzt = arena.take(D * stride), block.coefs = arena.take(held * stride);
  block.grad = arena.take(stride), block.shift = arena.take(stride);
  T* const moments = arena.take(moments_size);
  std::fill_n(moments, moments_size, T(0));
  const auto run = !p.moments ? gmm_backward_block<T, true, false>
                   : p.dz     ? gmm_backward_block<T, true, true>
                              : gmm_backward_block<T, false, true>;
  for (int64_t row = begin; row < end; row += block_rows) {
    const int64_t n = std::min(block_rows, end - row);
    run(p, block, row, n, k0, k1, moments);
    if (p.dz) transpose(block.dzt, stride, 1, (split ? p.dz_parts + (split - 1) * N * D : p.dz) + row * D, D, D, n);
  }
  if (p.moments) std::copy_n(moments, moments_size, p.moments + (chunk * padded_K + k0) * (2 * D + 1));
}

template <class T>
static void gmm_merge_rows(const GmmBackward<T>& p, int64_t first, int64_t last) {
  const int64_t size = p.rows.N * p.mixture.D;
  for (int64_t s = 0; s + 1 < p.grid.splits; ++s)
    for (int64_t i = first; i < last; ++i) p.dz[i] += p.dz_parts[s * size + i];
}

template <class T>
static void gmm_merge_mixture(const GmmBackward<T>& p, int64_t first, int64_t last) {
  const int64_t K = p.mixture.K, D = p.mixture.D, size = gmm_moments_size(D), tiles = round_up(K, kGmmTile) / kGmmTile;
  for (int64_t tile = first; tile < last; ++tile) {
    T* const total = p.moments + tile * size;
    if (p.grid.chunks == 0) std::fill_n(total, size, T(0));
    for (int64_t chunk = 1; chunk < p.grid.chunks; ++chunk)
      for (int64_t i = 0; i < size; ++i) total[i] += p.moments[(chunk * tiles + tile) * size + i];
    const T* const inverses = gmm_tile(p.mixture, tile * kGmmTile) + D * kGmmTile;
    for (int64_t t = 0; t < std::min(kGmmTile, K - tile * kGmmTile); ++t) {
      const int64_t k = tile * kGmmTile + t;
      const T weight = total[2 * D * kGmmTile + t];
      for (int64_t d = 0; d < D; ++d) {
        const T inverse = inverses[d * kGmmTile + t], *const sums = total + d * 2 * kGmmTile + t;
        p.dmeans[k * D + d] = p.plain ? sums[0] : inverse * sums[0];
        p.dlog_vars[k * D + d] = p.plain ? sums[kGmmTile] : T(0.5) * (inverse * sums[kGmmTile] - weight);
      }
      p.dlog_weights[k] = weight;
    }
  }
}

template <class T>
static constexpr GmmKernels<T> gmm_kernels() {
  return {gmm_pack<T>, gmm_forward<T>, gmm_merge_forward<T>, gmm_backward<T>, gmm_merge_rows<T>, gmm_merge_mixture<T>};
}
