// See logistic_mixture.h. Pixels lie across lanes, so that every plane of parameters is read and written in order; a block
// of pixels takes one component after the other. Per pixel and component of three channels forward costs nine exps (two a
// channel, one a coefficient), 45 multiplications and FMAs of polynomials and four divisions, and the sums over components
// two exps; logarithms there are two a pixel. Backward recomputes that and needs the sums of forward only.

constexpr int64_t kLogisticPixels = 256;  // of a block: stretches of 1 KB of each plane, which the hardware fetches ahead

template <class T>
struct LogisticPoly;

// sinh(y)/y and 2 cosh(y) in y² on y ≤ e^7/255: minimax in the relative error, 3e-8 and 3e-9.
template <>
struct LogisticPoly<float> {
  static constexpr float sinh[] = {1.0f, 0.166666465932763654f, 0.00833355077003289257f, 0.000198329133657527843f,
                                   2.77039731952736165e-6f, 2.37777007232384583e-8f, 2.13218803419500071e-10f};
  static constexpr float cosh[] = {2.0f, 1.00000007349960256f, 0.0833332089805364306f, 0.00277785058387191846f,
                                   0.0000495836325305064173f, 5.53850517051110588e-7f, 3.97693134121339865e-9f,
                                   3.01667045175190519e-11f};
};

// 5e-18 and 3e-19.
template <>
struct LogisticPoly<double> {
  static constexpr double sinh[] = {1.0, 0.166666666666666753, 0.00833333333333307361, 0.000198412698412998261,
                                    2.75573192222326474e-6, 2.50521084449526767e-8, 1.60590425734973771e-10,
                                    7.64718118185362661e-13, 2.81129813435189699e-15, 8.23012123872932354e-18,
                                    1.92185582620362613e-20, 4.61403718901035695e-23};
  static constexpr double cosh[] = {2.0, 0.999999999999999984, 0.0833333333333333997, 0.00277777777777767713,
                                    0.0000496031746032509037, 5.51146384446330329e-7, 4.17535140672265964e-9,
                                    2.29414895494006414e-11, 9.55897458799195202e-14, 3.12367833487909182e-16,
                                    8.22951803179896724e-19, 1.74861150893578183e-21, 3.82975199360180893e-24};
};

template <class T>
constexpr T kLogisticHalfBin = T(1) / T(255);
template <class T>
constexpr T kLogisticMinLogScale = T(-7);

template <class T>
static inline Vec<T> sign_bit(Vec<T> x) {
  using IntVec = typename Simd<T>::IntVec;
  return (Vec<T>)((IntVec)x & (IntVec)broadcast(T(-0.0)));
}

template <class T>
static inline Vec<T> flip_sign(Vec<T> x, Vec<T> sign) {
  using IntVec = typename Simd<T>::IntVec;
  return (Vec<T>)((IntVec)x ^ (IntVec)sign);
}

template <class T, int n>
static LATENT_INLINE Pack<T, n> magnitude(const Pack<T, n>& x) {
  return Pack<T, n>::each([](Vec<T> a) { return flip_sign<T>(a, sign_bit<T>(a)); }, x);
}

// e^x = (1 + rest) · scale for x up to 88 (709); for x below −87 (−708) the smallest normal number.
template <class T, int n>
struct SplitExp {
  Pack<T, n> rest, scale;

  explicit LATENT_INLINE SplitExp(Pack<T, n> x) {
    using S = Simd<T>;
    x = Pack<T, n>::each([](Vec<T> a) { return larger(broadcast(S::exp_min), a); }, x);
    const Pack<T, n> shifted = x * T(1.4426950408889634) + S::biased_round, whole = shifted - S::biased_round;
    const Pack<T, n> r = (x - whole * S::ln2_hi) - whole * S::ln2_lo;
    scale = Pack<T, n>::each([](Vec<T> a) { return (Vec<T>)((typename S::IntVec)a << S::mantissa); }, shifted);
    rest = horner(S::exp_poly, r) * r * r + r;
  }
  LATENT_INLINE Pack<T, n> value() const { return rest * scale + scale; }
  LATENT_INLINE Pack<T, n> minus_one() const { return rest * scale + (scale - T(1)); }
};

