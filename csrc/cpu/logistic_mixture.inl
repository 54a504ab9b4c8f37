// See logistic_mixture.h. Pixels lie across lanes, so that every plane of parameters is read and written in order; a block
// of pixels takes one component after the other. Per pixel and component of three channels forward costs nine exps (two a
// channel, one a coefficient), one logarithm of a product over the channels, and 42 FMAs of polynomials; the two
// log-sum-exps over components add two exps.

constexpr int64_t kLogisticPixels = 64;  // pixels of a block

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
constexpr T kHalfBin = T(1) / T(255);
template <class T>
constexpr T kMinLogScale = T(-7);

template <class T>
static inline Vec<T> magnitude(Vec<T> x) {
  return x < T(0) ? -x : x;
}

// tanh x = −(e^(−2|x|) − 1) / (e^(−2|x|) + 1) with the sign of x, from e^r − 1 so that small x keep their digits.
template <class T>
static inline Vec<T> tanh(Vec<T> x) {
  using S = Simd<T>;
  using IntVec = typename S::IntVec;
  const Vec<T> size = magnitude<T>(x), limit = broadcast(T(20)), z = T(-2) * (size > limit ? limit : size);
  const Vec<T> shifted = z * T(1.4426950408889634) + S::round;
  const Vec<T> n = shifted - S::round;
  const Vec<T> r = (z - n * S::ln2_hi) - n * S::ln2_lo;
  const Vec<T> scale = (Vec<T>)(((IntVec)shifted << S::mantissa) + S::one);
  const Vec<T> minus_one = (horner(S::exp_poly, r) * r * r + r) * scale + (scale - T(1));
  const Vec<T> y = minus_one / (minus_one + T(2));
  return x < T(0) ? y : -y;
}

// A block of pixels: their channels, and where their parameters lie.
template <class T, int C>
struct LogisticBlock {
  T x[C][kLogisticPixels];       // levels
  T centre[C][kLogisticPixels];  // of the bin; of an open bin, its inner edge
  T side[C][kLogisticPixels];    // 1 for the bin open to −∞, −1 for that open to ∞, else 0
  T counts[kLogisticPixels];     // 1 for the pixels that count, else 0
  int64_t n, padded;             // pixels, also in whole groups
  const T* params;               // of the first pixel
  int64_t plane, K;              // distance of planes; their number a row

  static constexpr int rows = C == 3 ? 10 : 3;
  static constexpr int mean_row(int c) { return 1 + 3 * c; }  // its log-scale and coefficient follow
  int64_t at(int row, int64_t k, int64_t i) const { return (row * K + k) * plane + i; }
};

// One component at one vector of pixels: log P and, by channel, what its gradients need.
template <class T, int C>
struct LogisticComponent {
  Vec<T> log_prob, coef[C];  // coefficients after tanh: green on red, blue on red, blue on green
  Vec<T> log_scale[C], inv[C], t[C], y2[C], u[C], sinh[C], cosh[C], den[C];

  LogisticComponent(const LogisticBlock<T, C>& b, int64_t k, int64_t i) {
    const T log_2h = T(-4.8481163645984805);  // log(2/255)
    Vec<T> linear{}, num = broadcast(T(1)), product = num;
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) {
      Vec<T> mean = load(b.params + b.at(b.mean_row(c), k, i));
      log_scale[c] = load(b.params + b.at(b.mean_row(c) + 1, k, i));
      if (C > 1) coef[c] = tanh<T>(load(b.params + b.at(b.mean_row(c) + 2, k, i)));
      if (c == 1) mean += coef[0] * load(b.x[0] + i);
      if (c == 2) mean += coef[1] * load(b.x[0] + i) + coef[2] * load(b.x[1] + i);
      const Vec<T> clamped = larger(broadcast(kMinLogScale<T>), log_scale[c]), side = load(b.side[c] + i);
      inv[c] = exp<T>(-clamped);
      const Vec<T> y = kHalfBin<T> * inv[c];
      y2[c] = y * y;
      sinh[c] = horner(LogisticPoly<T>::sinh, y2[c]);
      cosh[c] = horner(LogisticPoly<T>::cosh, y2[c]);
      t[c] = (load(b.centre[c] + i) - mean) * inv[c];
      const Vec<T> size = magnitude<T>(t[c]), towards = side * t[c];
      u[c] = exp<T>(-size);
      den[c] = T(1) + u[c] * (side != T(0) ? broadcast(T(1)) : u[c] + cosh[c]);
      linear += side != T(0) ? (towards < T(0) ? towards : Vec<T>{}) : log_2h - clamped - size;
      num *= side != T(0) ? broadcast(T(1)) : sinh[c];
      product *= den[c];
    }
    log_prob = linear + log<T>(num / product);
  }
};

