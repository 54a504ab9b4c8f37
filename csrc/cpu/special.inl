// Functions that keep their relative accuracy where exp and log would cancel, and the Gamma function's remainders.

template <class T>
using IntVec = typename Simd<T>::IntVec;

// The larger one, b where one is NaN. GCC makes two instructions of a comparison and a choice for AVX-512, 8 % of a sum.
template <class T>
static inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if LATENT_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return __builtin_ia32_maxps512_mask(a, b, b, -1, 4);
  else
    return __builtin_ia32_maxpd512_mask(a, b, b, -1, 4);
#else
  return a > b ? a : b;
#endif
}

template <class T>
static inline Vec<T> absolute(Vec<T> x) {
  return (Vec<T>)((IntVec<T>)x & ~(IntVec<T>)broadcast(T(-0.0)));
}

template <class T>
static inline bool any(IntVec<T> lanes) {
  typename Simd<T>::Int found = 0;
  for (int i = 0; i < kLanes<T>; ++i) found |= lanes[i];
  return found;
}

// −|x|.
template <class T>
static inline Vec<T> minus_absolute(Vec<T> x) {
  return (Vec<T>)((IntVec<T>)x | (IntVec<T>)broadcast(T(-0.0)));
}

// e^x = power · (1 + rest) for x ≤ 0, or below the overflow, with a power of two; rest = excess + x where that is 1. At least
// the smallest normal number; NaN stays NaN.
template <class T>
struct NonpositiveExp {
  Vec<T> power, rest, excess;

  explicit NonpositiveExp(Vec<T> x) {
    using S = Simd<T>;
    x = maximum<T>(broadcast<T>(S::exp_min), x);
    const Vec<T> shifted = x * T(1.4426950408889634) + S::biased_round;
    const Vec<T> n = shifted - S::biased_round;
    const Vec<T> r = (x - n * S::ln2_hi) - n * S::ln2_lo;
    excess = horner(S::exp_poly, r) * r * r;
    rest = excess + r;
    power = (Vec<T>)((IntVec<T>)shifted << S::mantissa);
  }
};

// e^x for x ≤ 0 to 1.2 ULP: a sum of it with 1 needs no more.
template <class T>
static inline Vec<T> exp_nonpositive(Vec<T> x) {
  const NonpositiveExp<T> e(x);
  return e.rest * e.power + e.power;
}

// e^x − 1 below the overflow of e^x.
template <class T>
static inline Vec<T> expm1(Vec<T> x) {
  const NonpositiveExp<T> e(x);
  return e.rest * e.power + (e.power - T(1));
}

// log(1 + x) for x ≥ −1.
template <class T>
static inline Vec<T> log1p(Vec<T> x) {
  const Vec<T> sum = x + T(1);
  const Vec<T> lost = x > T(1) ? T(1) - (sum - x) : x - (sum - T(1));
  const Vec<T> corrected = log<T>(sum) + lost / sum;
  return sum > T(0) && sum < kInf<T> ? corrected : log<T>(sum);
}

// log(ratio) − excess with ratio = 1 + excess, where both are known to full relative accuracy. Near 1, with s = u / (2 + u),
// log(1 + u) = 2 s + s³ p(s²) and u − 2 s = u s.
template <class T>
static inline Vec<T> log_minus_excess(Vec<T> ratio, Vec<T> excess) {
  const Vec<T> s = excess / (excess + T(2)), w = s * s;
  const Vec<T> near = s * (w * horner(Simd<T>::log_poly, w) - excess);
  return absolute<T>(excess) < T(0.28) ? near : log<T>(ratio) - excess;
}

template <class T>
struct Stirling;

// Chebyshev interpolants in y = 2 / z − 1 on z ≥ 1 of z Δ(z) and z² κ(z): absolute errors 1e-8 and 1.3e-16, 1.2e-8 and
// 1.4e-16.
template <>
struct Stirling<float> {
  static constexpr float log_gamma[] = {0.082681395f, -0.0012300297f, -0.00048512753f, 0.00010094114f,
                                        -1.0825335e-06f, -6.8441577e-06f, 2.222171e-06f};
  static constexpr float digamma[] = {0.08145138f, -0.0034302648f, -0.0011529917f, 0.00039850007f, -3.8553582e-05f,
                                      -2.4813664e-05f, 1.5650952e-05f, -2.2599133e-06f, -9.868546e-07f};
};

template <>
struct Stirling<double> {
  static constexpr double log_gamma[] = {
      0.0826813919108186, -0.0012300100649046326, -0.0004851043881019808, 0.0001007682992787303,
      -1.2621642337323135e-06, -6.4040403615528315e-06, 2.5473647281704276e-06, -4.2742649642172823e-07,
      -1.171583515055045e-07, 1.3008331336973527e-07, -5.996288164341892e-08, 1.508305466261164e-08,
      1.4723913693955638e-09, -3.6256642902944254e-09, 2.489599475846571e-09, -2.035755673755559e-09,
      9.792497793504378e-10, 4.1231828962927974e-10, -5.268041038864158e-10, 4.6214562549677206e-11,
      4.791582994547638e-11};
  static constexpr double digamma[] = {
      0.08145138184591268, -0.0034302289060162755, -0.0011530082661867322, 0.0003980245404843028,
      -3.8331033334696815e-05, -2.3140062187105524e-05, 1.4839714981186384e-05, -4.3565772152108764e-06,
      1.1525453563004736e-07, 7.005483191749084e-07, -4.891722247569591e-07, 2.0115543716235594e-07,
      -3.972777156929647e-08, -2.1726818237887686e-08, 2.6239483765085527e-08, -8.427717178436489e-09,
      3.253431954771491e-09, -9.54209278409324e-09, 3.946456971503417e-09, 5.543694710912344e-09,
      -3.6225713378332025e-09, -7.617886992936099e-10, 6.847199747212951e-10};
};

// The two remainders are not inlined: after the branch in them the levels would contract products into FMAs differently.
//
// Δ(z) = log Γ(z) − (z − ½) log z + z − ½ log 2π for z > 0; below 1 by Δ(z) = Δ(z + 1) + (z + ½) log(1 + 1/z) − 1.
template <class T>
__attribute__((noinline)) static Vec<T> log_gamma_remainder(Vec<T> z) {
  const auto small = z < T(1);
  const Vec<T> inverse = T(1) / (small ? z + T(1) : z);
  Vec<T> y = inverse * horner(Stirling<T>::log_gamma, inverse + (inverse - T(1)));
  if (any<T>(small)) y += small ? (z + T(0.5)) * log1p<T>(T(1) / z) - T(1) : Vec<T>{};
  return y;
}

// κ(z) = log z − 1 / (2z) − ψ(z) = −Δ'(z) for z > 0.
template <class T>
__attribute__((noinline)) static Vec<T> digamma_remainder(Vec<T> z) {
  const auto small = z < T(1);
  const Vec<T> shifted = small ? z + T(1) : z, inverse = T(1) / shifted;
  Vec<T> y = inverse * inverse * horner(Stirling<T>::digamma, inverse + (inverse - T(1)));
  if (any<T>(small)) y += small ? T(0.5) * (T(1) / z + inverse) - log1p<T>(T(1) / z) : Vec<T>{};
  return y;
}