// (1 − e^(−2|x|)) / (1 + e^(−2|x|)) with the sign of x; from e^x − 1, so that small x keep their digits.
template <class T, int n>
static LATENT_INLINE Pack<T, n> tanh(const Pack<T, n>& x) {
  const Pack<T, n> m = SplitExp<T, n>(T(-2) * magnitude(x)).minus_one();
  return Pack<T, n>::each([](Vec<T> y, Vec<T> a) { return flip_sign<T>(y, sign_bit<T>(a)); }, -m / (m + T(2)), x);
}

// A block of pixels: their channels, and where their parameters lie.
template <class T, int C>
struct LogisticBlock {
  const T *x[C], *params;        // levels; parameters of the first pixel
  int64_t plane, K;              // distance of planes of parameters; their number a row
  int64_t n, padded;             // pixels, also in whole groups
  T centre[C][kLogisticPixels];  // of the bin; of an open bin, its inner edge
  T side[C][kLogisticPixels];    // 1 for the bin open to −∞, −1 for that open to ∞, else 0
  T counts[kLogisticPixels];     // 1 for the pixels that count, else 0
  bool whole;                    // all of whole groups count

  static constexpr int mean_row(int c) { return 1 + 3 * c; }  // its log-scale and coefficient follow
  int64_t at(int row, int64_t k, int64_t i) const { return (row * K + k) * plane + i; }

  LATENT_INLINE Pack<T, C> parameters(int row, int64_t k, int64_t i) const {
    Pack<T, C> result;
    for (int c = 0; c < C; ++c) result.v[c] = load(params + at(mean_row(c) + row, k, i));
    return result;
  }
  static LATENT_INLINE Pack<T, C> channels(const T (&array)[C][kLogisticPixels], int64_t i) {
    Pack<T, C> result;
    for (int c = 0; c < C; ++c) result.v[c] = load(array[c] + i);
    return result;
  }
};

// Asks for the parameters of component k, and for where its gradients go if `out` is not null, in time for the beginnings of
// their stretches.
template <class T, int C>
static LATENT_INLINE void logistic_prefetch(const LogisticBlock<T, C>& b, int64_t k, int64_t i, T* out) {
  constexpr int rows = C == 3 ? 10 : 3;
#pragma GCC unroll 10
  for (int row = 0; row < rows; ++row) {
    __builtin_prefetch(b.params + b.at(row, k, i));
    if (out) __builtin_prefetch(out + b.at(row, k, i), 1);
  }
}

// One component at one vector of pixels: P = ratio · e^linear and, by channel, what its gradients need. The ratio lies between
// 2e-6 and 614, so that weights and sums over components take it as it is and no component costs a logarithm.
template <class T, int C>
struct LogisticComponent {
  Vec<T> ratio, linear;
  Pack<T, C> coef;  // after tanh: green on red, blue on red, blue on green
  Pack<T, C> log_scale, side, inv, t, y2, u, sinh, cosh, den;

  LATENT_INLINE LogisticComponent(const LogisticBlock<T, C>& b, int64_t k, int64_t i) {
    using P = Pack<T, C>;
    const T log_2h = T(-4.8481163645984805);  // log(2/255)
    log_scale = b.parameters(1, k, i);
    const P clamped = P::each([](Vec<T> s) { return larger(broadcast(kLogisticMinLogScale<T>), s); }, log_scale);
    inv = SplitExp<T, C>(-clamped).value();
    P mean = b.parameters(0, k, i);
    if constexpr (C == 3) {
      coef = tanh(b.parameters(2, k, i));
      const Vec<T> red = load(b.x[0] + i), green = load(b.x[1] + i);
      mean.v[1] += coef.v[0] * red;
      mean.v[2] += coef.v[1] * red + coef.v[2] * green;
    }
    side = b.channels(b.side, i);
    t = (b.channels(b.centre, i) - mean) * inv;
    const P size = magnitude(t), y = kLogisticHalfBin<T> * inv;
    u = SplitExp<T, C>(-size).value();
    y2 = y * y;
    sinh = horner(LogisticPoly<T>::sinh, y2);
    cosh = horner(LogisticPoly<T>::cosh, y2);
    den = T(1) + u * P::each([](Vec<T> s, Vec<T> a) { return s != T(0) ? broadcast(T(1)) : a; }, side, u + cosh);
    const P num = P::each([](Vec<T> s, Vec<T> a) { return s != T(0) ? broadcast(T(1)) : a; }, side, sinh);
    const P terms = P::each([](Vec<T> s, Vec<T> towards, Vec<T> a) {
      return s != T(0) ? (towards < T(0) ? towards : Vec<T>{}) : a;
    }, side, side * t, log_2h - clamped - size);
    linear = terms.v[0], ratio = num.v[0];
    Vec<T> product = den.v[0];
    for (int c = 1; c < C; ++c) linear += terms.v[c], ratio *= num.v[c], product *= den.v[c];
    ratio /= product;
  }
};

