// See gmm_full.h. Rows lie across lanes, as in gmm.inl: for a block of rows and one component δ is laid out as [D][rows], and
// the entries of the triangular factor are broadcast. A pair costs D (D + 1) / 2 FMAs for y = δ P, as many for P yᵀ and as
// many for a δ δᵀ; the last two are left out for rows with a = 0.

constexpr int64_t kFullRows = 512;     // rows a block with sums, at most; fewer for large D
constexpr int64_t kFullCache = 16384;  // rows · D of such a block
constexpr int kSecondTile = LATENT_VECTOR_BYTES == 64 ? 4 : 2;  // columns of a register tile of Σ a δ δᵀ

template <class T>
static void gmm_full_prepare(const GmmFullMixture<T>& m, int64_t first, int64_t last) {
  constexpr int64_t size = 64;
  for (int64_t k = first; k < last; ++k) {
    double sum = -0.5 * m.D * 1.8378770664093453;  // ½ D log 2π
    for (int64_t d0 = 0; d0 < m.D; d0 += size) {
      const int64_t n = std::min(size, m.D - d0);
      double logs[size];
      for (int64_t d = 0; d < n; ++d) logs[d] = m.chol[(k * m.D + d0 + d) * m.D + d0 + d];
      apply<double, log<double>>(logs, logs, n);
      for (int64_t d = 0; d < n; ++d) sum += logs[d];
    }
    m.constants[k] = T(m.log_weights[k] + sum);
  }
}

// delta[D][stride] of `padded` rows, with zeros up to a whole tile of dimensions.
template <class T>
static void gmm_full_delta(const T* zt, const T* mean, int64_t D, int64_t padded, int64_t stride, T* delta) {
  for (int64_t d = 0; d < D; ++d)
    for (int64_t i = 0; i < padded; i += kLanes<T>)
      store(delta + d * stride + i, load(zt + d * stride + i) - broadcast(mean[d]));
  for (int64_t d = D; d < round_up(D, kFullTile); ++d) std::fill_n(delta + d * stride, padded, T(0));
}

