// One struct a likelihood; formulas and notation are in kernels/likelihood.py. `derive` turns the second parameter into the
// numbers d that the rest needs, once where all rows share it; `Sum` adds up one vector after the other, at most
// kBlockGroups of them; `gradient` is that of the log-density of each feature, with respect to x, a and b.

template <class T, bool masked>
static inline Vec<T> keep(IntVec<T> observed, Vec<T> v) {
  return masked ? (Vec<T>)((IntVec<T>)v & observed) : v;
}

template <class T>
struct Gradients {
  Vec<T> x, a, b;
};

// Σ log(1 + e) as log(1 + q) with 1 + q = Π(1 + e), to full relative accuracy: one log for many e ≤ 1.
template <class T>
struct LogProduct {
  Vec<T> q{};

  void add(Vec<T> e) { q = q + e + q * e; }
  Vec<T> log() const { return log1p<T>(q); }
};

struct Bernoulli {
  static constexpr int derived = 0;

  template <class T, bool gradient>
  static void derive(Vec<T>, Vec<T>*) {}

  template <class T>
  struct Sum {
    Vec<T> sum{};
    LogProduct<T> product;

    template <bool masked>
    void add(Vec<T> x, Vec<T> logit, const Vec<T>*, IntVec<T> observed) {
      sum += keep<T, masked>(observed, x * logit - maximum<T>(logit, Vec<T>{}));
      product.add(keep<T, masked>(observed, exp_nonpositive<T>(minus_absolute<T>(logit))));
    }
    Vec<T> total() const { return sum - product.log(); }
  };

  template <class T>
  static Gradients<T> gradient(Vec<T> x, Vec<T> logit, const Vec<T>*, Vec<T> g) {
    const Vec<T> e = exp_nonpositive<T>(minus_absolute<T>(logit)), tail = e / (T(1) + e);
    const Vec<T> error = logit > T(0) ? (x - T(1)) + tail : x - tail;  // x − sigmoid(logit), without cancellation
    return {g * logit, g * error, Vec<T>{}};
  }
};

struct Gaussian {
  static constexpr int derived = 2;  // 1/σ and log(2π σ²): δ/σ is finite where 1/σ² is not

  template <class T, bool gradient>
  static void derive(Vec<T> log_var, Vec<T>* d) {
    d[0] = exp<T>(T(-0.5) * log_var);
    d[1] = log_var + T(1.8378770664093453);
  }

  template <class T>
  struct Sum {
    Vec<T> sum{};

    template <bool masked>
    void add(Vec<T> x, Vec<T> mean, const Vec<T>* d, IntVec<T> observed) {
      const Vec<T> t = (x - mean) * d[0];
      sum += keep<T, masked>(observed, t * t + d[1]);
    }
    Vec<T> total() const { return T(-0.5) * sum; }
  };

  template <class T>
  static Gradients<T> gradient(Vec<T> x, Vec<T> mean, const Vec<T>* d, Vec<T> g) {
    const Vec<T> t = (x - mean) * d[0], dmean = g * (t * d[0]);
    return {-dmean, dmean, g * (T(0.5) * (t * t) - T(0.5))};
  }
};

struct DiscretizedLogistic {
  static constexpr int derived = 2;  // 1/s and log(1 − e^−w), for the gradient w / (e^w − 1), with w the width of a bin

  static constexpr double half_bin = 1.0 / 255, edge = 1 - half_bin;

  template <class T, bool gradient>
  static void derive(Vec<T> log_scale, Vec<T>* d) {
    const Vec<T> w = exp<T>(T(-4.848116364598481) - log_scale), below = -expm1<T>(-w);  // log(2/255) − log s
    constexpr T narrow = sizeof(T) == 4 ? T(1e-3) : T(1e-7);
    d[0] = exp<T>(-log_scale);
    if (gradient)
      d[1] = w < narrow ? T(1) - T(0.5) * w : (w < -Simd<T>::exp_min ? w * (T(1) - below) / below : Vec<T>{});
    else
      d[1] = w < narrow ? T(-4.848116364598481) - log_scale - T(0.5) * w : log<T>(below);
  }

  template <class T>
  struct Sum {
    Vec<T> sum{};
    LogProduct<T> lower, upper;

