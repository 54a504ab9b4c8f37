// Wide nodes: all see the variances and distances of a pair only through the moments Σ_d u^k and Σ_d δ² u^k, which cost three
// operations a power and dimension, as much as three quarters of a node otherwise.

// `plain` and `squared` become the moments of one row and kLanes columns for k in [first, first + terms); `plain` has no k = 0.
template <class T, int first, int terms>
static inline void mmd_moments(const WideNodes<T>& wide, MmdRow<T> row, const T* x, const T* v, int64_t stride, int64_t D,
                               Vec<T>* plain, Vec<T>* squared) {
  constexpr int start = first == 0 ? 1 : first;
  static_assert(start == 1 || start == 4);
  Vec<T> sums[terms] = {}, square_sums[terms] = {};
  for (int64_t d = 0; d < D; ++d) {
    const Vec<T> delta = load(x + d * stride) - row.x[d * row.stride], square = delta * delta;
    const Vec<T> u = (load(v + d * stride) + row.v[d * row.stride]) * wide.scale - wide.center, u2 = u * u;
    Vec<T> power = start == 4 ? u2 * u2 : u;
    if (first == 0) square_sums[0] += square;
#pragma GCC unroll 8
    for (int k = start; k < first + terms; ++k) {
      sums[k - first] += power, square_sums[k - first] += square * power;
      power = k == 3 ? u2 * u2 : power * u;  // the same product wherever the powers begin
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < terms; ++k) plain[first + k] = sums[k], squared[first + k] = square_sums[k];
}

// out[node][kPosteriorColumns] = w E exp(−a |δ|²) of one row and kLanes columns, for every wide node.
template <class T>
static inline void mmd_wide_expectations(const WideNodes<T>& wide, MmdRow<T> row, const T* x, const T* v, int64_t stride,
                                         int64_t D, T* out) {
  constexpr int terms = WideNodes<T>::kTerms, at_once = LATENT_VECTOR_BYTES == 64 ? 8 : 4;  // 16 registers hold four of each
  Vec<T> plain[terms], squared[terms];
  mmd_moments<T, 0, at_once>(wide, row, x, v, stride, D, plain, squared);
  if (at_once < terms) mmd_moments<T, terms - at_once, at_once>(wide, row, x, v, stride, D, plain, squared);
  const auto far = squared[0] == kInf<T>;  // higher moments would make inf − inf
#pragma GCC unroll 8
  for (int k = 1; k < terms; ++k) squared[k] = far ? Vec<T>{} : squared[k];
  for (int64_t q = 0; q < wide.count; ++q) {
    const T *const log_t = wide.log_t + q * terms, *const inverse = wide.inverse + q * terms;
    Vec<T> log_det = broadcast(log_t[0]), distance = squared[0] * inverse[0];
#pragma GCC unroll 8
    for (int k = 1; k < terms; ++k) log_det += plain[k] * log_t[k], distance += squared[k] * inverse[k];
    store(out + q * kPosteriorColumns, wide.weights[q] * exp<T>(T(-0.5) * (log_det + distance)));
  }
}

// Polynomials in u of Σ e / t and Σ e / t² over the wide nodes, for each of n columns.
template <class T>
struct WideSums {
  static constexpr int kTerms = WideNodes<T>::kTerms;
  T first[kTerms][kPosteriorColumns], second[kTerms][kPosteriorColumns];

  WideSums(const WideNodes<T>& wide, const T* e, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      sum(wide.inverse, wide.count, e + i, &first[0][i]);
      sum(wide.inverse_square, wide.count, e + i, &second[0][i]);
    }
  }

  static void sum(const T* polynomials, int64_t count, const T* e, T* out) {
    Vec<T> sums[kTerms] = {};
    for (int64_t q = 0; q < count; ++q) {
      const Vec<T> value = load(e + q * kPosteriorColumns);
#pragma GCC unroll 8
      for (int k = 0; k < kTerms; ++k) sums[k] += value * polynomials[q * kTerms + k];
    }
#pragma GCC unroll 8
    for (int k = 0; k < kTerms; ++k) store(out + k * kPosteriorColumns, sums[k]);
  }

  static Vec<T> at(const T (&polynomial)[kTerms][kPosteriorColumns], int64_t i, Vec<T> u) {
    Vec<T> p = load(&polynomial[kTerms - 1][i]);
#pragma GCC unroll 8
    for (int k = kTerms - 2; k >= 0; --k) p = p * u + load(&polynomial[k][i]);
    return p;
  }
};
