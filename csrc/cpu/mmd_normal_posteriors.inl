// Pairs of Gaussian posteriors, and the prior as one more posterior. For one row against a vector of columns and a node of
// width b: Σ_d δ²/t and Π t, t = s + b, as one fraction, num/den ← (num t + δ² den) / (den t): no division. Before den can
// leave the range of floats its exponent is taken out.

constexpr int64_t kPosteriorColumns = 128;
constexpr int kNodeBlock = LATENT_VECTOR_BYTES == 64 ? 8 : 4;  // numerators and denominators fill half the registers
// Variances above are as good as infinite: the expectation is below 1e-12 (1e-140).
template <class T>
constexpr T kLargestVariance = sizeof(T) == 4 ? T(1e27) : T(1e290);

template <class T>
static void mmd_pack_variances(const NormalMmd<T>& p, int64_t panel, int64_t padded) {
  const int64_t first = panel * p.panel, n = std::min(p.panel, p.N - first);
  mmd_pack(p.log_var, p.log_var_strides, first, n, padded, p.D, T(1), p.vt, p.stride);
  const T scale = p.unit * p.unit;
  T largest = 0;
  for (int64_t d = 0; d < p.D; ++d) {
    T* v = p.vt + d * p.stride + first;
    apply<T, exp<T>>(v, v, padded);
    for (int64_t i = 0; i < padded; ++i) {
      v[i] = v[i] * scale > kLargestVariance<T> ? kLargestVariance<T> : v[i] * scale;
      largest = v[i] > largest ? v[i] : largest;
    }
  }
  p.largest[panel] = largest;
}

// A posterior whose parameters are broadcast: a row of the packed arrays, or the prior with stride 0.
template <class T>
struct MmdRow {
  const T *x, *v;
  int64_t stride;
};

// Factors t in [low, high] of which a product and its numerator stay in range, from a first factor below 2: their logarithms
// in base 2 sum to at most 110 (1000). A numerator that overflows all the same has Σ δ²/t > 2^16: the expectation is 0.
template <class T>
static int64_t mmd_chunk(T low, T high) {
  const int most = sizeof(T) == 4 ? 110 : 1000;
  int low_bits, high_bits;
  __builtin_frexp(double(low), &low_bits), __builtin_frexp(double(high), &high_bits);
  return std::max(1, most / std::max({1, 1 - low_bits, high_bits}));
}

// out[node][kPosteriorColumns] = w E exp(−a |δ|²) of one row and kLanes columns, for kNodeBlock nodes from `node`.
template <class T>
static inline void mmd_expectations(const GaussianSum<T>& sum, int64_t node, int64_t chunk, MmdRow<T> row, const T* x,
                                    const T* v, int64_t stride, int64_t D, T* out) {
  using IntVec = typename Simd<T>::IntVec;
  Vec<T> num[kNodeBlock] = {}, den[kNodeBlock], width[kNodeBlock];
  IntVec bits[kNodeBlock] = {};
#pragma GCC unroll 8
  for (int k = 0; k < kNodeBlock; ++k) den[k] = broadcast(T(1)), width[k] = broadcast(sum.widths[node + k]);
  for (int64_t d = 0; d < D;) {
    for (const int64_t end = std::min(D, d + chunk); d < end; ++d) {
      const Vec<T> delta = load(x + d * stride) - row.x[d * row.stride], square = delta * delta;
      const Vec<T> s = load(v + d * stride) + row.v[d * row.stride];
#pragma GCC unroll 8
      for (int k = 0; k < kNodeBlock; ++k) {
        const Vec<T> t = s + width[k];
        num[k] = num[k] * t + square * den[k];
        den[k] *= t;
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kNodeBlock; ++k) {
      const IntVec exponent = ((IntVec)den[k] >> Simd<T>::mantissa) - (Simd<T>::one >> Simd<T>::mantissa);
      const Vec<T> inverse = (Vec<T>)(Simd<T>::one - (exponent << Simd<T>::mantissa));
      num[k] *= inverse, den[k] *= inverse, bits[k] += exponent;
    }
  }
  for (int k = 0; k < kNodeBlock; ++k) {
    const Vec<T> magic = broadcast<T>(Simd<T>::round);
    const Vec<T> exponent = (Vec<T>)((IntVec)magic + bits[k]) - magic;
    const Vec<T> log_det = (exponent - sum.powers[node + k]) * T(0.6931471805599453) + (log<T>(den[k]) - sum.rests[node + k]);
    store(out + (node + k) * kPosteriorColumns, sum.weights[node + k] * exp<T>(T(-0.5) * (num[k] / den[k] + log_det)));
  }
}

// r = 1/t for four t, with one division where their product is in range.
template <class T, bool in_range>
static inline void mmd_reciprocals(const Vec<T> (&t)[4], Vec<T> (&r)[4]) {
  if (in_range) {
    const Vec<T> a = t[0] * t[1], b = t[2] * t[3], both = T(1) / (a * b), ra = both * b, rb = both * a;
    r[0] = ra * t[1], r[1] = ra * t[0], r[2] = rb * t[3], r[3] = rb * t[2];
  } else {
    for (int k = 0; k < 4; ++k) r[k] = T(1) / t[k];
  }
}

// Adds the gradients of weight · Σ e over n columns to those of the columns and, unless null, of the row at `drow`.
template <class T, bool in_range>
static void mmd_posteriors_gradient(const GaussianSum<T>& sum, T weight, MmdRow<T> row, const NormalMmd<T>& p, int64_t column,
                                    int64_t n, const T* e, int64_t drow) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  for (int64_t d = 0; d < p.D; ++d) {
    const int64_t at = d * p.stride + column;
    const Vec<T> row_x = broadcast(row.x[d * row.stride]), row_v = broadcast(row.v[d * row.stride]);
    Vec<T> sums_x[registers] = {}, sums_v[registers] = {};
    for (int64_t j = 0; j < n; j += kLine<T>)
#pragma GCC unroll 4
      for (int g = 0; g < registers; ++g) {
        const int64_t i = j + g * kLanes<T>;
        const Vec<T> delta = load(p.xt + at + i) - row_x, s = load(p.vt + at + i) + row_v;
        Vec<T> first = {}, second = {};  // Σ e / t, Σ e / t²
        for (int64_t q = 0; q < sum.count; q += 4) {
          Vec<T> t[4], r[4];
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) t[k] = s + sum.widths[q + k];
          mmd_reciprocals<T, in_range>(t, r);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const Vec<T> part = load(e + (q + k) * kPosteriorColumns + i) * r[k];
            first += part, second += part * r[k];
          }
        }
        const Vec<T> dx = delta * (first * weight), dv = (second * delta * delta - first) * (T(0.5) * weight);
        store(p.dxt + at + i, load(p.dxt + at + i) - dx);
        store(p.dvt + at + i, load(p.dvt + at + i) + dv);
        sums_x[g] += dx, sums_v[g] += dv;
      }
    if (drow < 0) continue;
    p.dxt[d * p.stride + drow] += sum_lanes<T>(sums_x);
    p.dvt[d * p.stride + drow] += sum_lanes<T>(sums_v);
  }
}

