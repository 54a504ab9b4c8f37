// Vectors of one native register, exp, log and transposition. Included inside the namespace of an instruction-set level,
// after LATENT_VECTOR_BYTES. Lanes are independent of one another and a reduction over lanes folds groups of 64 bytes in
// one fixed order, so levels with the same arithmetic (AVX2 and AVX-512, both with FMA) agree bit for bit.

template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Int = int32_t;
  typedef float Vec __attribute__((vector_size(LATENT_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(LATENT_VECTOR_BYTES), aligned(4), may_alias));
  typedef int32_t IntVec __attribute__((vector_size(LATENT_VECTOR_BYTES)));
  static constexpr int mantissa = 23;
  static constexpr Int one = 0x3f800000, sqrt_half = 0x3f3504f3;
  static constexpr float round = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer held in the low bits
  static constexpr float biased_round = round + 127;  // held there as the exponent of a float
  // ln 2 in two parts; the first has trailing zeros, so that n·hi is exact without FMA.
  static constexpr float ln2_hi = 0.69287109375f, ln2_lo = 2.7608680994530943e-04f;
  static constexpr float exp_min = -87.33654f, exp_max = 88.37626f;
  // (exp r − 1 − r) / r² on |r| ≤ ln2/2: minimax in the relative error of exp, 3.6e-9. (log((1+s)/(1−s)) − 2s) / s³ in s² on
  // s ≤ 0.1716: Chebyshev interpolant.
  static constexpr float exp_poly[] = {0.5f, 0.16666534543037415f, 0.041667237877845764f, 0.008367509581148624f,
                                       0.0013863756321370602f};
  static constexpr float log_poly[] = {0.6666666865348816f, 0.4000012278556824f, 0.28550779819488525f,
                                       0.23331613838672638f};
};

template <>
struct Simd<double> {
  using Int = int64_t;
  typedef double Vec __attribute__((vector_size(LATENT_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(LATENT_VECTOR_BYTES), aligned(8), may_alias));
  typedef int64_t IntVec __attribute__((vector_size(LATENT_VECTOR_BYTES)));
  static constexpr int mantissa = 52;
  static constexpr Int one = 0x3ff0000000000000, sqrt_half = 0x3fe6a09e667f3bcd;
  static constexpr double round = 6755399441055744.0, biased_round = round + 1023;  // 1.5·2^52
  static constexpr double ln2_hi = 0.6931471803691238, ln2_lo = 1.9082149292705877e-10;
  static constexpr double exp_min = -708.3964185322641, exp_max = 709.4361393;
  // Chebyshev interpolants of the same functions.
  static constexpr double exp_poly[] = {0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333326112,
                                        0.001388888888888373, 0.0001984126987490126, 2.4801587325605324e-05,
                                        2.7557255297969643e-06, 2.755727357010214e-07, 2.5105259538448494e-08,
                                        2.0914717341716378e-09};
  static constexpr double log_poly[] = {0.666666666666667,  0.3999999999989889,  0.28571428626253836, 0.22222211089379496,
                                        0.1818289243253687, 0.15331611722055008, 0.14617807153417325};
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
constexpr int kLanes = LATENT_VECTOR_BYTES / sizeof(T);
template <class T>
constexpr T kInf = __builtin_huge_valf();

template <class T>
static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
static inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

// A store to aligned memory that does not fetch the line first.
template <class T>
static inline void store_past_cache(T* p, Vec<T> v) {
  typedef float Floats __attribute__((vector_size(LATENT_VECTOR_BYTES)));
#if defined(__x86_64__) && LATENT_VECTOR_BYTES == 64
  __builtin_ia32_movntps512(reinterpret_cast<float*>(p), (Floats)v);
#elif defined(__x86_64__) && LATENT_VECTOR_BYTES == 32
  __builtin_ia32_movntps256(reinterpret_cast<float*>(p), (Floats)v);
#else
  store(p, v);
#endif
}

// Makes those stores visible to other threads.
static inline void fence_stores() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

template <class T, int bytes>
struct Sized {
  typedef T Vec __attribute__((vector_size(bytes)));
  typedef T Unaligned __attribute__((vector_size(bytes), aligned(sizeof(T)), may_alias));
};

// In is T or narrower. GCC makes four instructions of a conversion to 64 bytes.
template <class T, class In>
static inline Vec<T> widen(typename Sized<In, kLanes<T> * sizeof(In)>::Vec x) {
#if LATENT_VECTOR_BYTES == 64 && !defined(__clang__)
  if constexpr (sizeof(In) < sizeof(T)) return __builtin_ia32_cvtps2pd512_mask(x, Vec<double>{}, -1, 4);
#endif
  return __builtin_convertvector(x, Vec<T>);
}

// A vector of T from values of type In.
template <class T, class In>
static inline Vec<T> load_as(const In* p) {
  return widen<T, In>(*reinterpret_cast<const typename Sized<In, kLanes<T> * sizeof(In)>::Unaligned*>(p));
}

// The first n lanes at p, zero in the others.
template <class T>
static inline Vec<T> load_lanes(const T* p, int64_t n) {
  if (n >= kLanes<T>) return load(p);
  T lanes[kLanes<T>] = {};
  std::copy_n(p, n, lanes);
  return load(lanes);
}

template <class T>
static inline void store_lanes(T* p, int64_t n, Vec<T> v) {
  if (n >= kLanes<T>) return store(p, v);
  T lanes[kLanes<T>];
  store(lanes, v);
  std::copy_n(lanes, n, p);
}

template <class T>
static inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // folds to a broadcast: x − 0 = x for every x, where 0 + x is not for −0
}

// a where a > b, else b: a NaN in `a` is dropped, and must reach the result some other way.
template <class V>
static inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class T, int n, class V>
static inline V horner(const T (&c)[n], V x) {
  V p = x * c[n - 1] + c[n - 2];
  for (int i = n - 3; i >= 0; --i) p = p * x + c[i];
  return p;
}

// y · 2^n for integers n whose powers are normal; shifted = n + biased_round. AVX-512 has an instruction for it.
template <class T>
static inline Vec<T> scale(Vec<T> y, Vec<T> n, Vec<T> shifted) {
#if defined(__x86_64__) && LATENT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return __builtin_ia32_scalefps512_mask(y, n, y, -1, 4);
  else
    return __builtin_ia32_scalefpd512_mask(y, n, y, -1, 4);
#else
  return y * (Vec<T>)((typename Simd<T>::IntVec)shifted << Simd<T>::mantissa);
#endif
}

// e^x = fraction · 2^n; shifted = n + biased_round. V is one vector or several.
template <class T, class V = Vec<T>>
struct ReducedExp {
  V fraction, n, shifted;