// Pixels [pixel, pixel + n) of an image. Parameters of a broken group, or with pixels that do not count, are packed: their
// planes lie kLogisticPixels apart and hold 0 for what does not count.
template <class T, int C>
static void logistic_load(const LogisticMixture<T>& in, int64_t image, int64_t pixel, int64_t n, T* packed,
                          LogisticBlock<T, C>& b) {
  const int64_t planes = in.planes(), row = image % in.N;
  b.n = n, b.padded = round_up(n, kGroup<T>), b.K = in.K;
  bool whole = n == b.padded;
  for (int64_t i = 0; i < b.padded; ++i) b.counts[i] = i < n && (!in.mask || in.mask[row * in.P + pixel + i]);
  for (int64_t i = 0; i < n; ++i) whole &= b.counts[i] != T(0);
  for (int c = 0; c < C; ++c) {
    const T* x = in.x + (row * C + c) * in.P + pixel;
    for (int64_t i = 0; i < b.padded; ++i) {
      const T level = b.counts[i] != T(0) ? x[i] : T(0);
      const T side = T(level < kHalfBin<T> - T(1)) - T(level > T(1) - kHalfBin<T>);
      b.x[c][i] = level, b.side[c][i] = side, b.centre[c][i] = level + side * kHalfBin<T>;
    }
  }
  const T* params = in.params + image * planes * in.P + pixel;
  b.params = whole ? params : packed, b.plane = whole ? in.P : kLogisticPixels;
  if (whole) return;
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t i = 0; i < b.padded; ++i) packed[p * kLogisticPixels + i] = b.counts[i] != T(0) ? params[p * in.P + i] : T(0);
}

template <class T, int C>
static void logistic_forward(const LogisticMixtureForward<T>& p, int64_t first, int64_t last) {
  const LogisticMixture<T>& in = p.in;
  constexpr int64_t stride = kLogisticPixels;
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Arena<T> arena(Scratch::task, in.planes() * stride, in.K * stride, 6 * stride);
  T *const packed = arena.take(in.planes() * stride), *const logits = arena.take(in.K * stride), *const top = arena.take(6 * stride);
  T *const sum = top + stride, *const log_sum[2] = {top + 2 * stride, top + 3 * stride};
  LogisticBlock<T, C> b;
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / in.parts(), begin = item % in.parts() * kLogisticPart, end = std::min(in.P, begin + kLogisticPart);
    Vec<T> total[registers] = {};
    for (int64_t pixel = begin; pixel < end; pixel += stride) {
      logistic_load(in, image, pixel, std::min(stride, end - pixel), packed, b);
      for (int64_t k = 0; k < in.K; ++k)
        for (int64_t i = 0; i < b.padded; i += kLanes<T>)
          store(logits + k * stride + i, load(b.params + b.at(0, k, i)) + LogisticComponent<T, C>(b, k, i).log_prob);
      for (int half = 0; half < 2; ++half) {
        std::fill_n(top, stride, -kInf<T>);
        std::fill_n(sum, stride, T(0));
        gmm_fold(half ? b.params : logits, half ? b.plane : stride, in.K, b.padded, top, sum);
        gmm_log_sum(top, sum, b.padded, log_sum[half]);
        if (p.log_sums) std::copy_n(log_sum[half], b.n, p.log_sums + (2 * image + half) * in.P + pixel);
      }
      for (int64_t i = 0; i < b.padded; i += 64 / sizeof(T))
        for (int r = 0; r < registers; ++r) {
          const int64_t j = i + r * kLanes<T>;
          total[r] += load(b.counts + j) != T(0) ? load(log_sum[0] + j) - load(log_sum[1] + j) : Vec<T>{};
        }
    }
    p.sums[item] = sum_lanes<T>(total);
  }
}

