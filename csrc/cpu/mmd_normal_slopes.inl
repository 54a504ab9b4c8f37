// The gradients of the pairs of a row. They need Σ_q e_q / t_q and Σ_q e_q / t_q² of every pair and dimension: of wide nodes two
// polynomials of the variances' sum s, of the others two fractions for each group (NodeGroup). The coefficients, sums over
// nodes, are those of a pair; a row of [coefficient][kPosteriorColumns] holds them for its columns.

template <class T>
static int64_t mmd_slopes_size(const NormalMmd<T>& p) {
  int64_t rows = 2 * WideNodes<T>::kTerms;
  for (int64_t g = 0; g < p.group_count; ++g) rows += 1 + p.groups[g].blocks() * NodeGroup<T>::kBlock;
  return p.dxt ? rows * kPosteriorColumns : 0;
}

// out[k] = Σ_q e_q · factor · c[q][k] of one vector of columns, for 8 coefficients and `count` nodes.
template <class T>
static inline void mmd_coefficients(const T* c, int64_t stride, int64_t count, const T* e, Vec<T> factor, T* out) {
  Vec<T> sums[8] = {};
  for (int64_t q = 0; q < count; ++q) {
    const Vec<T> value = load(e + q * kPosteriorColumns) * factor;
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) sums[k] += value * c[q * stride + k];
  }
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) store(out + k * kPosteriorColumns, sums[k]);
}

// The coefficients of one vector of columns. Those of a group come with a power of two, by which its largest e is between 1 and
// 2: products of many factors would lose the digits of small ones.
template <class T>
static void mmd_slope_coefficients(const NormalMmd<T>& p, const T* e, T* out) {
  using IntVec = typename Simd<T>::IntVec;
  constexpr int terms = WideNodes<T>::kTerms, block = NodeGroup<T>::kBlock;
  static_assert(terms == 8 && block == 8);
  mmd_coefficients(p.wide.inverse, terms, p.wide.count, e, broadcast(T(1)), out);
  mmd_coefficients(p.wide.inverse_square, terms, p.wide.count, e, broadcast(T(1)), out + terms * kPosteriorColumns);
  e += p.wide.count * kPosteriorColumns, out += 2 * terms * kPosteriorColumns;
  for (const NodeGroup<T>* group = p.groups; group < p.groups + p.group_count; ++group) {
    Vec<T> top{};
    for (int64_t q = 0; q < group->count; ++q) top = larger(load(e + q * kPosteriorColumns), top);
    const IntVec exponent = (IntVec)top >> Simd<T>::mantissa << Simd<T>::mantissa;
    store(out, (Vec<T>)exponent);
    out += kPosteriorColumns;
    for (int64_t b = 0; b < group->blocks(); ++b, out += block * kPosteriorColumns)
      mmd_coefficients(&group->numerators[0][b * block], NodeGroup<T>::kTerms, group->count, e,
                       (Vec<T>)(2 * Simd<T>::one - exponent), out);
    e += group->count * kPosteriorColumns;
  }
}

// The polynomial of `terms` coefficients at x.
template <class T, int n>
static LATENT_INLINE Pack<T, n> mmd_polynomial(const T* c, int64_t terms, const Pack<T, n>& x) {
  Pack<T, n> sum = load_pack<T, n>(c + (terms - 1) * kPosteriorColumns);
  for (int64_t k = terms - 2; k >= 0; --k) sum = sum * x + load_pack<T, n>(c + k * kPosteriorColumns);
  return sum;
}