// Copies n values, 0 for what does not count and up to `padded`.
template <class T>
static void logistic_pack(const T* from, const T* counts, int64_t n, int64_t padded, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = counts[i] != T(0) ? from[i] : T(0);
  std::fill(to + n, to + padded, T(0));
}

// Pixels [pixel, pixel + n) of an image. If they are not whole groups that all count, `packed` takes a copy of their planes
// of parameters and levels, kLogisticPixels apart.
template <class T, int C>
static void logistic_load(const LogisticMixture<T>& in, int64_t image, int64_t pixel, int64_t n, T* packed,
                          LogisticBlock<T, C>& b) {
  const int64_t planes = in.planes(), row = image % in.N;
  b.n = n, b.padded = round_up(n, kGroup<T>), b.K = in.K;
  b.whole = n == b.padded;
  std::fill_n(b.counts, n, T(1));
  std::fill_n(b.counts + n, b.padded - n, T(0));
  if (in.mask)
    for (int64_t i = 0; i < n; ++i) b.counts[i] = in.mask[row * in.P + pixel + i], b.whole &= b.counts[i] != T(0);
  b.params = in.params + image * planes * in.P + pixel, b.plane = in.P;
  if (!b.whole) {
    for (int64_t p = 0; p < planes; ++p)
      logistic_pack(b.params + p * in.P, b.counts, n, b.padded, packed + p * kLogisticPixels);
    b.params = packed, b.plane = kLogisticPixels;
  }
  for (int c = 0; c < C; ++c) {
    b.x[c] = in.x + (row * C + c) * in.P + pixel;
    if (!b.whole) {
      T* const to = packed + (planes + c) * kLogisticPixels;
      logistic_pack(b.x[c], b.counts, n, b.padded, to);
      b.x[c] = to;
    }
    for (int64_t i = 0; i < b.padded; i += kLanes<T>) {
      const Vec<T> level = load(b.x[c] + i), one = broadcast(T(1));
      const Vec<T> low = level < kLogisticHalfBin<T> - T(1) ? one : Vec<T>{};
      const Vec<T> side = level > T(1) - kLogisticHalfBin<T> ? -one : low;
      store(b.side[c] + i, side);
      store(b.centre[c] + i, level + side * kLogisticHalfBin<T>);
    }
  }
}

// f(image, pixel) for the blocks of one part, with `b` loaded.
template <class T, int C, class F>
static void logistic_blocks(const LogisticMixture<T>& in, int64_t part, T* packed, LogisticBlock<T, C>& b, const F& f) {
  const int64_t image = part / in.parts(), begin = part % in.parts() * kLogisticPart;
  const int64_t end = std::min(in.P, begin + kLogisticPart);
  for (int64_t pixel = begin; pixel < end; pixel += kLogisticPixels) {
    logistic_load(in, image, pixel, std::min(kLogisticPixels, end - pixel), packed, b);
    f(image, pixel);
  }
}

