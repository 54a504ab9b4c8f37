#define LATENT_INLINE __attribute__((always_inline)) inline

// n vectors that go through the same operations side by side. A core looks some 60 vector operations ahead, too few to find
// the next chain of dependent ones behind a long one: logistic mixtures take 12 to 20 % longer channel by channel.
template <class T, int n>
struct Pack {
  static constexpr int size = n;
  Vec<T> v[n];

  Pack() = default;
  LATENT_INLINE Pack(T x) {
    for (int j = 0; j < n; ++j) v[j] = broadcast(x);
  }
  // f(v of a, v of b, ...) for each vector.
  template <class F, class... Packs>
  static LATENT_INLINE Pack each(F f, const Packs&... packs) {
    Pack result;
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) result.v[j] = f(packs.v[j]...);
    return result;
  }
  LATENT_INLINE friend Pack operator+(const Pack& a, const Pack& b) {
    return each([](Vec<T> x, Vec<T> y) { return x + y; }, a, b);
  }
  LATENT_INLINE friend Pack operator-(const Pack& a, const Pack& b) {
    return each([](Vec<T> x, Vec<T> y) { return x - y; }, a, b);
  }
  LATENT_INLINE friend Pack operator*(const Pack& a, const Pack& b) {
    return each([](Vec<T> x, Vec<T> y) { return x * y; }, a, b);
  }
  LATENT_INLINE friend Pack operator/(const Pack& a, const Pack& b) {
    return each([](Vec<T> x, Vec<T> y) { return x / y; }, a, b);
  }
  LATENT_INLINE Pack operator-() const {
    return each([](Vec<T> x) { return -x; }, *this);
  }
};

// n vectors that follow one another in memory.
template <class T, int n>
static LATENT_INLINE Pack<T, n> load_pack(const T* p) {
  Pack<T, n> result;
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) result.v[j] = load(p + j * kLanes<T>);
  return result;
}

template <class T, int n>
static LATENT_INLINE void store_pack(T* p, const Pack<T, n>& x) {
#pragma GCC unroll 8
  for (int j = 0; j < n; ++j) store(p + j * kLanes<T>, x.v[j]);
}

template <class T, int n>
static LATENT_INLINE Pack<T, n> exp(const Pack<T, n>& x) {
  const ReducedExp<T, Pack<T, n>> e(x);
  return Pack<T, n>::each([](Vec<T> a, Vec<T> fraction, Vec<T> power, Vec<T> shifted) {
    return exp_limits<T>(a, scale<T>(fraction, power, shifted));
  }, x, e.fraction, e.n, e.shifted);
}
