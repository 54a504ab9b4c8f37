// The deviation of the total KL from Gram matrices. With the features a = (v + m², m), b = (w, −2 m w), r = −Σ log v and
// c = Σ (log v + m² w) − D, X_ij = 2 KL(i‖j) = a_i · b_j + r_i + c_j splits into orthogonal parts: its mean κ over all N²
// pairs, ρ_i and γ_j of rows and columns, and ã_i · b̃_j of the centred features. X is 0 on the diagonal and T = κ N / (N − 1)
// in the mean of the pairs, so
//
//     Σ_{i≠j} (X_ij − T)² = N Σ ρ² + N Σ γ² + ⟨Σ ã ãᵀ, Σ b̃ b̃ᵀ⟩ − N² κ² / (N − 1)
//
// Only the last term, (N − 1) T², cancels, and where N ≥ 4 D + 8 it is at most 2/3 of the others: the deviations are X − T
// plus T on the diagonal, the first of rank 2 D + 3 at most, so their squares sum to T² (N − 2 D − 3) or more.

constexpr int64_t kGramDepth = 128;  // rows whose features stay near while both matrices take them
constexpr int64_t kGramPanel = 24;   // columns that stay in the L1 cache while all rows of a matrix take them

// out[rows][vectors] = Σ_k left[k·left_k + t·left_t] right[k][…], or plus what is there.
template <int rows, int vectors>
static inline void product_tile(const double* left, int64_t left_k, int64_t left_t, const double* right, int64_t right_stride,
                                int64_t depth, bool add, double* out, int64_t out_stride) {
  Vec<double> sums[rows][vectors];  // in registers: where one of the loops over it is rolled, GCC zeroes it in memory
#pragma GCC unroll 8
  for (int t = 0; t < rows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[t][v] = Vec<double>{};
  for (int64_t k = 0; k < depth; ++k, left += left_k, right += right_stride) {
    Vec<double> row[vectors];
    for (int v = 0; v < vectors; ++v) row[v] = load(right + v * kLanes<double>);
#pragma GCC unroll 8
    for (int t = 0; t < rows; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[t][v] += broadcast(left[t * left_t]) * row[v];
  }
#pragma GCC unroll 8
  for (int t = 0; t < rows; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      double* const at = out + t * out_stride + v * kLanes<double>;
      store(at, add ? load(at) + sums[t][v] : sums[t][v]);
    }
}

// The same for kGramTile rows and `width` columns, a multiple of the vector. Eight sums keep two pipes of FMAs busy.
static void product_rows(const double* left, int64_t left_k, int64_t left_t, const double* right, int64_t right_stride,
                         int64_t depth, bool add, double* out, int64_t out_stride, int64_t width) {
  constexpr int rows = LATENT_VECTOR_BYTES == 64 ? 8 : 4, most = LATENT_VECTOR_BYTES == 64 ? 3 : 2;
  for (int64_t t = 0; t < kGramTile; t += rows)
    in_tiles<most>(width / kLanes<double>, [&](auto vectors, int64_t v) {
      const int64_t q = v * kLanes<double>;
      product_tile<rows, vectors()>(left + t * left_t, left_k, left_t, right + q, right_stride, depth, add,
                                    out + t * out_stride + q, out_stride);
    });
}

// f(first, last) over panels of `width` columns, whole tiles of which none is much narrower than the others.
template <class F>
static inline void in_panels(int64_t width, const F& f) {
  const int64_t tiles = width / kGramTile, panels = (width + kGramPanel - 1) / kGramPanel;
  for (int64_t k = 0; k < panels; ++k) f(k * tiles / panels * kGramTile, (k + 1) * tiles / panels * kGramTile);
}

// gram[width][stride] = Σ_n x[n·stride + k] x[n·stride + q], or plus what is there, from the tile on the diagonal on.
static void gram_matrix(const double* x, int64_t depth, bool add, double* gram, int64_t width, int64_t stride) {
  in_panels(width, [&](int64_t first, int64_t last) {
    for (int64_t k = 0; k < last; k += kGramTile) {
      const int64_t q = std::max(first, k);
      product_rows(x + k, stride, 1, x + q, stride, depth, add, gram + k * stride + q, stride, last - q);
    }
  });
}

// out[rows][stride] = x[rows][stride] gram[width][stride], whole tiles of rows.
static void gram_times(const double* x, int64_t rows, const double* gram, double* out, int64_t width, int64_t stride) {
  in_panels(width, [&](int64_t first, int64_t last) {
    for (int64_t t = 0; t < rows; t += kGramTile)
      product_rows(x + t * stride, 1, stride, gram + first, stride, width, false, out + t * stride + first, stride,
                   last - first);
  });
}

static inline double gram_dot(const double* x, const double* y, int64_t width) {
  return sum_groups<double>(width, [&](int64_t k) { return load(x + k) * load(y + k); });
}

static inline int64_t gram_group(int64_t k) { return k / kGramTile * kGramTile; }

// The means of the features, and of the row and column terms, from sums about the centre; κ.
template <class T>
static double gram_means(PairwiseKlGram<T>& p, const double* sums) {
  const int64_t N = p.batch.N, D = p.batch.D;
  double level = 0, square = 0;
  std::fill(p.a_mean + 2 * D, p.a_mean + p.width, 0.0);
  std::fill(p.b_mean + 2 * D, p.b_mean + p.width, 0.0);
  for (int64_t d = 0; d < D; ++d) {
    const auto mean = [&](MomentSum s) { return sums[s * D + d] / N; };
    p.a_mean[d] = mean(of_v) + mean(of_m2), p.a_mean[D + d] = mean(of_m);
    p.b_mean[d] = mean(of_w), p.b_mean[D + d] = -2 * mean(of_mw);
    p.level[d] = p.batch.log_var[d * p.batch.log_var_strides[1]];
    level += mean(of_level), square += mean(of_m2w);
  }
  p.r_mean = -level, p.c_mean = level + square;
  return gram_dot(p.a_mean, p.b_mean, p.width) + (square - D);
}

// The centred features of row n; ρ and γ.
template <class T>
static void gram_features(const PairwiseKlGram<T>& p, int64_t n, double* a, double* b, double& row_term, double& column_term) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  const int64_t D = p.batch.D;
  CentredRow<T> row;
  Vec<double> rho[registers] = {}, gamma[registers] = {};
  for (int64_t d0 = 0; d0 < D; d0 += kMomentColumns) {
    const int64_t count = std::min(kMomentColumns, D - d0);
    row.read(p.batch, n, d0, count, p.centre + d0);
    for (int64_t k = 0; k < count; k += kLanes<double>) {
      const int64_t d = d0 + k, left = count - k;
      const auto mean = [&](const double* means) { return load_lanes(means + d, left); };
      const Vec<double> m = load_as<double>(row.mu + k), v = load_as<double>(row.var + k), w = load_as<double>(row.inverse + k);
      const Vec<double> a1_mean = mean(p.a_mean), a2_mean = mean(p.a_mean + D);
      const Vec<double> b1_mean = mean(p.b_mean), b2_mean = mean(p.b_mean + D);
      const Vec<double> a1 = v + m * m - a1_mean, a2 = m - a2_mean, b1 = w - b1_mean, b2 = -2 * m * w - b2_mean;
      store_lanes(a + d, left, a1), store_lanes(a + D + d, left, a2);
      store_lanes(b + d, left, b1), store_lanes(b + D + d, left, b2);
      const Vec<double> level = load_as<double>(row.log_var + k) - mean(p.level);
      const int r = k / kLanes<double> % registers;
      rho[r] += a1 * b1_mean + a2 * b2_mean - level, gamma[r] += a1_mean * b1 + a2_mean * b2 + (level + m * m * w);
    }
  }
  std::fill(a + 2 * D, a + p.width, 0.0);
  std::fill(b + 2 * D, b + p.width, 0.0);
  row_term = sum_lanes<double>(rho) - p.r_mean;
  column_term = sum_lanes<double>(gamma) - p.c_mean;
}

// The sums over a part of the rows: of both Gram matrices from the diagonal group of each row on, of ρ² + γ², and for
// gradients of the features with ρ and γ as weights.
template <class T>
static void gram_part(const PairwiseKlGram<T>& p, int64_t part) {
  const int64_t width = p.width, stride = p.stride, end = std::min(p.batch.N, (part + 1) * p.rows);
  const GramSums sums(p, part);
  std::fill(sums.row_a, sums.squares + 1, 0.0);
  Arena<double> arena(Scratch::task, kGramDepth * stride, kGramDepth * stride, kGramDepth, kGramDepth);
  double *const a = arena.take(kGramDepth * stride), *const b = arena.take(kGramDepth * stride);
  double *const row = arena.take(kGramDepth), *const column = arena.take(kGramDepth);
  for (int64_t n0 = part * p.rows; n0 < end; n0 += kGramDepth) {
    const int64_t depth = std::min(kGramDepth, end - n0);
    for (int64_t n = 0; n < depth; ++n) gram_features(p, n0 + n, a + n * stride, b + n * stride, row[n], column[n]);
    const bool add = n0 > part * p.rows;
    gram_matrix(a, depth, add, sums.gram_a, width, stride);
    gram_matrix(b, depth, add, sums.gram_b, width, stride);
    for (int64_t n = 0; n < depth; ++n) *sums.squares += row[n] * row[n] + column[n] * column[n];
    for (int64_t n = 0; n < (p.need_gradients ? depth : 0); ++n)
      for (int64_t k = 0, at = n * stride; k < width; ++k, ++at)
        sums.row_a[k] += row[n] * a[at], sums.column_b[k] += column[n] * b[at];
  }
}

// Rows [first, last) of the sums over all parts, which take the place of the first part's; their part of the inner product of
// the Gram matrices. For gradients these are mirrored below the diagonal.
template <class T>
static void gram_sums(const PairwiseKlGram<T>& p, int64_t first, int64_t last) {
  const int64_t width = p.width, stride = p.stride;
  const GramSums all(p, 0);
  for (int64_t part = 1; part < p.parts; ++part) {
    const GramSums sums(p, part);
    for (int64_t k = first; k < last; ++k) {
      all.row_a[k] += sums.row_a[k], all.column_b[k] += sums.column_b[k];
      for (int64_t i = k * stride + gram_group(k); i < k * stride + width; ++i)
        all.gram_a[i] += sums.gram_a[i], all.gram_b[i] += sums.gram_b[i];
    }
  }
  for (int64_t k = first; k < last; ++k) {
    const int64_t group = gram_group(k), after = group + kGramTile;
    const double *const a = all.gram_a + k * stride, *const b = all.gram_b + k * stride;
    p.inner[k] = gram_dot(a + group, b + group, kGramTile) + 2 * gram_dot(a + after, b + after, width - after);
  }
  for (double* const gram : {all.gram_a, all.gram_b})
    for (int64_t q = p.need_gradients ? gram_group(first) : width; q < width; ++q)
      for (int64_t k = first; k < std::min(last, gram_group(q)); ++k) gram[q * stride + k] = gram[k * stride + q];
}

// Σ (X_ij − T)² over the pairs, of which `mean` is κ.
template <class T>
static double gram_total(const PairwiseKlGram<T>& p, double mean) {
  const int64_t N = p.batch.N;
  const double inner = sum_groups<double>(p.width, [&](int64_t k) { return load(p.inner + k); });
  double squares = 0;
  for (int64_t part = 0; part < p.parts; ++part) squares += *GramSums(p, part).squares;
  return std::max(inner + N * (squares - mean * mean * N / (N - 1)), 0.0);
}

// Gradients of rows [kGramBlock first, kGramBlock last) from H_ij = X_ij − T, whose mean over all pairs is p.mean:
//     Σ_j H_ij b_j = N (mean + ρ_i) b̄ + Σ_j γ_j b̃_j + (Σ b̃ b̃ᵀ) ã_i, and likewise Σ_i H_ij a_i.
template <class T>
static void gram_gradient(const PairwiseKlGram<T>& p, int64_t first, int64_t last) {
  const int64_t N = p.batch.N, D = p.batch.D, width = p.width, stride = p.stride;
  const GramSums sums(p, 0);
  const int64_t size = kGramBlock * stride;
  Arena<double> arena(Scratch::task, size, size, size, size);
  double *const features_a = arena.take(size), *const features_b = arena.take(size);
  double *const by_a = arena.take(size), *const by_b = arena.take(size);
  double row_terms[kGramBlock], column_terms[kGramBlock];
  CentredRow<T> row;
  for (int64_t n0 = kGramBlock * first; n0 < std::min(N, kGramBlock * last); n0 += kGramBlock) {
    const int64_t rows = std::min(N - n0, kGramBlock), padded = round_up(rows, kGramTile);
    for (int64_t t = 0; t < padded; ++t)  // a short tile repeats its last row
      gram_features(p, n0 + std::min(t, rows - 1), features_a + t * stride, features_b + t * stride, row_terms[t],
                    column_terms[t]);
    gram_times(features_a, padded, sums.gram_b, by_a, width, stride);
    gram_times(features_b, padded, sums.gram_a, by_b, width, stride);
    for (int64_t t = 0; t < rows; ++t) {
      const int64_t n = n0 + t;
      const double of_r = N * (p.mean + row_terms[t]), of_c = N * (p.mean + column_terms[t]);
      double *const a = by_a + t * stride, *const b = by_b + t * stride;
      for (int64_t k = 0; k < width; ++k) {
        a[k] += of_r * p.b_mean[k] + sums.column_b[k];
        b[k] += of_c * p.a_mean[k] + sums.row_a[k];
      }
      for (int64_t d = 0; d < D; d += kMomentColumns) {
        const int64_t count = std::min(kMomentColumns, D - d);
        row.read(p.batch, n, d, count, p.centre + d);
        for (int64_t k = 0; k < count; ++k) {
          const double m = row.mu[k], v = row.var[k], w = row.inverse[k], square = a[d + k], mixed = b[D + d + k];
          const double dm = 2 * m * square + a[D + d + k] + 2 * w * (m * of_c - mixed);
          const double dlog_var = v * square - w * (b[d + k] - 2 * m * mixed) - of_r + of_c * (1 - m * m * w);
          p.dmu[n * D + d + k] = T(p.unit * dm);
          p.dlog_var[n * D + d + k] = T(p.unit * dlog_var);
        }
      }
    }
  }
}

template <class T>
static constexpr PairwiseKlKernels<T> pairwise_kl_kernels() {
  return {pair_columns<T>,
          pair_collect<T>,
          pairwise_kl_halves<T>,
          pairwise_kl_diversity<T>,
          pairwise_kl_lines_diversity<T>,
          pair_lines_collect<T>,
          pairwise_kl_moments<T>,
          pairwise_kl_mean<T>,
          pairwise_kl_mean_gradient<T>,
          pair_pack<T>,
          pair_means<T>,
          pair_totals<T>,
          pair_divergences<T>,
          pair_deviations<T>,
          pair_direct_gradient<T>,
          gram_means<T>,
          gram_part<T>,
          gram_sums<T>,
          gram_total<T>,
          gram_gradient<T>};
}
