// Draws of N(0, 1) that are a function of a key and their number, so that a backward pass can make them again, by Philox4x32-10
// and the transform of Box and Muller. The maths and its sources are in kernels/reference/noise.py.

constexpr int kCounters = 16;             // whose words are made together
constexpr int kDraws = 4 * kCounters;     // of them: those of each word next to one another

typedef uint32_t Words __attribute__((vector_size(LATENT_VECTOR_BYTES)));
typedef unsigned long long WideWords __attribute__((vector_size(LATENT_VECTOR_BYTES)));

// The products of the even lanes with a constant, 64 bits each.
static inline WideWords even_products(Words a, uint32_t b) {
  using Ints = Simd<float>::IntVec;
  const Words other = Words{} + b;
#if LATENT_VECTOR_BYTES == 64
  typedef long long Products __attribute__((vector_size(64)));
  return (WideWords)__builtin_ia32_pmuludq512_mask((Ints)a, (Ints)other, Products{}, -1);
#elif LATENT_VECTOR_BYTES == 32
  return (WideWords)__builtin_ia32_pmuludq256((Ints)a, (Ints)other);
#else
  return ((WideWords)a & 0xffffffffu) * b;
#endif
}

// The high and the low halves of the products with a constant.
static inline void multiply(Words a, uint32_t b, Words& high, Words& low) {
  const WideWords even = even_products(a, b), odd = even_products((Words)((WideWords)a >> 32), b);
  high = (Words)(even >> 32) | (Words)(odd & ~0xffffffffull);
  low = (Words)(even & 0xffffffffull) | (Words)(odd << 32);
}

// Counters (low, high, 0, 0) become four random words each.
static inline void philox(uint64_t key, Words (&c)[4]) {
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    Words high0, low0, high2, low2;
    multiply(c[0], 0xd2511f53u, high0, low0);
    multiply(c[2], 0xcd9e8d57u, high2, low2);
    c[0] = high2 ^ c[1] ^ k0, c[1] = low2;
    c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
  }
}

// sin 2πt / t and cos 2πt in t² for |t| ≤ 1/8: Chebyshev interpolants, to 3.4e-9 and 2e-21 of themselves.
template <class T>
struct Turn;

template <>
struct Turn<float> {
  static constexpr float sine[] = {6.2831854820251465f, -41.3416633605957f, 81.59254455566406f, -75.401611328125f};
  static constexpr float cosine[] = {1.0f, -19.739208221435547f, 64.93931579589844f, -85.4428482055664f, 59.22016906738281f};
};

template <>
struct Turn<double> {
  static constexpr double sine[] = {6.283185307179586, -41.34170224039976, 81.60524927607493, -76.70585975299812,
                                    42.05869392898878, -15.094640403891546, 3.8197881201632113, -0.7116358090781666};
  static constexpr double cosine[] = {1.0, -19.739208802178716, 64.9393940226683, -85.45681720669354, 60.244641371818105,
                                      -26.426256772545436, 7.9035351947629575, -1.7143161879285278, 0.27945867147528963};
};

// What two words say: a probability, an angle within an eighth of a turn from a multiple of a quarter, and that multiple by the
// signs of cosine and sine, which change places where they differ.
struct PolarDraws {
  float probability[kCounters], angle[kCounters], signs[2][kCounters];

  void set(int64_t lane, Words radial, Words angular) {
    using Floats = Vec<float>;
    using Ints = Simd<float>::IntVec;
    const auto rest = (Ints)(angular & 0x3fffffffu) - (1 << 29);
    store(probability + lane, __builtin_convertvector(radial, Floats) * 0x1p-32f + 0x1p-33f);
    store(angle + lane, __builtin_convertvector(rest, Floats) * 0x1p-32f);
    const Words one = (Words)broadcast(1.0f), quarter = angular >> 30;
    store(signs[0] + lane, (Floats)(one | ((quarter + 1) >> 1 << 31)));
    store(signs[1] + lane, (Floats)(one | (quarter >> 1 << 31)));
  }

  // The draws of all lanes, as numbers of type T at `cosines` and `sines`.
  template <class T>
  void draw(T* cosines, T* sines) const {
    for (int i = 0; i < kCounters; i += kLanes<T>) {
      const Vec<T> t = load_as<T>(angle + i), w = t * t, first = load_as<T>(signs[0] + i), second = load_as<T>(signs[1] + i);
      const Vec<T> radius = square_root<T>(log<T>(load_as<T>(probability + i)) * T(-2));
      const Vec<T> cosine = radius * horner(Turn<T>::cosine, w), sine = radius * (t * horner(Turn<T>::sine, w));
      store(cosines + i, first * (first == second ? cosine : sine));
      store(sines + i, second * (first == second ? sine : cosine));
    }
  }
};

// The draws [first, first + n) of a key; first and n are multiples of kDraws.
template <class T>
static void standard_normal(uint64_t key, int64_t first, int64_t n, T* out) {
  constexpr int lanes = kLanes<float>;
  uint32_t numbers[kCounters];
  for (int i = 0; i < kCounters; ++i) numbers[i] = i;
  for (int64_t i = 0; i < n; i += kDraws) {
    PolarDraws pairs[2];
    const uint64_t counter = (first + i) / 4;
    for (int lane = 0; lane < kCounters; lane += lanes) {
      Words numbers_of_lanes;
      std::copy_n(numbers + lane, lanes, reinterpret_cast<uint32_t*>(&numbers_of_lanes));
      Words c[4] = {numbers_of_lanes + static_cast<uint32_t>(counter), Words{} + static_cast<uint32_t>(counter >> 32)};
      philox(key, c);
      pairs[0].set(lane, c[0], c[1]);
      pairs[1].set(lane, c[2], c[3]);
    }
    for (int pair = 0; pair < 2; ++pair, out += 2 * kCounters) pairs[pair].draw(out, out + kCounters);
  }
}
