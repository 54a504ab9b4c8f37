// See mmd.h: the kernels as functions of the squared distance, one profile each.

constexpr int64_t kMmdRational = 8;  // most scales that share one division: the polynomials' degree

// Π (1 + a_t v) over all t but `without`, as coefficients of v in `out`; returns their number.
static int64_t mmd_product(const double* a, int64_t scales, int64_t without, double* out) {
  int64_t n = 1;
  out[0] = 1;
  for (int64_t t = 0; t < scales; ++t) {
    if (t == without) continue;
    out[n] = 0;
    for (int64_t i = n; i > 0; --i) out[i] += a[t] * out[i - 1];
    ++n;
  }
  return n;
}

// Σ 1/(1 + a_s v) = P/Q and Σ a_s/(1 + a_s v)² = R/Q², with v = u / unit, a_s = unit / C_s and Q = Π (1 + a_s v). No
// coefficient is negative, so nothing cancels for v ≥ 0.
template <class T>
static void mmd_pack_rational(MmdProfile<T>& p, const double* widths, T* numerator, T* denominator, T* slope) {
  const int64_t S = p.scales;
  p.limit = -1;
  if (S > kMmdRational) return;
  const double least = *std::min_element(widths, widths + S), greatest = *std::max_element(widths, widths + S);
  if (greatest > 1e4 * least) return;
  double a[kMmdRational], product[kMmdRational + 1];
  const double unit = std::sqrt(least) * std::sqrt(greatest), most = sizeof(T) == 4 ? 1e17 : 1e140;
  if (unit * most < 1) return;  // the slope's coefficients, by 1 / unit, would overflow
  for (int64_t s = 0; s < S; ++s) a[s] = unit / widths[s];
  double sums[3 * kMmdRational] = {}, *const squares = sums + S;
  for (int64_t s = 0; s < S; ++s) {
    const int64_t n = mmd_product(a, S, s, product);
    for (int64_t i = 0; i < n; ++i) {
      const double factor = a[s] / unit * product[i];
      sums[i] += product[i];
      for (int64_t j = 0; j < n; ++j) squares[i + j] += factor * product[j];
    }
  }
  std::copy_n(sums, S, numerator);
  std::copy_n(squares, 2 * S - 1, slope);
  std::copy_n(product, mmd_product(a, S, -1, product), denominator);
  const auto value = [&](double v) {
    double q = 1;
    for (int64_t s = 0; s < S; ++s) q *= 1 + a[s] * v;
    return q;
  };
  double v = 1;
  while (value(2 * v) <= most) v *= 2;
  p.unit = unit, p.limit = v * unit, p.numerator = numerator, p.denominator = denominator, p.slope = slope;
}

template <class T>
static void mmd_pack_profile(MmdProfile<T>& p, const double* scales, double unit, T* memory) {
  const int64_t S = p.scales;
  T *const widths = memory, *const rates = memory + S;
  p.widths = widths, p.rates = rates, p.unit = unit, p.limit = 0;
  const double most = sizeof(T) == 4 ? 0x1p120 : 0x1p1000;  // four times it is finite
  double exact[kMmdRational], greatest = 0;
  for (int64_t s = 0; s < S; ++s) {
    const double width = unit * scales[s], rate = 1 / (p.kernel == MmdKernel::laplacian ? std::sqrt(width) : width);
    widths[s] = std::clamp(p.kernel == MmdKernel::rational_quadratic ? scales[s] : width, 1 / most, most);
    rates[s] = std::min(rate, most), greatest = std::max(greatest, rate);
    if (s < kMmdRational) exact[s] = width;
  }
  // Products with slopes of far pairs would leave the normal numbers, 150 cycles a vector on Intel processors; flushed to zero,
  // they would be missing from gradients that are small themselves. Steep slopes have no room above.
  p.slope_unit = greatest * S <= 0x1p40 ? T(0x1p40) : T(1);
  if (p.kernel == MmdKernel::imq) mmd_pack_rational(p, exact, memory + 2 * S, memory + 3 * S, memory + 4 * S + 1);
}

// The profiles: f = k(u) and, if `with_slope`, g = −factor dk/du, for v vectors of squared distances.
struct MmdGaussian {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, T factor, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
    for (int64_t s = 0; s < p.scales; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const Vec<T> e = exp<T>(-u[i] * p.rates[s]);
        f[i] += e;
        if (with_slope) g[i] += e * (p.rates[s] * factor);
      }
  }
};

struct MmdLaplacian {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, T factor, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) {
      const Vec<T> r = square_root<T>(u[i]);
      for (int64_t s = 0; s < p.scales; ++s) {
        const Vec<T> e = exp<T>(-r * p.rates[s]);
        f[i] += e;
        if (with_slope) g[i] += e * (p.rates[s] * factor);
      }
      if (with_slope) g[i] = u[i] == T(0) ? Vec<T>{} : g[i] * T(0.5) / r;
    }
  }
};

struct MmdEnergy {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>&, T factor, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) {
      const Vec<T> r = square_root<T>(u[i]);
      f[i] = -r;
      if (with_slope) g[i] = u[i] == T(0) ? Vec<T>{} : T(0.5) * factor / r;
    }
  }
};

struct MmdRationalQuadratic {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, T factor, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
    for (int64_t s = 0; s < p.scales; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const Vec<T> base = u[i] * p.rates[s] + T(1), k = exp<T>(-p.widths[s] * log<T>(base));
        f[i] += k;
        if (with_slope) g[i] += k * factor / (base * p.unit);
      }
  }
};

// One division a scale: for points so far apart that the polynomials would overflow, and many or very different scales.
struct MmdInverse {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, T factor, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
    for (int64_t s = 0; s < p.scales; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const Vec<T> k = p.widths[s] / (u[i] + p.widths[s]);
        f[i] += k;
        if (with_slope) g[i] += k * (p.rates[s] * factor) * k;
      }
  }
};

// One division for all scales: seven divisions would take as long as the distances at D = 64.
struct MmdInverseRational {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, T factor, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
    const int64_t S = p.scales;
    Vec<T> x[v], over[v], under[v];
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) {
      x[i] = u[i] * (T(1) / p.unit);
      over[i] = broadcast(p.numerator[S - 1]);
      under[i] = x[i] * p.denominator[S] + p.denominator[S - 1];
    }
    for (int64_t s = S - 2; s >= 0; --s) {
      const Vec<T> a = broadcast(p.numerator[s]), b = broadcast(p.denominator[s]);
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) over[i] = over[i] * x[i] + a, under[i] = under[i] * x[i] + b;
    }
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) under[i] = T(1) / under[i], f[i] = over[i] * under[i];
    if (!with_slope) return;
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) g[i] = broadcast(p.slope[2 * S - 2]);
    for (int64_t s = 2 * S - 3; s >= 0; --s) {
      const Vec<T> a = broadcast(p.slope[s]);
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) g[i] = g[i] * x[i] + a;
    }
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) g[i] = g[i] * (under[i] * factor) * under[i];
  }
};