// Σ e over one row and columns [begin, end), of which the first `skipped` do not count and that at `self` counts
// `self_weight`; adds the gradients of weight · Σ e.
template <class T>
static double mmd_posteriors_row(const NormalMmd<T>& p, MmdRow<T> row, T largest, double weight, int64_t begin, int64_t end,
                                 int64_t drow, T* e) {
  const GaussianSum<T>& sum = p.cross;
  const int64_t n = (end - begin + kLine<T> - 1) / kLine<T> * kLine<T>;
  bool in_range = true;
  constexpr int64_t block = GaussianSum<T>::kNodes;  // not kNodeBlock: every level takes exponents out at the same place
  for (int64_t q = 0; q < sum.count; q += block) {
    const auto [low, high] = std::minmax_element(sum.widths + q, sum.widths + q + block);
    const int64_t chunk = mmd_chunk<T>(*low, *high + largest);
    in_range &= chunk >= 4;
    for (int64_t j = 0; j < n; j += kLanes<T>)
      for (int64_t node = q; node < q + block; node += kNodeBlock)
        mmd_expectations(sum, node, chunk, row, p.xt + begin + j, p.vt + begin + j, p.stride, p.D, e + j);
  }
  const int64_t skipped = std::clamp<int64_t>(drow - begin, 0, n), self = drow - begin;
  double total = 0;
  for (int64_t q = 0; q < sum.count; ++q) {
    T* const values = e + q * kPosteriorColumns;
    if (self >= 0 && self < n) values[self] = p.self_weight > 0 ? values[self] * T(p.self_weight) : T(0);
    std::fill(values, values + skipped, T(0));
    std::fill(values + (end - begin), values + n, T(0));
    total += mmd_sum(values, n);
  }
  if (p.dxt) {
    const auto gradient = in_range ? mmd_posteriors_gradient<T, true> : mmd_posteriors_gradient<T, false>;
    gradient(sum, T(weight), row, p, begin, n, e, drow);
  }
  return weight * total;
}

template <class T>
static double mmd_posteriors_pairs(const NormalMmd<T>& p, int64_t panel, int64_t other) {
  Arena<T> arena(Scratch::task, p.cross.count * kPosteriorColumns);
  T* const e = arena.take(p.cross.count * kPosteriorColumns);
  const int64_t last_row = std::min(p.N, (panel + 1) * p.panel), last = std::min(p.N, (other + 1) * p.panel);
  const T largest = p.largest[panel] + p.largest[other];
  double sum = 0;
  for (int64_t block = other * p.panel; block < last; block += kPosteriorColumns) {
    const int64_t end = std::min(last, block + kPosteriorColumns);
    for (int64_t i = panel * p.panel; i < std::min(last_row, end); ++i)
      sum += mmd_posteriors_row(p, {p.xt + i, p.vt + i, p.stride}, largest, p.pair_weight,
                                std::max(block, i / kLine<T> * kLine<T>), end, i, e);
  }
  return sum;
}

template <class T>
static double mmd_posteriors_cross(const NormalMmd<T>& p, int64_t panel) {
  Arena<T> arena(Scratch::task, p.cross.count * kPosteriorColumns);
  T* const e = arena.take(p.cross.count * kPosteriorColumns);
  const T mean = 0, variance = p.prior_variance;
  const int64_t first = panel * p.panel, last = std::min(p.N, first + p.panel), size = std::min(p.panel, p.stride - first);
  for (int64_t d = 0; p.dxt && d < p.D; ++d)
    for (T* gradient : {p.dxt, p.dvt}) std::fill_n(gradient + d * p.stride + first, size, T(0));
  double sum = 0;
  for (int64_t i = first; i < last; i += kPosteriorColumns)
    sum += mmd_posteriors_row(p, {&mean, &variance, 0}, p.largest[panel] + variance, p.cross_weight, i,
                              std::min(last, i + kPosteriorColumns), -1, e);
  return sum;
}
