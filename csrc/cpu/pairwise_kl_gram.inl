// The deviation of the total KL from Gram matrices. With the features a = (v + m², m), b = (w, −2 m w), r = −Σ log v and
// c = Σ (log v + m² w) − D, X_ij = 2 KL(i‖j) = a_i · b_j + r_i + c_j splits into orthogonal parts: its mean κ over all N²
// pairs, ρ_i and γ_j of rows and columns, and ã_i · b̃_j of the centred features. X is 0 on the diagonal and T = κ N / (N − 1)
// in the mean of the pairs, so
//
//     Σ_{i≠j} (X_ij − T)² = N Σ ρ² + N Σ γ² + ⟨Σ ã ãᵀ, Σ b̃ b̃ᵀ⟩ − N² κ² / (N − 1)
//
// Only the last term, (N − 1) T², cancels, and where N ≥ 4 D + 8 it is at most 2/3 of the others: the deviations are X − T
// plus T on the diagonal, the first of rank 2 D + 3 at most, so their squares sum to T² (N − 2 D − 3) or more.

constexpr int64_t kProductDepth = 256;  // rows of the right factor that stay in the L2 cache

// out[4][vectors] += Σ_k left[k·left_k + t·left_t] right[k][…].
template <int vectors>
static inline void product_tile(const double* left, int64_t left_k, int64_t left_t, const double* right, int64_t right_stride,
                                int64_t depth, double* out, int64_t out_stride) {
  Vec<double> sums[4][vectors] = {};
  for (int64_t k = 0; k < depth; ++k, left += left_k, right += right_stride) {
    Vec<double> row[vectors];
    for (int v = 0; v < vectors; ++v) row[v] = load(right + v * kLanes<double>);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[t][v] += broadcast(left[t * left_t]) * row[v];
  }
  for (int t = 0; t < 4; ++t)
    for (int v = 0; v < vectors; ++v) {
      double* const at = out + t * out_stride + v * kLanes<double>;
      store(at, load(at) + sums[t][v]);
    }
}

// The same for `width` columns, a multiple of the vector.
static void product_rows(const double* left, int64_t left_k, int64_t left_t, const double* right, int64_t right_stride,
                         int64_t depth, double* out, int64_t out_stride, int64_t width) {
  constexpr int vectors = LATENT_VECTOR_BYTES == 64 ? 4 : 2;
  int64_t q = 0;
  for (; q + vectors * kLanes<double> <= width; q += vectors * kLanes<double>)
    product_tile<vectors>(left, left_k, left_t, right + q, right_stride, depth, out + q, out_stride);
  for (; q < width; q += kLanes<double>)
    product_tile<1>(left, left_k, left_t, right + q, right_stride, depth, out + q, out_stride);
}

template <class T>
static void gram_features(const PairwiseKlGram<T>& p, int64_t first, int64_t last) {
  const int64_t D = p.batch.D;
  CentredRow<T> row;
  for (int64_t n = first; n < last; ++n) {
    std::fill_n(p.a + n * p.width + 2 * D, p.width - 2 * D, 0.0);
    std::fill_n(p.b + n * p.width + 2 * D, p.width - 2 * D, 0.0);
    p.r[n] = 0, p.c[n] = -double(D);
  }
  for (int64_t d = 0; d < D; d += kMomentColumns) {
    const int64_t count = std::min(kMomentColumns, D - d);
    for (int64_t n = first; n < last; ++n) {
      row.read(p.batch, n, d, count, p.centre + d);
      double *const a = p.a + n * p.width + d, *const b = p.b + n * p.width + d;
      double r = 0, c = 0;
      for (int64_t k = 0; k < count; ++k) {
        const double m = row.mu[k], v = row.var[k], w = row.inverse[k];
        a[k] = v + m * m, a[D + k] = m;
        b[k] = w, b[D + k] = -2 * m * w;
        const double level = row.log_var[k] - p.batch.log_var[(d + k) * p.batch.log_var_strides[1]];  // against the first row's
        r -= level, c += level + m * m * w;
      }
      p.r[n] += r, p.c[n] += c;
    }
  }
}

// out = Σ_n weights_n x_n over columns [first, last) of x[rows][width]; null weights are 1 / rows.
static void gram_columns(const double* x, const double* weights, int64_t rows, int64_t width, double* out, int64_t first,
                         int64_t last) {
  std::fill(out + first, out + last, 0.0);
  for (int64_t n = 0; n < rows; ++n) {
    const double weight = weights ? weights[n] : 1.0 / rows;
    for (int64_t k = first; k < last; ++k) out[k] += weight * x[n * width + k];
  }
}

