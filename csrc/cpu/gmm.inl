// See gmm.h. Rows lie across lanes: a block of rows is transposed to [D][rows], a tile of kGmmTile components is broadcast,
// and the log-sum-exp over components runs lane by lane. Per pair and dimension forward costs one subtraction, one
// multiplication and one FMA; backward recomputes that and adds one subtraction's worth of additions, one multiplication
// and two FMAs for all three gradients.

constexpr int64_t kForwardRows = 64;       // rows a forward block
constexpr int64_t kBackwardRows = 512;     // at most; fewer for large D, so that z and dz stay in the L2 cache
constexpr int64_t kBackwardCache = 32768;  // rows · D
constexpr int64_t kComponents = 64;        // components whose logits are held at a time
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
static void gmm_pack(const GmmMixture<T>& m) {
  const T log_2pi = T(1.8378770664093453);
  for (int64_t k = 0; k < m.K; ++k) {
    T* const mean = gmm_tile(m, k / kGmmTile * kGmmTile) + k % kGmmTile;
    T* const inverse = mean + m.D * kGmmTile;
    T sum = 0;
    for (int64_t d = 0; d < m.D; ++d) {
      const T log_var = m.log_vars[k * m.log_vars_strides[0] + d * m.log_vars_strides[1]];
      mean[d * kGmmTile] = m.means[k * m.means_strides[0] + d * m.means_strides[1]];
      inverse[d * kGmmTile] = -log_var;
      sum += log_var;
    }
    m.constants[k] = m.log_weights[k * m.log_weights_stride] - T(0.5) * (sum + T(m.D) * log_2pi);
  }
  const int64_t padded = round_up(m.K, kGmmTile), size = m.D * kGmmTile;
  for (int64_t k = m.K; k < padded; ++k) {
    for (int64_t i = k % kGmmTile; i < 2 * size; i += kGmmTile) gmm_tile(m, k / kGmmTile * kGmmTile)[i] = 0;
    m.constants[k] = -kInf<T>;
  }
  for (int64_t k = 0; k < padded; k += kGmmTile) apply<T, exp<T>>(gmm_tile(m, k) + size, gmm_tile(m, k) + size, size);
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

// For one tile of components: dzt[D][stride] −= Σ_k a δ / σ², and moments[k][2D + 1] += (Σ a δ, Σ a δ²).
template <class T, bool need_z, bool need_mixture>
static void gmm_gradient_tile(const T* zt, T* dzt, const T* coefs, int64_t stride, const T* tile, int64_t D, int64_t padded,
                              T* moments) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  const T* inverses = tile + D * kGmmTile;
  for (int64_t d = 0; d < D; ++d, zt += stride, dzt += stride, tile += kGmmTile, inverses += kGmmTile) {
    Vec<T> first[kGmmTile][registers] = {}, second[kGmmTile][registers] = {};
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
      for (int k = 0; k < kGmmTile; ++k) first[k][r] = s1[k], second[k][r] = s2[k];
    }
    if (need_mixture)
      for (int k = 0; k < kGmmTile; ++k) {
        moments[k * (2 * D + 1) + d] += sum_lanes<T>(first[k]);
        moments[k * (2 * D + 1) + D + d] += sum_lanes<T>(second[k]);
      }
  }
}

template <class T, bool need_z, bool need_mixture>
static void gmm_backward_block(const GmmBackward<T>& p, int64_t row, int64_t n, int64_t stride, int64_t k0, int64_t k1, T* zt,
                               T* dzt, T* coefs, T* grad, T* shift, T* moments) {
  const int64_t K = p.mixture.K, D = p.mixture.D, padded = round_up(n, kGroup<T>);
  gmm_load_rows(p.rows, row, n, padded, D, zt, stride);
  for (int64_t i = 0; i < padded; ++i) {  // the padding weighs nothing, whatever its logits
    const bool counts = i < n && p.log_prob[row + i] != -kInf<T>;
    grad[i] = counts ? p.grad[(row + i) * p.grad_stride] : T(0);
    shift[i] = counts ? p.log_prob[row + i] : kInf<T>;
  }
  if (need_z) std::fill_n(dzt, D * stride, T(0));
  for (int64_t k = k0; k < k1; k += kComponents) {
    const int64_t last = std::min(k1, k + kComponents), real = std::min(K, last) - k;
    if (p.coef) {
      std::fill_n(coefs, (last - k) * stride, T(0));
      transpose(p.coef + row * K + k, K, 1, coefs, stride, n, real);
    } else {
      gmm_logits(p.mixture, zt, k, last, padded, coefs, stride);
      gmm_mask(p.rows, K, row, n, k, k + real, coefs, stride);
      gmm_coefficients(coefs, stride, last - k, padded, grad, shift);
    }
    for (int64_t j = k; j < last; j += kGmmTile) {
      T* out = moments + (j - k0) * (2 * D + 1);
      if (need_mixture)
        for (int64_t t = 0; t < kGmmTile; ++t) out[t * (2 * D + 1) + 2 * D] += gmm_sum(coefs + (j - k + t) * stride, padded);
      gmm_gradient_tile<T, need_z, need_mixture>(zt, dzt, coefs + (j - k) * stride, stride, gmm_tile(p.mixture, j), D,
                                                 padded, out);
    }
  }
}

