// Pairs of Gaussian posteriors, and the prior as one more posterior. For one row against a vector of columns and a node of
// width b: Σ_d δ²/t and Π t, t = s + b, as one fraction, num/den ← (num t + δ² den) / (den t): no division. Before den can
// leave the range of floats its exponent is taken out. Nodes that are wide beside the variances: mmd_normal_wide.inl.

constexpr int64_t kPosteriorColumns = 128;
constexpr int kNodeBlock = LATENT_VECTOR_BYTES == 64 ? 8 : 4;  // numerators and denominators fill half the registers
constexpr int64_t kNodesOfChunk = 8;  // of every level: exponents are taken out at the same places
// Variances above are as good as infinite: the expectation is below 1e-12 (1e-140).
template <class T>
constexpr T kLargestVariance = sizeof(T) == 4 ? T(1e27) : T(1e290);

template <class T>
static void mmd_pack_variances(const NormalMmd<T>& p, int64_t panel, int64_t padded) {
  const int64_t first = panel * p.panel, n = std::min(p.panel, p.N - first);
  mmd_pack(p.log_var, p.log_var_strides, first, n, padded, p.D, T(1), p.vt, p.stride);
  const T scale = p.unit * p.unit;
  T largest = 0;
  double sum = 0;
  for (int64_t d = 0; d < p.D; ++d) {
    T* v = p.vt + d * p.stride + first;
    apply<T, exp<T>>(v, v, n);
    for (int64_t i = 0; i < n; ++i) {
      v[i] = v[i] * scale > kLargestVariance<T> ? kLargestVariance<T> : v[i] * scale;
      largest = v[i] > largest ? v[i] : largest;
    }
    std::fill(v + n, v + padded, T(0));
    sum += mmd_sum(v, padded);
  }
  p.largest[panel] = largest, p.mean[panel] = static_cast<T>(sum / double(n * p.D));
}

// A posterior whose parameters are broadcast: a row of the packed arrays, or the prior with stride 0.
template <class T>
struct MmdRow {
  const T *x, *v;
  int64_t stride;
};

#include "mmd_normal_wide.inl"

// Factors t in [low, high] of which a product and its numerator stay in range, from a first factor below 2: their logarithms
// in base 2 sum to at most 110 (1000). A numerator that overflows all the same has Σ δ²/t > 2^16: the expectation is 0.
template <class T>
static int64_t mmd_chunk(T low, T high) {
  const int most = sizeof(T) == 4 ? 110 : 1000;
  int low_bits, high_bits;
  __builtin_frexp(double(low), &low_bits), __builtin_frexp(double(high), &high_bits);
  return std::max(1, most / std::max({1, 1 - low_bits, high_bits}));
}

// out[node][kPosteriorColumns] = w E exp(−a |δ|²) of one row and kLanes columns, for `nodes` nodes from `node`.
template <class T, int nodes>
static void mmd_expectations(const GaussianSum<T>& sum, int64_t node, int64_t chunk, MmdRow<T> row, const T* x, const T* v,
                             int64_t stride, int64_t D, T* out) {
  using IntVec = typename Simd<T>::IntVec;
  Vec<T> num[nodes] = {}, den[nodes], width[nodes];
  IntVec bits[nodes] = {};
#pragma GCC unroll 8
  for (int k = 0; k < nodes; ++k) den[k] = broadcast(T(1)), width[k] = broadcast(sum.widths[node + k]);
  for (int64_t d = 0; d < D;) {
    for (const int64_t end = std::min(D, d + chunk); d < end; ++d) {
      const Vec<T> delta = load(x + d * stride) - row.x[d * row.stride], square = delta * delta;
      const Vec<T> s = load(v + d * stride) + row.v[d * row.stride];
#pragma GCC unroll 8
      for (int k = 0; k < nodes; ++k) {
        const Vec<T> t = s + width[k];
        num[k] = num[k] * t + square * den[k];
        den[k] *= t;
      }
    }
#pragma GCC unroll 8
    for (int k = 0; k < nodes; ++k) {
      const IntVec exponent = ((IntVec)den[k] >> Simd<T>::mantissa) - (Simd<T>::one >> Simd<T>::mantissa);
      const Vec<T> inverse = (Vec<T>)(Simd<T>::one - (exponent << Simd<T>::mantissa));
      num[k] *= inverse, den[k] *= inverse, bits[k] += exponent;
    }
  }
  for (int k = 0; k < nodes; ++k) {
    const Vec<T> magic = broadcast<T>(Simd<T>::round);
    const Vec<T> exponent = (Vec<T>)((IntVec)magic + bits[k]) - magic;
    const Vec<T> log_det = (exponent - sum.powers[node + k]) * T(0.6931471805599453) + (log<T>(den[k]) - sum.rests[node + k]);
    store(out + (node + k) * kPosteriorColumns, sum.weights[node + k] * exp<T>(T(-0.5) * (num[k] / den[k] + log_det)));
  }
}