  explicit ReducedExp(V x) {
    using S = Simd<T>;
    shifted = x * T(1.4426950408889634) + S::biased_round;
    n = shifted - S::biased_round;
    const V r = (x - n * S::ln2_hi) - n * S::ln2_lo;
    // The rounding of 1 + r is added back: 0.80 ULP in all, against 1.03 to 1.17 without.
    const V sum = r + T(1), rest = r - (sum - T(1));
    fraction = sum + (horner(S::exp_poly, r) * r * r + rest);
  }
};

// y, which is e^x where that and n are normal: 0 below the smallest normal result, infinity above 88.37 (709.43).
template <class T>
static inline Vec<T> exp_limits(Vec<T> x, Vec<T> y) {
  const Vec<T> clipped = x < Simd<T>::exp_min ? Vec<T>{} : y;
  return x > Simd<T>::exp_max ? broadcast<T>(kInf<T>) : clipped;
}

// e^x to 1 ULP, within exp_limits; NaN stays NaN.
template <class T>
static inline Vec<T> exp(Vec<T> x) {
  const ReducedExp<T> e(x);
  return exp_limits<T>(x, scale<T>(e.fraction, e.n, e.shifted));
}

// The same, and e^−x to 1.3 ULP for a division more.
template <class T>
static inline Vec<T> exp(Vec<T> x, Vec<T>& inverse) {
  using IntVec = typename Simd<T>::IntVec;
  const ReducedExp<T> e(x);
  inverse = exp_limits<T>(-x, (Vec<T>)(2 * Simd<T>::one - ((IntVec)e.shifted << Simd<T>::mantissa)) / e.fraction);
  return exp_limits<T>(x, scale<T>(e.fraction, e.n, e.shifted));
}

// log x to 1 ULP for normal x; log 0 = −inf, log inf = inf; NaN below 0 and for NaN.
template <class T>
static inline Vec<T> log(Vec<T> x) {
  using S = Simd<T>;
  using IntVec = typename S::IntVec;
  const IntVec bits = (IntVec)x;
  const IntVec exponent = (bits - S::sqrt_half) >> S::mantissa;
  const Vec<T> f = (Vec<T>)(bits - (exponent << S::mantissa)) - T(1);
  const Vec<T> magic = broadcast<T>(S::round);
  const Vec<T> n = (Vec<T>)((IntVec)magic + exponent) - magic;
  const Vec<T> s = f / (f + T(2)), w = s * s, half = f * f * T(0.5);
  const Vec<T> tail = s * (half + w * horner(S::log_poly, w)) + n * S::ln2_lo;
  Vec<T> y = n * S::ln2_hi + (f - (half - tail));
  y = x > T(0) ? y : broadcast<T>(__builtin_nanf(""));
  y = x == T(0) ? broadcast<T>(-kInf<T>) : y;
  return x == kInf<T> ? x : y;
}

template <class T>
static inline Vec<T> square_root(Vec<T> x) {
  Vec<T> y;
  for (int i = 0; i < kLanes<T>; ++i) y[i] = sizeof(T) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
  return y;
}

// y = f(x) over n values; x and y may be the same.
template <class T, Vec<T> (*f)(Vec<T>)>
static void apply(const T* x, T* y, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(y + i, f(load(x + i)));
  if (i == n) return;
  T lanes[kLanes<T>] = {};
  std::copy_n(x + i, n - i, lanes);
  store(lanes, f(load(lanes)));
  std::copy_n(lanes, n - i, y + i);
}

// Lanes first, first + 1, ... of v.
template <int first, class T, class V, int... i>
static inline auto lanes_from(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (first + i)...);
}