// The gradients of one component at one vector of pixels, of which `weight` is g r_k and `share` g π_k, to the planes that
// start at `out`.
template <class T, int C>
static inline void logistic_gradients(const LogisticBlock<T, C>& b, const LogisticComponent<T, C>& comp, int64_t k, int64_t i,
                                      Vec<T> weight, Vec<T> share, T* out) {
  store(out + b.at(0, k, i), weight - share);
#pragma GCC unroll 3
  for (int c = 0; c < C; ++c) {
    const Vec<T> side = load(b.side[c] + i), t = comp.t[c], u = comp.u[c], inv_den = T(1) / comp.den[c];
    const Vec<T> inside = (u * u - T(1)) * inv_den, open = (side * t < T(0) ? broadcast(T(1)) : u) * inv_den * side;
    const Vec<T> dt = side != T(0) ? open : (t < T(0) ? -inside : inside);
    const Vec<T> width = T(2) * u * comp.y2[c] * comp.sinh[c] * inv_den - T(0.5) * comp.cosh[c] / comp.sinh[c];
    const Vec<T> dlog_scale = (side != T(0) ? Vec<T>{} : width) - t * dt, dmean = -weight * comp.inv[c] * dt;
    store(out + b.at(b.mean_row(c), k, i), dmean);
    store(out + b.at(b.mean_row(c) + 1, k, i), comp.log_scale[c] < kMinLogScale<T> ? Vec<T>{} : weight * dlog_scale);
    if (c == 1) store(out + b.at(3, k, i), dmean * load(b.x[0] + i) * (T(1) - comp.coef[0] * comp.coef[0]));
    if (c == 2)
      for (int j = 1; j < 3; ++j)
        store(out + b.at(3 * j + 3, k, i), dmean * load(b.x[j - 1] + i) * (T(1) - comp.coef[j] * comp.coef[j]));
  }
}

template <class T, int C>
static void logistic_backward(const LogisticMixtureBackward<T>& p, int64_t first, int64_t last) {
  const LogisticMixture<T>& in = p.in;
  const int64_t planes = in.planes();
  constexpr int64_t stride = kLogisticPixels;
  Arena<T> arena(Scratch::task, planes * stride, planes * stride, 3 * stride);
  T *const packed = arena.take(planes * stride), *const unpacked = arena.take(planes * stride), *const grad = arena.take(3 * stride);
  T *const log_sum[2] = {grad + stride, grad + 2 * stride};
  LogisticBlock<T, C> b;
  for (int64_t item = first; item < last; ++item) {
    const int64_t image = item / in.parts(), begin = item % in.parts() * kLogisticPart, end = std::min(in.P, begin + kLogisticPart);
    for (int64_t pixel = begin; pixel < end; pixel += stride) {
      logistic_load(in, image, pixel, std::min(stride, end - pixel), packed, b);
      for (int64_t i = 0; i < b.padded; ++i) {
        const bool counts = b.counts[i] != T(0);
        grad[i] = counts ? p.grad[image * p.grad_stride] : T(0);
        for (int half = 0; half < 2; ++half)
          log_sum[half][i] = counts ? p.log_sums[(2 * image + half) * in.P + pixel + i] : T(0);
      }
      T* const out = p.dparams + image * planes * in.P + pixel;
      T* const to = b.params == packed ? unpacked : out;
      for (int64_t k = 0; k < in.K; ++k)
        for (int64_t i = 0; i < b.padded; i += kLanes<T>) {
          const LogisticComponent<T, C> comp(b, k, i);
          const Vec<T> logit = load(b.params + b.at(0, k, i)), g = load(grad + i);
          logistic_gradients(b, comp, k, i, g * exp<T>(logit + comp.log_prob - load(log_sum[0] + i)),
                             g * exp<T>(logit - load(log_sum[1] + i)), to);
        }
      if (to == unpacked)
        for (int64_t plane = 0; plane < planes; ++plane) std::copy_n(unpacked + plane * stride, b.n, out + plane * in.P);
    }
  }
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
