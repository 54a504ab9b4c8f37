// Pairs of Gaussian posteriors, and the prior as one more posterior. For one row against a vector of columns and a node of
// width b: Σ_d δ²/t and Π t, t = s + b, as one fraction, num/den ← (num t + δ² den) / (den t): no division. Before den can
// leave the range of floats its exponent is taken out. Nodes that are wide beside the variances: mmd_normal_wide.inl; gradients:
// mmd_normal_slopes.inl.

constexpr int64_t kPosteriorColumns = 128;
constexpr int kColumnPack = LATENT_VECTOR_BYTES == 64 ? 4 : 64 / LATENT_VECTOR_BYTES;  // vectors of columns side by side
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
#include "mmd_normal_slopes.inl"

// Factors t in [low, high] of which a product and its numerator stay in range, from a first factor below 2: their logarithms
// in base 2 sum to at most 110 (1000). A numerator that overflows all the same has Σ δ²/t > 2^16: the expectation is 0.
template <class T>
static int64_t mmd_chunk(T low, T high) {
  const int most = sizeof(T) == 4 ? 110 : 1000;
  int low_bits, high_bits;
  __builtin_frexp(double(low), &low_bits), __builtin_frexp(double(high), &high_bits);
  return std::max(1, most / std::max({1, 1 - low_bits, high_bits}));
}

// out[node][kPosteriorColumns] = log E exp(−a |δ|²) of one row and kLanes columns, for `nodes` nodes from `node`.
template <class T, int nodes>
static void mmd_exponents(const GaussianSum<T>& sum, int64_t node, int64_t chunk, MmdRow<T> row, const T* x, const T* v,
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
#pragma GCC unroll 8
  for (int k = 0; k < nodes; ++k) {
    const Vec<T> magic = broadcast<T>(Simd<T>::round);
    const Vec<T> exponent = (Vec<T>)((IntVec)magic + bits[k]) - magic;
    const Vec<T> log_det = (exponent - sum.powers[node + k]) * T(0.6931471805599453) + (log<T>(den[k]) - sum.rests[node + k]);
    store(out + (node + k) * kPosteriorColumns, T(-0.5) * (num[k] / den[k] + log_det));
  }
}

// The same for `count` nodes from `node`.
template <class T>
static inline void mmd_exponents(const GaussianSum<T>& sum, int64_t node, int64_t count, int64_t chunk, MmdRow<T> row,
                                 const T* x, const T* v, int64_t stride, int64_t D, T* out) {
  static constexpr decltype(&mmd_exponents<T, 1>) kOf[] = {
      mmd_exponents<T, 1>, mmd_exponents<T, 2>, mmd_exponents<T, 3>, mmd_exponents<T, 4>,
      mmd_exponents<T, std::min(5, kNodeBlock)>, mmd_exponents<T, std::min(6, kNodeBlock)>,
      mmd_exponents<T, std::min(7, kNodeBlock)>, mmd_exponents<T, kNodeBlock>};
  for (const int64_t end = node + count; node < end; node += kNodeBlock)
    kOf[std::min<int64_t>(end - node, kNodeBlock) - 1](sum, node, chunk, row, x, v, stride, D, out);
}

// Turns the exponents of every node into expectations times the columns' weights, also NaN to zero by zero; their sum.
template <class T>
static T mmd_expectations(const T* node_weights, int64_t nodes, const T* weights, int64_t n, T* e) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[registers] = {};
  const auto columns = [&](int64_t i, auto pack) {
    using P = decltype(pack);
    const P weight = load_pack<T, P::size>(weights + i);
    P total(T(0));
    for (int64_t q = 0; q < nodes; ++q) {
      T* const at = e + q * kPosteriorColumns + i;
      const P expectation = node_weights[q] * exp(load_pack<T, P::size>(at)) * weight;
      const P value = P::each([](Vec<T> w, Vec<T> x) { return w != T(0) ? x : Vec<T>{}; }, weight, expectation);
      store_pack(at, value);
      total = total + value;
    }
    for (int j = 0; j < P::size; ++j) sums[j % registers] += total.v[j];
  };
  int64_t i = 0;
  for (; i + kColumnPack * kLanes<T> <= n; i += kColumnPack * kLanes<T>) columns(i, Pack<T, kColumnPack>());
  for (; i < n; i += kLine<T>) columns(i, Pack<T, registers>());
  return sum_lanes<T>(sums);
}

// weight · Σ e over one row and columns [begin, end), of which those before `drow` do not count and `drow` itself counts
// self_weight; adds its gradients. The memory at `e` is of mmd_expectations_size.
template <class T>
static double mmd_posteriors_row(const NormalMmd<T>& p, MmdRow<T> row, double weight, int64_t begin, int64_t end, int64_t drow,
                                 T* e) {
  const GaussianSum<T>& sum = p.cross;
  const int64_t n = (end - begin + kLine<T> - 1) / kLine<T> * kLine<T>;
  const T *const x = p.xt + begin, *const v = p.vt + begin;
  T* const others = e + p.wide.count * kPosteriorColumns;
  if (p.wide.count)
    for (int64_t j = 0; j < n; j += kLanes<T>) mmd_wide_exponents(p.wide, row, x + j, v + j, p.stride, p.D, e + j);
  for (int64_t q = 0; q < sum.count; q += kNodesOfChunk) {
    const int64_t count = std::min(sum.count - q, kNodesOfChunk);
    const int64_t chunk = mmd_chunk<T>(sum.widths[q + count - 1], sum.widths[q] + p.span);
    for (int64_t j = 0; j < n; j += kLanes<T>)
      mmd_exponents(sum, q, count, chunk, row, x + j, v + j, p.stride, p.D, others + j);
  }
  T counts[kPosteriorColumns];
  for (int64_t i = 0; i < n; ++i) counts[i] = begin + i > drow && begin + i < end ? T(1) : T(0);
  if (drow >= begin && drow < end) counts[drow - begin] = T(p.self_weight);
  const double total = mmd_expectations(p.wide.weights, p.wide.count + sum.count, counts, n, e);
  if (p.dxt) mmd_posteriors_gradient(p, T(weight), row, begin, n, e, drow, others + sum.count * kPosteriorColumns);
  return weight * total;
}

template <class T>
static int64_t mmd_expectations_size(const NormalMmd<T>& p) {
  return (p.wide.count + p.cross.count) * kPosteriorColumns + mmd_slopes_size(p);
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
