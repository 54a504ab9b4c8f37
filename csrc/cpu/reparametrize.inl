// See reparametrize.h. Elements are independent of one another: a vector of a row takes all its samples in turn, whose sums stay
// in registers.

// Calls f(i, n) for the vectors of a row, n lanes from element i. Of a row that is long enough the last one reaches back over
// elements that it makes once more, which costs less than one that is filled and emptied in part.
template <class T, class F>
static inline void for_each_vector(int64_t D, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= D; i += kLanes<T>) f(i, kLanes<T>);
  if (i < D && i > 0) f(D - kLanes<T>, kLanes<T>);
  if (i < D && i == 0) f(0, D);
}

// Of v = log σ², with h = v / 2: σ = e^h, from 0 to infinity, and e^v − 1 and e^v − 1 − v to 4 eps of them, from u = e^h − 1 and
// u − h. The latter is what the polynomial of exp adds to h where that needs no reduction, to 2 eps in float32.
template <class T>
struct ReparametrizeScale {
  Vec<T> std, u, u_minus_h;

  explicit ReparametrizeScale(Vec<T> log_var) {
    using S = Simd<T>;
    const Vec<T> h = log_var * T(0.5);
    const NonpositiveExp<T> e(h);
    std = e.rest * e.power + e.power, u = e.rest * e.power + (e.power - T(1));
    std = h < S::exp_min ? Vec<T>{} : std;
    std = h > S::exp_max ? broadcast<T>(kInf<T>) : std;
    u = h > S::exp_max ? broadcast<T>(kInf<T>) : u;
    u_minus_h = e.power == T(1) ? e.excess : u - h;
  }

  Vec<T> expm1() const { return u * (u + T(2)); }
  Vec<T> expm1_minus_log_var() const { return u * u + (u_minus_h + u_minus_h); }
};

template <class T>
static void reparametrize_forward(const ReparametrizeForward<T>& p, int64_t first, int64_t last) {
  const ReparametrizeInputs<T>& in = p.inputs;
  for (int64_t n = first; n < last; ++n) {
    const T *const means = in.mean.at(0, n), *const log_vars = in.log_var.at(0, n);
    for_each_vector<T>(in.D, [&](int64_t i, int64_t lanes) {
      const Vec<T> mean = load_lanes(means + i, lanes);
      const ReparametrizeScale<T> scale(load_lanes(log_vars + i, lanes));
      for (int64_t s = 0; s < in.S; ++s)
        store_lanes(p.z + (s * in.N + n) * in.D + i, lanes, scale.std * load_lanes(in.noise.at(s, n) + i, lanes) + mean);
      store_lanes(p.kl + n * in.D + i, lanes, (mean * mean + scale.expm1_minus_log_var()) * T(0.5));
    });
  }
}

template <class T>
static void reparametrize_backward(const ReparametrizeBackward<T>& p, int64_t first, int64_t last) {
  const ReparametrizeInputs<T>& in = p.inputs;
  for (int64_t n = first; n < last; ++n) {
    const T *const means = in.mean.at(0, n), *const log_vars = in.log_var.at(0, n);
    const T* const grad_kl = p.grad_kl.data ? p.grad_kl.at(0, n) : nullptr;
    for_each_vector<T>(in.D, [&](int64_t i, int64_t lanes) {
      Vec<T> dmean{}, dstd{}, dkl{};
      if (p.grad_z.data)
        for (int64_t s = 0; s < in.S; ++s) {
          const Vec<T> g = load_lanes(p.grad_z.at(s, n) + i, lanes);
          dmean += g, dstd += g * load_lanes(in.noise.at(s, n) + i, lanes);
        }
      if (grad_kl) {
        dkl = p.grad_kl_is_shared ? broadcast(*grad_kl) : load_lanes(grad_kl + i, lanes);
        dmean += dkl * load_lanes(means + i, lanes);
      }
      if (p.dmean) store_lanes(p.dmean + n * in.D + i, lanes, dmean);
      if (!p.dlog_var) return;
      const ReparametrizeScale<T> scale(load_lanes(log_vars + i, lanes));
      Vec<T> dlog_var = scale.std * dstd;
      if (grad_kl) dlog_var += dkl * scale.expm1();
      store_lanes(p.dlog_var + n * in.D + i, lanes, dlog_var * T(0.5));
    });
  }
}

template <class T>
static constexpr ReparametrizeKernels<T> reparametrize_kernels() {
  return {reparametrize_forward<T>, reparametrize_backward<T>};
}