// For each pixel the largest of K exponents, and the sum of their exponentials over that of the largest, times the ratios,
// which are 1 where null. Components lie `stride` apart.
template <class T>
static void logistic_sum(const T* linear, const T* ratio, int64_t stride, int64_t K, int64_t padded, T* tops, T* sums) {
  for (int64_t i = 0; i < padded; i += kLanes<T>) {
    Vec<T> top = broadcast(-kInf<T>), sum{};
    for (int64_t k = 0; k < K; ++k) top = larger(load(linear + k * stride + i), top);
    top = gmm_shift<T>(top);
    for (int64_t k = 0; k < K; ++k) {
      const Vec<T> term = exp<T>(load(linear + k * stride + i) - top);
      sum += ratio ? term * load(ratio + k * stride + i) : term;
    }
    store(tops + i, top);
    store(sums + i, sum);
  }
}

template <class T>
using LogisticStats = T[4][kLogisticPixels];

// The statistics of a block; `linear` and `ratio` take K · kLogisticPixels values.
template <class T, int C>
static void logistic_stats(const LogisticBlock<T, C>& b, T* linear, T* ratio, LogisticStats<T>& stats) {
  constexpr int64_t stride = kLogisticPixels;
  logistic_sum<T>(b.params, nullptr, b.plane, b.K, b.padded, stats[0], stats[3]);
  for (int64_t k = 0; k < b.K; ++k)
    for (int64_t i = 0; i < b.padded; i += kLanes<T>) {
      logistic_prefetch<T, C>(b, k + 1, i, nullptr);
      const LogisticComponent<T, C> m(b, k, i);
      store(linear + k * stride + i, (load(b.params + b.at(0, k, i)) - load(stats[0] + i)) + m.linear);
      store(ratio + k * stride + i, m.ratio);
    }
  logistic_sum(linear, ratio, stride, b.K, b.padded, stats[1], stats[2]);
  apply<T, log<T>>(stats[3], stats[3], b.padded);
}

template <class T, int C>
static void logistic_forward(const LogisticMixtureForward<T>& p, int64_t first, int64_t last) {
  const int64_t planes = (p.in.planes() + C) * kLogisticPixels, terms = p.in.K * kLogisticPixels;
  Arena<T> arena(Scratch::task, planes, terms, terms);
  T *const packed = arena.take(planes), *const linear = arena.take(terms), *const ratio = arena.take(terms);
  LogisticBlock<T, C> b;
  for (int64_t part = first; part < last; ++part) {
    Vec<T> total[64 / LATENT_VECTOR_BYTES] = {};
    logistic_blocks(p.in, part, packed, b, [&](int64_t image, int64_t pixel) {
      LogisticStats<T> stats;
      logistic_stats(b, linear, ratio, stats);
      for (int64_t i = 0; i < b.padded; i += kGroup<T>)
        for (int r = 0; r < 64 / LATENT_VECTOR_BYTES; ++r) {
          const int64_t j = i + r * kLanes<T>;
          const Vec<T> log_prob = load(stats[1] + j) + (log<T>(load(stats[2] + j)) - load(stats[3] + j));
          total[r] += load(b.counts + j) != T(0) ? log_prob : Vec<T>{};
        }
      if (p.stats)
        for (int s = 0; s < 4; ++s) std::copy_n(stats[s], b.n, p.stats + (4 * image + s) * p.in.P + pixel);
    });
    p.sums[part] = sum_lanes<T>(total);
  }
}