template <class T>
static void gmm_backward(const GmmBackward<T>& p, int64_t task) {
  const int64_t K = p.mixture.K, D = p.mixture.D, N = p.rows.N, width = 2 * D + 1;
  const int64_t split = task % p.grid.splits, chunk = task / p.grid.splits;
  const int64_t begin = chunk * p.grid.rows, end = std::min(N, begin + p.grid.rows);
  const int64_t k0 = split * p.grid.components, k1 = std::min(round_up(K, kGmmTile), k0 + p.grid.components);
  const int64_t fitting = std::max(kBackwardCache / std::max<int64_t>(D, 1) / 64 * 64, int64_t(64));
  const int64_t block_rows = std::min({kBackwardRows, fitting, round_up(end - begin, kGroup<T>)});
  // At a stride of a power of two the columns would share a few cache sets: 7 % slower at D = 64.
  const int64_t stride = block_rows + kGroup<T>;
  const int64_t moments_size = p.moments ? (k1 - k0) * width : 0;
  Arena<T> arena(Scratch::task, D * stride, D * stride, kComponents * stride, stride, stride, moments_size);
  T *const zt = arena.take(D * stride), *const dzt = arena.take(D * stride), *const coefs = arena.take(kComponents * stride);
  T *const grad = arena.take(stride), *const shift = arena.take(stride), *const moments = arena.take(moments_size);
  std::fill_n(moments, moments_size, T(0));
  const auto block = !p.moments ? gmm_backward_block<T, true, false>
                     : p.dz     ? gmm_backward_block<T, true, true>
                                : gmm_backward_block<T, false, true>;
  for (int64_t row = begin; row < end; row += block_rows) {
    const int64_t n = std::min(block_rows, end - row);
    block(p, row, n, stride, k0, k1, zt, dzt, coefs, grad, shift, moments);
    if (p.dz) transpose(dzt, stride, 1, (split ? p.dz_parts + (split - 1) * N * D : p.dz) + row * D, D, D, n);
  }
  if (p.moments) std::copy_n(moments, (std::min(K, k1) - k0) * width, p.moments + (chunk * K + k0) * width);
}

template <class T>
static void gmm_merge_rows(const GmmBackward<T>& p, int64_t first, int64_t last) {
  const int64_t size = p.rows.N * p.mixture.D;
  for (int64_t s = 0; s + 1 < p.grid.splits; ++s)
    for (int64_t i = first; i < last; ++i) p.dz[i] += p.dz_parts[s * size + i];
}

template <class T>
static void gmm_merge_mixture(const GmmBackward<T>& p, int64_t k_first, int64_t k_last) {
  const int64_t K = p.mixture.K, D = p.mixture.D, width = 2 * D + 1;
  for (int64_t k = k_first; k < k_last; ++k) {
    T* total = p.moments + k * width;
    if (p.grid.chunks == 0) std::fill_n(total, width, T(0));
    for (int64_t chunk = 1; chunk < p.grid.chunks; ++chunk)
      for (int64_t i = 0; i < width; ++i) total[i] += p.moments[(chunk * K + k) * width + i];
    const T* inverses = gmm_tile(p.mixture, k / kGmmTile * kGmmTile) + D * kGmmTile + k % kGmmTile;
    for (int64_t d = 0; d < D; ++d) {
      const T inverse = inverses[d * kGmmTile];
      p.dmeans[k * D + d] = inverse * total[d];
      p.dlog_vars[k * D + d] = T(0.5) * (inverse * total[D + d] - total[2 * D]);
    }
    p.dlog_weights[k] = total[2 * D];
  }
}

template <class T>
static constexpr GmmKernels<T> gmm_kernels() {
  return {gmm_pack<T>, gmm_forward<T>, gmm_merge_forward<T>, gmm_backward<T>, gmm_merge_rows<T>, gmm_merge_mixture<T>};
}