// The same for `count` nodes from `node`.
template <class T>
static inline void mmd_expectations(const GaussianSum<T>& sum, int64_t node, int64_t count, int64_t chunk, MmdRow<T> row,
                                    const T* x, const T* v, int64_t stride, int64_t D, T* out) {
  static constexpr decltype(&mmd_expectations<T, 1>) kOf[] = {
      mmd_expectations<T, 1>, mmd_expectations<T, 2>, mmd_expectations<T, 3>, mmd_expectations<T, 4>,
      mmd_expectations<T, std::min(5, kNodeBlock)>, mmd_expectations<T, std::min(6, kNodeBlock)>,
      mmd_expectations<T, std::min(7, kNodeBlock)>, mmd_expectations<T, kNodeBlock>};
  for (const int64_t end = node + count; node < end; node += kNodeBlock)
    kOf[std::min<int64_t>(end - node, kNodeBlock) - 1](sum, node, chunk, row, x, v, stride, D, out);
}

// r = 1/t for n ≤ 4 values of t, with one division where their product is in range.
template <class T, bool in_range, int n>
static inline void mmd_reciprocals(const Vec<T> (&t)[n], Vec<T> (&r)[n]) {
  if constexpr (in_range && n > 1) {
    constexpr int half = n / 2;
    const Vec<T> a = half == 2 ? t[0] * t[1] : t[0], b = n - half == 2 ? t[half] * t[half + 1] : t[half];
    const Vec<T> both = T(1) / (a * b), ra = both * b, rb = both * a;
    r[0] = half == 2 ? ra * t[1] : ra, r[half] = n - half == 2 ? rb * t[half + 1] : rb;
    if (half == 2) r[1] = ra * t[0];
    if (n - half == 2) r[half + 1] = rb * t[half];
  } else {
    for (int k = 0; k < n; ++k) r[k] = T(1) / t[k];
  }
}

// Adds Σ e / t and Σ e / t² over n nodes from `node` to `first` and `second`.
template <class T, bool in_range, int n>
static inline void mmd_add_slopes(const GaussianSum<T>& sum, int64_t node, Vec<T> s, const T* e, Vec<T>& first,
                                  Vec<T>& second) {
  Vec<T> t[n], r[n];
#pragma GCC unroll 4
  for (int k = 0; k < n; ++k) t[k] = s + sum.widths[node + k];
  mmd_reciprocals<T, in_range, n>(t, r);
#pragma GCC unroll 4
  for (int k = 0; k < n; ++k) {
    const Vec<T> part = load(e + (node + k) * kPosteriorColumns) * r[k];
    first += part, second += part * r[k];
  }
}

