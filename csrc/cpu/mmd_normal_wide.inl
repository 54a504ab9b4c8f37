// Wide nodes: all see the variances and distances of a pair only through the moments Σ_d u^k and Σ_d δ² u^k, which cost three
// operations a power and dimension, as much as three quarters of a node otherwise.

// Adds to the moments of order [first, first + terms) those of dimensions [d, d + n), side by side.
template <class T, int first, int terms, int n>
static LATENT_INLINE void mmd_add_moments(const WideNodes<T>& wide, MmdRow<T> row, const T* x, const T* v, int64_t stride,
                                          int64_t d, Vec<T> (&plain)[terms], Vec<T> (&squared)[terms]) {
  using P = Pack<T, n>;
  P delta, s;
  for (int j = 0; j < n; ++j) {
    delta.v[j] = load(x + (d + j) * stride) - row.x[(d + j) * row.stride];
    s.v[j] = load(v + (d + j) * stride) + row.v[(d + j) * row.stride];
  }
  const P square = delta * delta, u = s * wide.scale - wide.center, u2 = u * u, u3 = u2 * u, u4 = u2 * u2;
  const P low[4] = {P(T(1)), u, u2, u3};
#pragma GCC unroll 8
  for (int k = first; k < first + terms; ++k) {
    const P power = k < 4 ? low[k] : k == 4 ? u4 : u4 * low[k - 4];
#pragma GCC unroll 2
    for (int j = 0; j < n; ++j) {
      if (k) plain[k - first] += power.v[j];
      squared[k - first] += k ? square.v[j] * power.v[j] : square.v[j];
    }
  }
}

// `plain` and `squared` become the moments of one row and kLanes columns for k in [first, first + terms).
template <class T, int first, int terms>
static inline void mmd_moments(const WideNodes<T>& wide, MmdRow<T> row, const T* x, const T* v, int64_t stride, int64_t D,
                               Vec<T>* plain, Vec<T>* squared) {
  Vec<T> sums[terms] = {}, square_sums[terms] = {};
  int64_t d = 0;
  for (; d + 2 <= D; d += 2) mmd_add_moments<T, first, terms, 2>(wide, row, x, v, stride, d, sums, square_sums);
  if (d < D) mmd_add_moments<T, first, terms, 1>(wide, row, x, v, stride, d, sums, square_sums);
#pragma GCC unroll 8
  for (int k = 0; k < terms; ++k) plain[first + k] = sums[k], squared[first + k] = square_sums[k];
}

// out[node][kPosteriorColumns] = log E exp(−a |δ|²) of one row and kLanes columns, for n nodes from `node`, side by side.
template <class T, int n>
static LATENT_INLINE void mmd_wide_exponents(const WideNodes<T>& wide, int64_t node, const Vec<T>* plain, const Vec<T>* squared,
                                             T* out) {
  constexpr int terms = WideNodes<T>::kTerms;
  const auto coefficients = [&](const T* polynomials, int k) {
    Pack<T, n> result;
    for (int j = 0; j < n; ++j) result.v[j] = broadcast(polynomials[(node + j) * terms + k]);
    return result;
  };
  const auto times = [&](Vec<T> moment, const Pack<T, n>& c) {
    return Pack<T, n>::each([=](Vec<T> x) { return moment * x; }, c);
  };
  // From 0: of a sum of two products either may become an FMA, which the levels would choose differently.
  Pack<T, n> log_det = coefficients(wide.log_t, 0), distance(T(0));
#pragma GCC unroll 8
  for (int k = 0; k < terms; ++k) {
    if (k) log_det = log_det + times(plain[k], coefficients(wide.log_t, k));
    distance = distance + times(squared[k], coefficients(wide.inverse, k));
  }
  const Pack<T, n> exponent = T(-0.5) * (log_det + distance);
  for (int j = 0; j < n; ++j) store(out + (node + j) * kPosteriorColumns, exponent.v[j]);
}

// The same for every wide node.
template <class T>
static inline void mmd_wide_exponents(const WideNodes<T>& wide, MmdRow<T> row, const T* x, const T* v, int64_t stride, int64_t D,
                                      T* out) {
  constexpr int terms = WideNodes<T>::kTerms, at_once = LATENT_VECTOR_BYTES == 64 ? 8 : 4;  // 16 registers hold four of each
  Vec<T> plain[terms], squared[terms];
  mmd_moments<T, 0, at_once>(wide, row, x, v, stride, D, plain, squared);
  if (at_once < terms) mmd_moments<T, terms - at_once, at_once>(wide, row, x, v, stride, D, plain, squared);
  const auto far = squared[0] == kInf<T>;  // higher moments would make inf − inf
#pragma GCC unroll 8
  for (int k = 1; k < terms; ++k) squared[k] = far ? Vec<T>{} : squared[k];
  int64_t q = 0;
  for (; q + 4 <= wide.count; q += 4) mmd_wide_exponents<T, 4>(wide, q, plain, squared, out);
  for (; q < wide.count; ++q) mmd_wide_exponents<T, 1>(wide, q, plain, squared, out);
}