    template <bool masked>
    void add(Vec<T> x, Vec<T> mean, const Vec<T>* d, IntVec<T> observed) {
      const Vec<T> centred = x - mean, zero{};
      const Vec<T> plus = d[0] * (centred + T(half_bin)), minus = d[0] * (centred - T(half_bin));
      const IntVec<T> below = x < T(-edge), above = x > T(edge);
      const Vec<T> smaller = plus < zero ? plus : zero;
      const IntVec<T> inside = masked ? observed : ~IntVec<T>{};
      const IntVec<T> has_upper = ~above & inside, has_lower = ~below & inside;
      sum += keep<T, true>(has_upper, smaller) - keep<T, true>(has_lower, maximum<T>(minus, zero)) +
             keep<T, true>(has_upper & has_lower, d[1]);
      upper.add(keep<T, true>(has_upper, exp_nonpositive<T>(minus_absolute<T>(plus))));
      lower.add(keep<T, true>(has_lower, exp_nonpositive<T>(minus_absolute<T>(minus))));
    }
    Vec<T> total() const { return sum - upper.log() - lower.log(); }
  };

  template <class T>
  static Gradients<T> gradient(Vec<T> x, Vec<T> mean, const Vec<T>* d, Vec<T> g) {
    const Vec<T> centred = x - mean, one = broadcast(T(1));
    const Vec<T> plus = d[0] * (centred + T(half_bin)), minus = d[0] * (centred - T(half_bin));
    const IntVec<T> below = x < T(-edge), above = x > T(edge);
    const Vec<T> e_plus = exp_nonpositive<T>(minus_absolute<T>(plus)), e_minus = exp_nonpositive<T>(minus_absolute<T>(minus));
    // 1 − sigmoid(plus) and sigmoid(minus)
    const Vec<T> upper = keep<T, true>(~above, (plus > T(0) ? e_plus : one) / (T(1) + e_plus));
    const Vec<T> lower = keep<T, true>(~below, (minus > T(0) ? one : e_minus) / (T(1) + e_minus));
    const Vec<T> width = keep<T, true>(~above & ~below, d[1]);
    return {Vec<T>{}, g * (d[0] * (lower - upper)), g * (minus * lower - width - plus * upper)};
  }
};

struct NegativeBinomial {
  // (x + r) / (μ + r) underflows at x = 0 and r ≪ μ, where r log of it still vanishes.
  template <class T>
  static Vec<T> normal(Vec<T> ratio) {
    return maximum<T>(broadcast(sizeof(T) == 4 ? T(1.1754943508222875e-38) : T(2.2250738585072014e-308)), ratio);
  }

  static constexpr int derived = 3;  // r, 1/max(r, 1), and ½ log min(r, 1) − Δ(r) − ½ log 2π, for the gradient κ(r)

  template <class T, bool gradient>
  static void derive(Vec<T> log_dispersion, Vec<T>* d) {
    d[0] = exp<T>(log_dispersion);
    const Vec<T> above = maximum<T>(log_dispersion, Vec<T>{});  // log max(r, 1)
    d[1] = exp<T>(-above);
    d[2] = gradient ? digamma_remainder<T>(d[0])
                    : T(0.5) * (log_dispersion - above) - (log_gamma_remainder<T>(d[0]) + T(0.9189385332046727));
  }

  template <class T>
  struct Sum {
    Vec<T> sum{};

    template <bool masked>
    void add(Vec<T> x, Vec<T> mean, const Vec<T>* d, IntVec<T> observed) {
      const Vec<T> r = d[0], inverse = T(1) / (mean + r);
      const Vec<T> count = x > T(0) ? x : broadcast(T(1)), per_count = T(1) / count;
      const Vec<T> below = r < T(1) ? r : broadcast(T(1));
      const Vec<T> u = (x - mean) * inverse, ratio = normal<T>((x + r) * inverse);
      const Vec<T> common = r * log_minus_excess<T>(ratio, u);
      const Vec<T> own = count * log_minus_excess<T>(mean * per_count * ratio, -r * u * per_count);
      const Vec<T> gammas = d[2] + log_gamma_remainder<T>(count + r) - log_gamma_remainder<T>(count) -
                            T(0.5) * log<T>(count * (below + count * d[1]));  // count²/r may overflow
      sum += keep<T, masked>(observed, common + (x > T(0) ? own + gammas : r * u));
    }
    Vec<T> total() const { return sum; }
  };

  template <class T>
  static Gradients<T> gradient(Vec<T> x, Vec<T> mean, const Vec<T>* d, Vec<T> g) {
    const Vec<T> r = d[0], inverse = T(1) / (mean + r), sum = x + r;
    const Vec<T> u = (x - mean) * inverse, zero{};
    const Vec<T> dmean = x > T(0) ? r * u / mean : -r * inverse;
    const Vec<T> gammas = T(0.5) * x / sum + r * (d[2] - digamma_remainder<T>(x > T(0) ? sum : r));
    return {Vec<T>{}, g * dmean, g * (r * log_minus_excess<T>(normal<T>(sum * inverse), u) + (x > T(0) ? gammas : zero))};
  }
};