// The gradients of one component at one vector of pixels, of which `weight` is g r_k and `share` g π_k, to the planes that
// start at `out`, past the caches or not.
template <class T, int C>
static LATENT_INLINE void logistic_gradients(const LogisticBlock<T, C>& b, const LogisticComponent<T, C>& m, int64_t k,
                                             int64_t i, Vec<T> weight, Vec<T> share, T* out, bool past_cache) {
  using P = Pack<T, C>;
  const auto write = [&](int row, Vec<T> v) {
    T* const to = out + b.at(row, k, i);
    past_cache ? store_past_cache(to, v) : store(to, v);
  };
  const P inv_both = T(1) / (m.den * m.sinh), inv_den = m.sinh * inv_both, inside = (m.u * m.u - T(1)) * inv_den;
  const P dt = P::each([](Vec<T> s, Vec<T> t, Vec<T> u, Vec<T> d, Vec<T> a) {
    return s != T(0) ? (s * t < T(0) ? broadcast(T(1)) : u) * d * s : flip_sign<T>(a, sign_bit<T>(t));
  }, m.side, m.t, m.u, inv_den, inside);
  const P width = T(2) * m.u * m.y2 * m.sinh * inv_den - T(0.5) * m.cosh * m.den * inv_both;
  P weights;
  for (int c = 0; c < C; ++c) weights.v[c] = weight;
  const P dmean = -weights * m.inv * dt;
  const P dlog_scale = P::each([](Vec<T> raw, Vec<T> s, Vec<T> w, Vec<T> open, Vec<T> a) {
    return raw < kLogisticMinLogScale<T> ? Vec<T>{} : w * ((s != T(0) ? Vec<T>{} : a) - open);
  }, m.log_scale, m.side, weights, m.t * dt, width);
  write(0, weight - share);
  for (int c = 0; c < C; ++c) {
    write(b.mean_row(c), dmean.v[c]);
    write(b.mean_row(c) + 1, dlog_scale.v[c]);
  }
  if constexpr (C == 3) {
    const P slope = T(1) - m.coef * m.coef;
    const Vec<T> red = load(b.x[0] + i), green = load(b.x[1] + i);
    write(3, slope.v[0] * dmean.v[1] * red);
    write(6, slope.v[1] * dmean.v[2] * red);
    write(9, slope.v[2] * dmean.v[2] * green);
  }
}

template <class T, int C>
static void logistic_backward(const LogisticMixtureBackward<T>& p, int64_t first, int64_t last) {
  const int64_t planes = p.in.planes(), P = p.in.P;
  Arena<T> arena(Scratch::task, (planes + C) * kLogisticPixels, planes * kLogisticPixels);
  T *const packed = arena.take((planes + C) * kLogisticPixels), *const unpacked = arena.take(planes * kLogisticPixels);
  LogisticBlock<T, C> b;
  const auto block = [&](int64_t image, int64_t pixel) {
    T grad[kLogisticPixels], over_sum[kLogisticPixels], level[kLogisticPixels], top[kLogisticPixels], prior[kLogisticPixels];
    const T* const stats = p.stats + 4 * image * P + pixel;
    for (int64_t i = 0; i < b.padded; ++i) {
      const bool counts = b.counts[i] != T(0);  // what does not weighs nothing
      grad[i] = counts ? p.grad[image * p.grad_stride] : T(0);
      level[i] = counts ? stats[i] : T(0);
      top[i] = counts ? stats[P + i] : T(0);
      over_sum[i] = counts ? grad[i] / stats[2 * P + i] : T(0);
      prior[i] = counts ? stats[3 * P + i] : T(0);
    }
    T* const out = p.dparams + image * planes * P + pixel;
    const bool past_cache = p.past_cache && b.whole;
    for (int64_t k = 0; k < b.K; ++k)
      for (int64_t i = 0; i < b.padded; i += kLanes<T>) {
        logistic_prefetch(b, k + 1, i, past_cache ? nullptr : out);
        const LogisticComponent<T, C> m(b, k, i);
        const Vec<T> logit = load(b.params + b.at(0, k, i)) - load(level + i);
        logistic_gradients(b, m, k, i, load(over_sum + i) * m.ratio * exp<T>(logit + m.linear - load(top + i)),
                           load(grad + i) * exp<T>(logit - load(prior + i)), b.whole ? out : unpacked, past_cache);
      }
    if (!b.whole)
      for (int64_t plane = 0; plane < planes; ++plane) std::copy_n(unpacked + plane * b.plane, b.n, out + plane * P);
  };
  for (int64_t part = first; part < last; ++part) logistic_blocks(p.in, part, packed, b, block);
  fence_stores();
}

template <class T>
static constexpr LogisticMixtureKernels<T> logistic_mixture_kernels() {
  return {[](const LogisticMixtureForward<T>& p, int64_t first, int64_t last) {
            (p.in.C == 3 ? logistic_forward<T, 3> : logistic_forward<T, 1>)(p, first, last);
          },
          [](const LogisticMixtureBackward<T>& p, int64_t first, int64_t last) {
            (p.in.C == 3 ? logistic_backward<T, 3> : logistic_backward<T, 1>)(p, first, last);
          }};
}