// Sum of the lanes of v, by halving: lane i with lane i + half.
template <class T, class V>
static inline T sum_halves(V v) {
  constexpr int half = sizeof(V) / sizeof(T) / 2;
  if constexpr (half == 1) {
    return v[0] + v[1];
  } else {
    using Indices = std::make_integer_sequence<int, half>;
    const typename Sized<T, half * sizeof(T)>::Vec low = lanes_from<0, T>(v, Indices{}), high = lanes_from<half, T>(v, Indices{});
    return sum_halves<T>(low + high);
  }
}

// 64 bytes of lanes held in 64 / LATENT_VECTOR_BYTES registers, halved until one register is left.
template <class T>
static inline Vec<T> fold_registers(const Vec<T> (&parts)[64 / LATENT_VECTOR_BYTES]) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> folded[registers];
  for (int i = 0; i < registers; ++i) folded[i] = parts[i];
#pragma GCC unroll 4
  for (int half = registers / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) folded[i] += folded[i + half];
  return folded[0];
}

// Sum over 64 bytes of lanes, in the order of sum_halves over one register.
template <class T>
static inline T sum_lanes(const Vec<T> (&parts)[64 / LATENT_VECTOR_BYTES]) {
  return sum_halves<T>(fold_registers<T>(parts));
}

// Blocks of w lanes of a, then of b, each folded to w / 2: lane i with lane i + w / 2.
template <int w, class V, int... i>
static inline V fold_blocks(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int half = w / 2;
  return __builtin_shufflevector(a, b, (i / half * w + i % half)...) +
         __builtin_shufflevector(a, b, (i / half * w + i % half + half)...);
}

// out[j] = sum over the lanes of v[j], in the order of sum_halves; shuffles shared by all n cost a quarter of n separate sums.
// `out` has room for whole vectors.
template <class T, int w = kLanes<T>, int n>
static inline void sum_halves_of(const Vec<T> (&v)[n], T* out) {
  if constexpr (w == 1) {
    for (int j = 0; j < n; ++j) store(out + j * kLanes<T>, v[j]);
  } else {
    Vec<T> folded[(n + 1) / 2];
#pragma GCC unroll 8
    for (int j = 0; j < n; j += 2)
      folded[j / 2] = fold_blocks<w>(v[j], v[j + 1 < n ? j + 1 : j], std::make_integer_sequence<int, kLanes<T>>{});
    sum_halves_of<T, w / 2>(folded, out);
  }
}

typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

// out[c·out_stride + r] = in[r·in_stride + c] for a 4 × 4 tile.
static inline void transpose_4x4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  using Index = int32_t __attribute__((vector_size(16)));
  Quad a[4], b[4];
  for (int i = 0; i < 4; ++i) a[i] = *reinterpret_cast<const Quad*>(in + i * in_stride);
  for (int i = 0; i < 2; ++i) {
    b[2 * i] = __builtin_shuffle(a[2 * i], a[2 * i + 1], Index{0, 4, 1, 5});
    b[2 * i + 1] = __builtin_shuffle(a[2 * i], a[2 * i + 1], Index{2, 6, 3, 7});
  }
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<Quad*>(out + 2 * i * out_stride) = __builtin_shuffle(b[i], b[i + 2], Index{0, 1, 4, 5});
    *reinterpret_cast<Quad*>(out + (2 * i + 1) * out_stride) = __builtin_shuffle(b[i], b[i + 2], Index{2, 3, 6, 7});
  }
}

// out[c·out_stride + r] = in[r·row_stride + c·col_stride].
template <class T>
static void transpose(const T* in, int64_t row_stride, int64_t col_stride, T* out, int64_t out_stride, int64_t rows,
                      int64_t cols) {
  const auto each = [&](int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t c = c0; c < c1; ++c) out[c * out_stride + r] = in[r * row_stride + c * col_stride];
  };
  if (!std::is_same<T, float>::value || col_stride != 1) return each(0, rows, 0, cols);
  constexpr int64_t block = 16;  // a cache line
  const auto tile = [&](int64_t r, int64_t c) {
    transpose_4x4((const float*)in + r * row_stride + c, row_stride, (float*)out + c * out_stride + r, out_stride);
  };
  const int64_t whole_rows = rows / 4 * 4, whole_cols = cols / 4 * 4;
  for (int64_t r0 = 0; r0 < whole_rows; r0 += block)
    for (int64_t c0 = 0; c0 < whole_cols; c0 += block) {
      // Lines that are far apart, often in one set of the cache, are finished four at a time.
      const int64_t r1 = std::min(whole_rows, r0 + block), c1 = std::min(whole_cols, c0 + block);
      if (row_stride > out_stride)
        for (int64_t r = r0; r < r1; r += 4)
          for (int64_t c = c0; c < c1; c += 4) tile(r, c);
      else
        for (int64_t c = c0; c < c1; c += 4)
          for (int64_t r = r0; r < r1; r += 4) tile(r, c);
    }
  each(0, whole_rows, whole_cols, cols);
  each(whole_rows, rows, 0, cols);
}