static inline double gram_dot(const double* x, const double* y, int64_t width) {
  return sum_groups<double>(width, [&](int64_t k) { return load(x + k) * load(y + k); });
}

// κ from the means, of which `r` and `c` are those of the row and column terms.
template <class T>
static double gram_total(const PairwiseKlGram<T>& p, double r, double c) {
  return gram_dot(p.a_mean, p.b_mean, p.width) + r + c;
}

// Centres rows [first, last) of the features; ρ and γ.
template <class T>
static void gram_centre(const PairwiseKlGram<T>& p, double r_mean, double c_mean, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    double *const a = p.a + n * p.width, *const b = p.b + n * p.width;
    for (int64_t k = 0; k < p.width; ++k) a[k] -= p.a_mean[k], b[k] -= p.b_mean[k];
    p.row[n] = gram_dot(a, p.b_mean, p.width) + (p.r[n] - r_mean);
    p.column[n] = gram_dot(p.a_mean, b, p.width) + (p.c[n] - c_mean);
  }
}

// Rows [4 first, 4 last) of both Gram matrices, from the diagonal on.
template <class T>
static void gram_products(const PairwiseKlGram<T>& p, int64_t first, int64_t last) {
  for (const auto& [x, gram] : {std::pair{p.a, p.gram_a}, {p.b, p.gram_b}}) {
    std::fill(gram + 4 * first * p.width, gram + 4 * last * p.width, 0.0);
    for (int64_t n = 0; n < p.batch.N; n += kProductDepth)
      for (int64_t k = 4 * first; k < 4 * last; k += 4) {
        const double* const left = x + n * p.width + k;
        const int64_t q = k / kGroup<double> * kGroup<double>;
        product_rows(left, p.width, 1, x + n * p.width + q, p.width, std::min(kProductDepth, p.batch.N - n),
                     gram + k * p.width + q, p.width, p.width - q);
      }
  }
}

// The lower halves of the Gram matrices, and their inner product.
template <class T>
static double gram_merge(const PairwiseKlGram<T>& p) {
  double total = 0;
  for (int64_t k = 0; k < p.width; ++k) {
    for (int64_t q = 0; q < k; ++q) {
      p.gram_a[k * p.width + q] = p.gram_a[q * p.width + k];
      p.gram_b[k * p.width + q] = p.gram_b[q * p.width + k];
    }
    total += gram_dot(p.gram_a + k * p.width, p.gram_b + k * p.width, p.width);
  }
  return total;
}

// Gradients of rows [4 first, 4 last) from H_ij = X_ij − T, whose mean over all pairs is p.mean:
//     Σ_j H_ij b_j = N (mean + ρ_i) b̄ + Σ_j γ_j b̃_j + (Σ b̃ b̃ᵀ) ã_i, and likewise Σ_i H_ij a_i.
template <class T>
static void gram_gradient(const PairwiseKlGram<T>& p, int64_t first, int64_t last) {
  const int64_t N = p.batch.N, D = p.batch.D, width = p.width;
  Arena<double> arena(Scratch::task, 4 * width, 4 * width);
  double *const by_a = arena.take(4 * width), *const by_b = arena.take(4 * width);
  CentredRow<T> row;
  for (int64_t n0 = 4 * first; n0 < std::min(N, 4 * last); n0 += 4) {
    std::fill_n(by_a, 4 * width, 0.0);
    std::fill_n(by_b, 4 * width, 0.0);
    product_rows(p.a + n0 * width, 1, width, p.gram_b, width, width, by_a, width, width);
    product_rows(p.b + n0 * width, 1, width, p.gram_a, width, width, by_b, width, width);
    for (int64_t n = n0; n < std::min(N, n0 + 4); ++n) {
      const double of_r = N * (p.mean + p.row[n]), of_c = N * (p.mean + p.column[n]);
      double *const a = by_a + (n - n0) * width, *const b = by_b + (n - n0) * width;
      for (int64_t k = 0; k < width; ++k) {
        a[k] += of_r * p.b_mean[k] + p.column_b[k];
        b[k] += of_c * p.a_mean[k] + p.row_a[k];
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
          pairwise_kl_mean<T>,
          pairwise_kl_mean_gradient<T>,
          pair_means<T>,
          pair_log_dets<T>,
          pair_totals<T>,
          pair_deviations<T>,
          pair_turn<T>,
          pair_direct_gradient<T>,
          gram_features<T>,
          gram_columns,
          gram_total<T>,
          gram_centre<T>,
          gram_products<T>,
          gram_merge<T>,
          gram_gradient<T>};
}