// Σ e / t and Σ e / t² at s, of columns whose coefficients begin at c.
template <class T, int n>
static LATENT_INLINE void mmd_slopes(const NormalMmd<T>& p, const T* c, const Pack<T, n>& s, Pack<T, n>& first,
                                     Pack<T, n>& second) {
  constexpr int terms = WideNodes<T>::kTerms;
  const Pack<T, n> u = s * p.wide.scale - p.wide.center;
  first = mmd_polynomial(c, terms, u), second = mmd_polynomial(c + terms * kPosteriorColumns, terms, u);
  c += 2 * terms * kPosteriorColumns;
  for (const NodeGroup<T>* group = p.groups; group < p.groups + p.group_count; ++group) {
    const Pack<T, n> x = s * group->scale;
    Pack<T, n> denominator = x + group->denominator[group->count - 1];
    for (int64_t k = group->count - 2; k >= 0; --k) denominator = denominator * x + group->denominator[k];
    const Pack<T, n> inverse = T(1) / denominator, power = load_pack<T, n>(c);
    c += kPosteriorColumns;
    first = first + mmd_polynomial(c, group->count, x) * inverse * power;
    const Pack<T, n> numerator = mmd_polynomial(c + group->count * kPosteriorColumns, 2 * group->count - 1, x);
    second = second + numerator * inverse * inverse * power;
    c += group->blocks() * NodeGroup<T>::kBlock * kPosteriorColumns;
  }
}

// Adds to the gradients of n vectors of columns at `at`, and to the sums of the row's: of x, then of the variance.
template <class T, int n>
static LATENT_INLINE void mmd_add_gradient(const NormalMmd<T>& p, const T* c, T weight, T row_x, T row_v, int64_t at,
                                           Vec<T> (&sums)[2][64 / LATENT_VECTOR_BYTES]) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Pack<T, n> delta, s, first, second;
#pragma GCC unroll 4
  for (int j = 0; j < n; ++j) {
    const int64_t i = at + j * kLanes<T>;
    // 0.5 of 5 ms: the arrays lie in L2, a dimension far from the next.
    for (const T* next : {p.xt, p.vt, p.dxt, p.dvt}) __builtin_prefetch(next + i + p.stride);
    delta.v[j] = load(p.xt + i) - row_x, s.v[j] = load(p.vt + i) + row_v;
  }
  mmd_slopes(p, c, s, first, second);
#pragma GCC unroll 4
  for (int j = 0; j < n; ++j) {
    const int64_t i = at + j * kLanes<T>;
    const Vec<T> dx = delta.v[j] * (first.v[j] * weight);
    const Vec<T> dv = (second.v[j] * delta.v[j] * delta.v[j] - first.v[j]) * (T(0.5) * weight);
    store(p.dxt + i, load(p.dxt + i) - dx);
    store(p.dvt + i, load(p.dvt + i) + dv);
    sums[0][j % registers] += dx, sums[1][j % registers] += dv;
  }
}

// Adds the gradients of weight · Σ e over n columns to those of the columns and, unless it is negative, of the row `drow`. The
// memory at `c` is of mmd_slopes_size.
template <class T>
static void mmd_posteriors_gradient(const NormalMmd<T>& p, T weight, MmdRow<T> row, int64_t column, int64_t n, const T* e,
                                    int64_t drow, T* c) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  for (int64_t i = 0; i < n; i += kLanes<T>) mmd_slope_coefficients(p, e + i, c + i);
  for (int64_t d = 0; d < p.D; ++d) {
    const int64_t at = d * p.stride + column;
    const T row_x = row.x[d * row.stride], row_v = row.v[d * row.stride];
    Vec<T> sums[2][registers] = {};
    int64_t i = 0;
    for (; i + kColumnPack * kLanes<T> <= n; i += kColumnPack * kLanes<T>)
      mmd_add_gradient<T, kColumnPack>(p, c + i, weight, row_x, row_v, at + i, sums);
    for (; i < n; i += kLine<T>) mmd_add_gradient<T, registers>(p, c + i, weight, row_x, row_v, at + i, sums);
    if (drow < 0) continue;
    p.dxt[d * p.stride + drow] += sum_lanes<T>(sums[0]);
    p.dvt[d * p.stride + drow] += sum_lanes<T>(sums[1]);
  }
}