// Columns [j, j + columns) of y = δ P, added as squares, and kept in white[D][stride] if asked for.
template <class T, int vectors, int columns, bool keep>
static inline void gmm_full_white_tile(const T* delta, int64_t stride, const T* chol, int64_t D, int64_t j,
                                       Vec<T> (&squares)[vectors], T* white) {
  Vec<T> y[columns][vectors] = {};
  const T *at = delta, *row = chol + j;
  for (int64_t i = 0; i < j; ++i, at += stride, row += D) {
    Vec<T> d[vectors];
    for (int v = 0; v < vectors; ++v) d[v] = load(at + v * kLanes<T>);
#pragma GCC unroll 4
    for (int c = 0; c < columns; ++c) {
      const Vec<T> p = broadcast(row[c]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) y[c][v] += d[v] * p;
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < columns; ++i, at += stride, row += D)
#pragma GCC unroll 4
    for (int c = i; c < columns; ++c) {
      const Vec<T> p = broadcast(row[c]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) y[c][v] += load(at + v * kLanes<T>) * p;
    }
#pragma GCC unroll 4
  for (int c = 0; c < columns; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      squares[v] += y[c][v] * y[c][v];
      if (keep) store(white + (j + c) * stride + v * kLanes<T>, y[c][v]);
    }
}

// Calls f with the number of columns, 1 to kFullTile, as a constant.
template <class F>
static inline void with_columns(int64_t columns, const F& f) {
  if (columns >= 4) return f(std::integral_constant<int, 4>());
  if (columns == 3) return f(std::integral_constant<int, 3>());
  if (columns == 2) return f(std::integral_constant<int, 2>());
  f(std::integral_constant<int, 1>());
}

template <class T, int vectors, bool keep>
static inline void gmm_full_logit(const T* delta, int64_t stride, const T* chol, int64_t D, T constant, T* white, T* logits) {
  Vec<T> squares[vectors] = {};
  for (int64_t j = 0; j < D; j += kFullTile)
    with_columns(D - j, [&](auto columns) {
      gmm_full_white_tile<T, vectors, decltype(columns)::value, keep>(delta, stride, chol, D, j, squares, white);
    });
  for (int v = 0; v < vectors; ++v) store(logits + v * kLanes<T>, broadcast(constant) - T(0.5) * squares[v]);
}

// Logits of component k for `padded` rows, and with `keep` white[D][stride].
template <class T, bool keep>
static void gmm_full_logits(const GmmFullMixture<T>& m, int64_t k, const T* delta, int64_t stride, int64_t padded, T* white,
                            T* logits) {
  constexpr int64_t wide = kRowTile * kLanes<T>;
  const T* const chol = m.chol + k * m.D * m.D;
  int64_t i = 0;
  for (; i + wide <= padded; i += wide)
    gmm_full_logit<T, kRowTile, keep>(delta + i, stride, chol, m.D, m.constants[k], white + i, logits + i);
  for (; i < padded; i += kLanes<T>)
    gmm_full_logit<T, 1, keep>(delta + i, stride, chol, m.D, m.constants[k], white + i, logits + i);
}

template <class T>
static void gmm_full_forward(const GmmFullForward<T>& p, int64_t task) {
  const int64_t K = p.mixture.K, D = p.mixture.D;
  const int64_t begin = task * p.grid.rows, end = std::min(p.rows.N, begin + p.grid.rows), whole = round_up(D, kFullTile);
  constexpr int64_t stride = kForwardRows;
  Arena<T> arena(Scratch::task, D * stride, whole * stride, kComponents * stride, stride, stride, stride);
  T *const zt = arena.take(D * stride), *const delta = arena.take(whole * stride);
  T* const logits = arena.take(kComponents * stride);
  T *const maxima = arena.take(stride), *const sums = arena.take(stride), *const result = arena.take(stride);
  for (int64_t row = begin; row < end; row += stride) {
    const int64_t n = std::min(stride, end - row), padded = round_up(n, kGroup<T>);
    gmm_load_rows(p.rows, row, n, padded, D, zt, stride);
    std::fill_n(maxima, padded, -kInf<T>);
    std::fill_n(sums, padded, T(0));
    for (int64_t k = 0; k < K; k += kComponents) {
      const int64_t count = std::min(kComponents, K - k);
      for (int64_t c = 0; c < count; ++c) {
        gmm_full_delta(zt, p.mixture.means + (k + c) * D, D, padded, stride, delta);
        gmm_full_logits<T, false>(p.mixture, k + c, delta, stride, padded, delta, logits + c * stride);
      }
      gmm_fold(logits, stride, count, padded, maxima, sums);
      if (p.responsibilities) transpose(logits, stride, 1, p.responsibilities + row * K + k, K, count, n);
    }
    gmm_log_sum(maxima, sums, padded, result);
    std::copy_n(result, n, p.log_prob + row);
    if (p.responsibilities) gmm_normalise(p.responsibilities + row * K, result, n, K);
  }
}

// Of one task: the transposed points, their gradient and, of one component, δ and y; per row the incoming gradient and the
// shift of its logits, the logits or a of one component, or of all, and the rows that count.
template <class T>
struct GmmFullBlock {
  int64_t stride, n, padded;
  T *zt, *dzt, *delta, *white, *weighted, *grad, *shift, *coefs;
  int64_t* index;
  int64_t count;   // of the rows with a ≠ 0
  bool is_packed;  // they alone are left, in front
};

// Leaves out the rows with a = 0: packs the others in front, or, if these are most, makes δ and y zero.
template <class T, bool need_z>
static void gmm_full_select(GmmFullBlock<T>& b, T* coefs, int64_t D) {
  int count = 0;
  for (int64_t i = 0; i < b.n; ++i) count += coefs[i] != 0;
  b.count = count, b.is_packed = 2 * count <= b.n;
  if (count == 0 || count == b.n) return;
  for (int64_t i = 0, j = 0; j < count; j += coefs[i++] != 0) b.index[j] = i;
  const auto each = [&](T* values) {
    if (b.is_packed) {
      for (int64_t i = 0; i < b.count; ++i) values[i] = values[b.index[i]];
      std::fill(values + b.count, values + round_up(b.count, kGroup<T>), T(0));
    } else {
      for (int64_t i = 0; i < b.padded; i += kLanes<T>)
        store(values + i, load(coefs + i) == T(0) ? Vec<T>{} : load(values + i));
    }
  };
  for (int64_t d = 0; d < D; ++d) each(b.delta + d * b.stride);
  if (need_z)
    for (int64_t d = 0; d < D; ++d) each(b.white + d * b.stride);
  if (b.is_packed) each(coefs);
}

// weighted[kFullTile][stride] = a delta[kFullTile][stride] over `padded` rows, and its sums, in the order of sum_lanes.
template <class T>
static inline void gmm_full_weigh(const T* coefs, const T* delta, int64_t stride, int64_t padded, T* weighted, T* totals) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[kFullTile];
#pragma GCC unroll 4
  for (int r = 0; r < registers; ++r) {
    Vec<T> part[kFullTile] = {};
    for (int64_t n = r * kLanes<T>; n < padded; n += kGroup<T>) {
      const Vec<T> a = load(coefs + n);
#pragma GCC unroll 4
      for (int i = 0; i < kFullTile; ++i) {
        const Vec<T> w = a * load(delta + i * stride + n);
        store(weighted + i * stride + n, w);
        part[i] += w;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kFullTile; ++i) sums[i] = r ? sums[i] + part[i] : part[i];
  }
  sum_halves_of<T>(sums, totals);
}

// totals[kFullTile][kSecondTile] of weighted[kFullTile][stride] · delta[kSecondTile][stride], likewise.
template <class T>
static inline void gmm_full_second_tile(const T* weighted, const T* delta, int64_t stride, int64_t padded, T* totals) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[kFullTile * kSecondTile];
#pragma GCC unroll 4
  for (int r = 0; r < registers; ++r) {
    Vec<T> part[kFullTile * kSecondTile] = {};
    for (int64_t n = r * kLanes<T>; n < padded; n += kGroup<T>) {
      Vec<T> d[kSecondTile];
#pragma GCC unroll 4
      for (int j = 0; j < kSecondTile; ++j) d[j] = load(delta + j * stride + n);
#pragma GCC unroll 4
      for (int i = 0; i < kFullTile; ++i) {
        const Vec<T> w = load(weighted + i * stride + n);
#pragma GCC unroll 4
        for (int j = 0; j < kSecondTile; ++j) part[i * kSecondTile + j] += w * d[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kFullTile * kSecondTile; ++i) sums[i] = r ? sums[i] + part[i] : part[i];
  }
  sum_halves_of<T>(sums, totals);
}

// Adds the block's Σ a, Σ a δ and Σ a δ δᵀ to the moments of one component.
template <class T>
static void gmm_full_add_moments(const GmmFullBlock<T>& b, const T* coefs, int64_t D, int64_t padded, double* moments) {
  constexpr int tile = kFullTile * kSecondTile;
  const int64_t whole = round_up(D, kFullTile);
  T totals[std::max<int>(tile, kLanes<T>)];
  moments[0] += gmm_sum(coefs, padded);
  double *const first = moments + 1, *second = first + whole;
  for (int64_t i0 = 0; i0 < D; i0 += kFullTile) {
    gmm_full_weigh(coefs, b.delta + i0 * b.stride, b.stride, padded, b.weighted, totals);
    for (int i = 0; i < kFullTile; ++i) first[i0 + i] += totals[i];
    for (int64_t j0 = i0; j0 < whole; j0 += kSecondTile, second += tile) {
      gmm_full_second_tile(b.weighted, b.delta + j0 * b.stride, b.stride, padded, totals);
      for (int i = 0; i < tile; ++i) second[i] += totals[i];
    }
  }
}

// Rows [i, i + rows) of a P yᵀ, in place of those of y.
template <class T, int vectors, int rows>
static inline void gmm_full_pull_tile(T* white, int64_t stride, const T* coefs, const T* chol, int64_t D, int64_t i) {
  Vec<T> t[rows][vectors] = {};
  const T *at = white + i * stride, *entries = chol + i * D;
#pragma GCC unroll 4
  for (int j = 0; j < rows; ++j, at += stride)
#pragma GCC unroll 4
    for (int c = 0; c <= j; ++c) {
      const Vec<T> p = broadcast(entries[c * D + i + j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) t[c][v] += load(at + v * kLanes<T>) * p;
    }
  for (int64_t j = i + rows; j < D; ++j, at += stride) {
    Vec<T> y[vectors];
    for (int v = 0; v < vectors; ++v) y[v] = load(at + v * kLanes<T>);
#pragma GCC unroll 4
    for (int c = 0; c < rows; ++c) {
      const Vec<T> p = broadcast(entries[c * D + j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) t[c][v] += y[v] * p;
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < rows; ++c)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      store(white + (i + c) * stride + v * kLanes<T>, t[c][v] * load(coefs + v * kLanes<T>));
}

template <class T, int vectors>
static inline void gmm_full_pull(T* white, int64_t stride, const T* coefs, const T* chol, int64_t D) {
  for (int64_t i = 0; i < D; i += kFullTile)
    with_columns(D - i, [&](auto rows) {
      gmm_full_pull_tile<T, vectors, decltype(rows)::value>(white, stride, coefs, chol, D, i);
    });
}

// dzt[D][stride] −= a P yᵀ for the rows that count.
template <class T>
static void gmm_full_add_dz(const GmmFullBlock<T>& b, const T* coefs, const T* chol, int64_t D, int64_t padded) {
  constexpr int64_t wide = kRowTile * kLanes<T>;
  int64_t i = 0;
  for (; i + wide <= padded; i += wide) gmm_full_pull<T, kRowTile>(b.white + i, b.stride, coefs + i, chol, D);
  for (; i < padded; i += kLanes<T>) gmm_full_pull<T, 1>(b.white + i, b.stride, coefs + i, chol, D);
  for (int64_t d = 0; d < D; ++d) {
    T *const to = b.dzt + d * b.stride, *const from = b.white + d * b.stride;
    if (b.is_packed)
      for (int64_t j = 0; j < b.count; ++j) to[b.index[j]] -= from[j];
    else
      for (int64_t j = 0; j < padded; j += kLanes<T>) store(to + j, load(to + j) - load(from + j));
  }
}

// The log-density of the block's rows, with the logits of all components left in coefs.
template <class T>
static void gmm_full_value(const GmmFullBackward<T>& p, const GmmFullBlock<T>& b, int64_t row) {
  const int64_t K = p.mixture.K, D = p.mixture.D;
  for (int64_t k = 0; k < K; ++k) {
    gmm_full_delta(b.zt, p.mixture.means + k * D, D, b.padded, b.stride, b.delta);
    gmm_full_logits<T, false>(p.mixture, k, b.delta, b.stride, b.padded, b.delta, b.coefs + k * b.stride);
  }
  std::fill_n(b.grad, b.padded, -kInf<T>);
  std::fill_n(b.shift, b.padded, T(0));
  gmm_fold(b.coefs, b.stride, K, b.padded, b.grad, b.shift);
  gmm_log_sum(b.grad, b.shift, b.padded, b.shift);
  std::copy_n(b.shift, b.n, p.value + row);
}

template <class T, bool need_z>
static void gmm_full_backward_block(const GmmFullBackward<T>& p, GmmFullBlock<T>& b, int64_t row, int64_t k0, int64_t k1,
                                    double* moments) {
  const int64_t K = p.mixture.K, D = p.mixture.D;
  gmm_load_rows(p.rows, row, b.n, b.padded, D, b.zt, b.stride);
  if (p.value) gmm_full_value(p, b, row);
  const T* const log_prob = p.value ? p.value : p.log_prob;
  for (int64_t i = 0; i < b.padded; ++i) {  // the padding weighs nothing, whatever its logits
    const bool counts = i < b.n && log_prob[row + i] != -kInf<T>;
    b.grad[i] = !counts ? T(0) : p.grad ? p.grad[(row + i) * p.grad_stride] : T(1);
    b.shift[i] = counts ? log_prob[row + i] : kInf<T>;
  }
  if (need_z) std::fill_n(b.dzt, D * b.stride, T(0));
  for (int64_t k = k0; k < k1; ++k) {
    T* const coefs = b.coefs + (p.value ? k * b.stride : 0);
    gmm_full_delta(b.zt, p.mixture.means + k * D, D, b.padded, b.stride, b.delta);
    if (!p.value) gmm_full_logits<T, need_z>(p.mixture, k, b.delta, b.stride, b.padded, b.white, coefs);
    if (p.coef)
      for (int64_t i = 0; i < b.padded; ++i) coefs[i] = i < b.n ? p.coef[(row + i) * K + k] : T(0);
    else
      gmm_coefficients(coefs, b.stride, 1, b.padded, b.grad, b.shift);
    gmm_full_select<T, need_z>(b, coefs, D);
    if (b.count == 0) continue;
    const int64_t padded = b.is_packed ? round_up(b.count, kGroup<T>) : b.padded;
    if (p.moments) gmm_full_add_moments(b, coefs, D, padded, moments + (k - k0) * p.mixture.moments_size());
    if (need_z) gmm_full_add_dz(b, coefs, p.mixture.chol + k * D * D, D, padded);
  }
}

template <class T>
static void gmm_full_backward(const GmmFullBackward<T>& p, int64_t task) {
  const int64_t K = p.mixture.K, D = p.mixture.D, N = p.rows.N, split = task % p.grid.splits, chunk = task / p.grid.splits;
  const int64_t begin = chunk * p.grid.rows, end = std::min(N, begin + p.grid.rows), whole = round_up(D, kFullTile);
  const int64_t k0 = std::min(K, split * p.grid.components), k1 = std::min(K, k0 + p.grid.components);
  const int64_t held = p.value ? K : 1;
  const int64_t fitting = std::min(kFullCache / std::max<int64_t>(D, 1), kHeldLogits / std::max<int64_t>(held, 1));
  const int64_t most = std::min(kFullRows, std::max<int64_t>(fitting / 64 * 64, 64));
  const int64_t blocks = (end - begin + most - 1) / most;
  const int64_t block_rows = round_up((end - begin + blocks - 1) / blocks, kGroup<T>);
  // At a stride of a power of two the columns would share a few cache sets.
  const int64_t stride = block_rows + kGroup<T>, dz_size = p.dz ? D * stride : 0;
  const int64_t index_size = stride * sizeof(int64_t) / sizeof(T);
  Arena<T> arena(Scratch::task, D * stride, dz_size, whole * stride, dz_size, kFullTile * stride, stride, stride,
                 held * stride, index_size);
  GmmFullBlock<T> block{stride};
  block.zt = arena.take(D * stride), block.dzt = arena.take(dz_size), block.delta = arena.take(whole * stride);
  block.white = arena.take(dz_size), block.weighted = arena.take(kFullTile * stride);
  block.grad = arena.take(stride), block.shift = arena.take(stride), block.coefs = arena.take(held * stride);
  block.index = reinterpret_cast<int64_t*>(arena.take(index_size));
  double* const moments = p.moments ? p.moments + (chunk * K + k0) * p.mixture.moments_size() : nullptr;
  if (moments) std::fill_n(moments, (k1 - k0) * p.mixture.moments_size(), 0.0);
  for (int64_t row = begin; row < end; row += block_rows) {
    block.n = std::min(block_rows, end - row), block.padded = round_up(block.n, kGroup<T>);
    (p.dz ? gmm_full_backward_block<T, true> : gmm_full_backward_block<T, false>)(p, block, row, k0, k1, moments);
    T* const to = split ? p.dz_parts + (split - 1) * N * D : p.dz;
    if (p.dz) transpose(block.dzt, stride, 1, to + row * D, D, D, block.n);
  }
}

template <class T>
static void gmm_full_merge_rows(const GmmFullBackward<T>& p, int64_t first, int64_t last) {
  const int64_t size = p.rows.N * p.mixture.D;
  for (int64_t s = 0; s + 1 < p.grid.splits; ++s)
    for (int64_t i = first; i < last; ++i) p.dz[i] += p.dz_parts[s * size + i];
}

template <class T>
static void gmm_full_merge_moments(const GmmFullBackward<T>& p, int64_t begin, int64_t end) {
  const int64_t K = p.mixture.K, D = p.mixture.D, size = p.mixture.moments_size(), whole = round_up(D, kFullTile);
  for (int64_t k = begin; k < end; ++k) {
    double* const total = p.moments + k * size;
    if (p.grid.chunks == 0) std::fill_n(total, size, 0.0);
    for (int64_t chunk = 1; chunk < p.grid.chunks; ++chunk)
      for (int64_t i = 0; i < size; ++i) total[i] += p.moments[(chunk * K + k) * size + i];
    p.weight[k] = total[0];
    std::copy_n(total + 1, D, p.first + k * D);
    double *const second = p.second + k * D * D, *tile = total + 1 + whole;
    for (int64_t i0 = 0; i0 < D; i0 += kFullTile)
      for (int64_t j0 = i0; j0 < whole; j0 += kSecondTile)
        for (int64_t i = i0; i < i0 + kFullTile; ++i)
          for (int64_t j = j0; j < j0 + kSecondTile; ++j, ++tile)
            if (i <= j && j < D) second[i * D + j] = second[j * D + i] = *tile;
  }
}

template <class T>
static constexpr GmmFullKernels<T> gmm_full_kernels() {
  return {gmm_full_prepare<T>, gmm_full_forward<T>, gmm_full_backward<T>, gmm_full_merge_rows<T>, gmm_full_merge_moments<T>};
}