// Adds the gradients of weight · Σ e over n columns to those of the columns and, unless null, of the row at `drow`.
// The number of nodes of p.cross is a multiple of four and `rest`.
template <class T, bool in_range, int rest>
static void mmd_posteriors_gradient(const NormalMmd<T>& p, const WideSums<T>& wide, T weight, MmdRow<T> row, int64_t column,
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
        // 0.5 of 5 ms: the arrays lie in L2, a dimension far from the next.
        for (const T* next : {p.xt, p.vt, p.dxt, p.dvt}) __builtin_prefetch(next + at + p.stride + i);
        const Vec<T> delta = load(p.xt + at + i) - row_x, s = load(p.vt + at + i) + row_v;
        const Vec<T> u = s * p.wide.scale - p.wide.center;
        Vec<T> first = wide.at(wide.first, i, u), second = wide.at(wide.second, i, u);  // Σ e / t, Σ e / t²
        int64_t q = 0;
        for (; q + 4 <= p.cross.count; q += 4) mmd_add_slopes<T, in_range, 4>(p.cross, q, s, e + i, first, second);
        if constexpr (rest) mmd_add_slopes<T, in_range, rest>(p.cross, q, s, e + i, first, second);
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
static double mmd_posteriors_row(const NormalMmd<T>& p, MmdRow<T> row, double weight, int64_t begin, int64_t end, int64_t drow,
                                 T* e) {
  const GaussianSum<T>& sum = p.cross;
  const int64_t n = (end - begin + kLine<T> - 1) / kLine<T> * kLine<T>;
  const T *const x = p.xt + begin, *const v = p.vt + begin;
  T* const others = e + p.wide.count * kPosteriorColumns;
  if (p.wide.count)
    for (int64_t j = 0; j < n; j += kLanes<T>) mmd_wide_expectations(p.wide, row, x + j, v + j, p.stride, p.D, e + j);
  bool in_range = true;
  for (int64_t q = 0; q < sum.count; q += kNodesOfChunk) {
    const int64_t count = std::min(sum.count - q, kNodesOfChunk);
    const int64_t chunk = mmd_chunk<T>(sum.widths[q + count - 1], sum.widths[q] + p.span);
    in_range &= chunk >= 4;
    for (int64_t j = 0; j < n; j += kLanes<T>)
      mmd_expectations(sum, q, count, chunk, row, x + j, v + j, p.stride, p.D, others + j);
  }
  const int64_t skipped = std::clamp<int64_t>(drow - begin, 0, n), self = drow - begin;
  double total = 0;
  for (int64_t q = 0; q < p.wide.count + sum.count; ++q) {
    T* const values = e + q * kPosteriorColumns;
    if (self >= 0 && self < n) values[self] = p.self_weight > 0 ? values[self] * T(p.self_weight) : T(0);
    std::fill(values, values + skipped, T(0));
    std::fill(values + (end - begin), values + n, T(0));
    total += mmd_sum(values, n);
  }
  if (p.dxt) {
    static constexpr decltype(&mmd_posteriors_gradient<T, true, 0>) kGradient[2][4] = {
        {mmd_posteriors_gradient<T, false, 0>, mmd_posteriors_gradient<T, false, 1>, mmd_posteriors_gradient<T, false, 2>,
         mmd_posteriors_gradient<T, false, 3>},
        {mmd_posteriors_gradient<T, true, 0>, mmd_posteriors_gradient<T, true, 1>, mmd_posteriors_gradient<T, true, 2>,
         mmd_posteriors_gradient<T, true, 3>}};
    kGradient[in_range][sum.count % 4](p, WideSums<T>(p.wide, e, n), T(weight), row, begin, n, others, drow);
  }
  return weight * total;
}

template <class T>
static int64_t mmd_expectations_size(const NormalMmd<T>& p) {
  return (p.wide.count + p.cross.count) * kPosteriorColumns;
}

template <class T>
static double mmd_posteriors_pairs(const NormalMmd<T>& p, int64_t panel, int64_t other) {
  Arena<T> arena(Scratch::task, mmd_expectations_size(p));
  T* const e = arena.take(mmd_expectations_size(p));
  const int64_t last_row = std::min(p.N, (panel + 1) * p.panel), last = std::min(p.N, (other + 1) * p.panel);
  double sum = 0;
  for (int64_t block = other * p.panel; block < last; block += kPosteriorColumns) {
    const int64_t end = std::min(last, block + kPosteriorColumns);
    for (int64_t i = panel * p.panel; i < std::min(last_row, end); ++i)
      sum += mmd_posteriors_row(p, {p.xt + i, p.vt + i, p.stride}, p.pair_weight, std::max(block, i / kLine<T> * kLine<T>),
                                end, i, e);
  }
  return sum;
}

template <class T>
static double mmd_posteriors_cross(const NormalMmd<T>& p, int64_t panel) {
  Arena<T> arena(Scratch::task, mmd_expectations_size(p));
  T* const e = arena.take(mmd_expectations_size(p));
  const T mean = 0, variance = p.prior_variance;
  const int64_t first = panel * p.panel, last = std::min(p.N, first + p.panel), size = std::min(p.panel, p.stride - first);
  for (int64_t d = 0; p.dxt && d < p.D; ++d)
    for (T* gradient : {p.dxt, p.dvt}) std::fill_n(gradient + d * p.stride + first, size, T(0));
  double sum = 0;
  for (int64_t i = first; i < last; i += kPosteriorColumns)
    sum += mmd_posteriors_row(p, {&mean, &variance, 0}, p.cross_weight, i, std::min(last, i + kPosteriorColumns), -1, e);
  return sum;
}
