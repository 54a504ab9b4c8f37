// See mmd.h. The points of one block lie across lanes, those of the other are broadcast. Per pair and dimension a tile costs
// one subtraction and one FMA for the distance, and the same again for each of the two blocks that need a gradient.

constexpr int kMmdColumns = 4;       // points broadcast in a register tile of distances
constexpr int64_t kMmdRational = 8;  // most scales that share one division: the polynomials' degree

// Π (1 + a_t v) over all t but `without`, to the power `power`, as coefficients of v in `out`; returns their number.
static int64_t mmd_product(const double* a, int64_t scales, int64_t without, int power, double* out) {
  int64_t n = 1;
  out[0] = 1;
  for (int64_t t = 0; t < scales; ++t)
    for (int repeat = 0; t != without && repeat < power; ++repeat, ++n) {
      out[n] = 0;
      for (int64_t i = n; i > 0; --i) out[i] += a[t] * out[i - 1];
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
  double a[kMmdRational], product[2 * kMmdRational];
  const double unit = std::sqrt(least) * std::sqrt(greatest), most = sizeof(T) == 4 ? 1e17 : 1e140;
  for (int64_t s = 0; s < S; ++s) a[s] = unit / widths[s];
  std::fill_n(numerator, S, T(0));
  double sums[3 * kMmdRational] = {}, *const squares = sums + S;
  for (int64_t s = 0; s < S; ++s) {
    int64_t n = mmd_product(a, S, s, 1, product);
    for (int64_t i = 0; i < n; ++i) sums[i] += product[i];
    n = mmd_product(a, S, s, 2, product);
    for (int64_t i = 0; i < n; ++i) squares[i] += a[s] / unit * product[i];
  }
  std::copy_n(sums, S, numerator);
  std::copy_n(squares, 2 * S - 1, slope);
  std::copy_n(product, mmd_product(a, S, -1, 1, product), denominator);
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
  double exact[kMmdRational];
  for (int64_t s = 0; s < S; ++s) {
    const double width = unit * scales[s];
    widths[s] = p.kernel == MmdKernel::rational_quadratic ? scales[s] : width;
    rates[s] = 1 / (p.kernel == MmdKernel::laplacian ? std::sqrt(width) : width);
    if (s < kMmdRational) exact[s] = width;
  }
  if (p.kernel == MmdKernel::imq) mmd_pack_rational(p, exact, memory + 2 * S, memory + 3 * S, memory + 4 * S + 1);
}

// Blocks [first, last) from the points, transposed; their gradients are set to zero.
template <class T>
static void mmd_load(const MmdProblem<T>& p, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const bool is_x = b < p.x.blocks();
    const MmdPoints<T>& points = is_x ? p.x : p.y;
    const int64_t begin = (is_x ? b : b - p.x.blocks()) * kMmdBlock, n = std::min(kMmdBlock, points.count - begin);
    T* const out = p.blocks + b * p.D * kMmdBlock;
    transpose(points.data + begin * points.strides[0], points.strides[0], points.strides[1], out, kMmdBlock, n, p.D);
    for (int64_t d = 0; d < p.D; ++d) std::fill_n(out + d * kMmdBlock + n, kMmdBlock - n, out[d * kMmdBlock + n - 1]);
    if (p.grads) std::fill_n(p.grads + b * p.D * kMmdBlock, p.D * kMmdBlock, T(0));
  }
}

// tile[kMmdColumns][kMmdBlock] of squared distances for `vectors` vectors of rows.
template <class T, int vectors>
static inline void mmd_distance_tile(const T* rows, const T* columns, int64_t D, T* tile) {
  Vec<T> sums[kMmdColumns][vectors] = {};
  for (int64_t d = 0; d < D; ++d, rows += kMmdBlock, columns += kMmdBlock) {
    Vec<T> row[vectors];
    for (int v = 0; v < vectors; ++v) row[v] = load(rows + v * kLanes<T>);
#pragma GCC unroll 4
    for (int j = 0; j < kMmdColumns; ++j) {
      const Vec<T> column = broadcast(columns[j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<T> delta = row[v] - column;
        sums[j][v] += delta * delta;
      }
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kMmdColumns; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) store(tile + j * kMmdBlock + v * kLanes<T>, sums[j][v]);
}

// tile[columns][kMmdBlock] of squared distances between two blocks, for `padded` rows.
template <class T>
static void mmd_distances(const T* rows, const T* others, int64_t D, int64_t padded, int64_t columns, T* tile) {
  constexpr int64_t wide = kRowTile * kLanes<T>;
  for (int64_t j = 0; j < columns; j += kMmdColumns) {
    int64_t i = 0;
    for (; i + wide <= padded; i += wide)
      mmd_distance_tile<T, kRowTile>(rows + i, others + j, D, tile + j * kMmdBlock + i);
    for (; i < padded; i += kLanes<T>) mmd_distance_tile<T, 1>(rows + i, others + j, D, tile + j * kMmdBlock + i);
  }
}

template <class T>
static inline Vec<T> mmd_sqrt(Vec<T> x) {
  Vec<T> y;
  for (int i = 0; i < kLanes<T>; ++i) y[i] = sizeof(T) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
  return y;
}

// The profiles: f = k(u) and, if `with_slope`, g = −dk/du, for v vectors of squared distances.
struct MmdGaussian {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
    for (int64_t s = 0; s < p.scales; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const Vec<T> e = exp<T>(-u[i] * p.rates[s]);
        f[i] += e;
        if (with_slope) g[i] += e * p.rates[s];
      }
  }
};

struct MmdLaplacian {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) {
      const Vec<T> r = mmd_sqrt<T>(u[i]);
      for (int64_t s = 0; s < p.scales; ++s) {
        const Vec<T> e = exp<T>(-r * p.rates[s]);
        f[i] += e;
        if (with_slope) g[i] += e * p.rates[s];
      }
      if (with_slope) g[i] = u[i] == T(0) ? Vec<T>{} : g[i] * T(0.5) / r;
    }
  }
};

struct MmdEnergy {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>&, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) {
      const Vec<T> r = mmd_sqrt<T>(u[i]);
      f[i] = -r;
      if (with_slope) g[i] = u[i] == T(0) ? Vec<T>{} : T(0.5) / r;
    }
  }
};

struct MmdRationalQuadratic {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
    for (int64_t s = 0; s < p.scales; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const Vec<T> base = u[i] * p.rates[s] + T(1), k = exp<T>(-p.widths[s] * log<T>(base));
        f[i] += k;
        if (with_slope) g[i] += k / (base * p.unit);
      }
  }
};

// One division a scale: for points so far apart that the polynomials would overflow, and many or very different scales.
struct MmdInverse {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
    for (int64_t s = 0; s < p.scales; ++s)
#pragma GCC unroll 4
      for (int i = 0; i < v; ++i) {
        const Vec<T> k = p.widths[s] / (u[i] + p.widths[s]);
        f[i] += k;
        if (with_slope) g[i] += k * k * p.rates[s];
      }
  }
};

// One division for all scales: seven divisions would take as long as the distances at D = 64.
struct MmdInverseRational {
  template <bool with_slope, class T, int v>
  static inline void at(const MmdProfile<T>& p, const Vec<T> (&u)[v], Vec<T> (&f)[v], Vec<T> (&g)[v]) {
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
    for (int i = 0; i < v; ++i) g[i] = g[i] * under[i] * under[i];
  }
};

enum class MmdResult { sum, slope, values };

// For v vectors of rows, of which the first is row `first`, the squared distances become `factor` times the slopes, or the
// values; sums[rows] are those of the values. The pairs i = j of a diagonal tile count nothing.
template <class Profile, MmdResult result, bool diagonal, int v, class T>
static inline void mmd_evaluate_rows(const MmdProfile<T>& p, T* tile, int64_t first, int64_t columns, T factor, T* sums) {
  using IntVec = typename Simd<T>::IntVec;
  IntVec row[v];
  Vec<T> total[v] = {};
  for (int i = 0; i < v; ++i)
    for (int lane = 0; lane < kLanes<T>; ++lane) row[i][lane] = first + i * kLanes<T> + lane;
  for (int64_t j = 0; j < columns; ++j, tile += kMmdBlock) {
    Vec<T> u[v], f[v] = {}, g[v] = {};
    for (int i = 0; i < v; ++i) u[i] = load(tile + i * kLanes<T>);
    Profile::template at<result == MmdResult::slope>(p, u, f, g);
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) {
      if (diagonal) f[i] = row[i] == (typename Simd<T>::Int)j ? Vec<T>{} : f[i];
      if (result != MmdResult::values) total[i] += f[i];
      if (result != MmdResult::sum) store(tile + i * kLanes<T>, result == MmdResult::slope ? g[i] * factor : f[i]);
    }
  }
  for (int i = 0; i < v; ++i) store(sums + i * kLanes<T>, total[i]);
}

template <class Profile, MmdResult result, bool diagonal, class T>
static double mmd_evaluate(const MmdProfile<T>& p, T* tile, int64_t n, int64_t columns, T factor) {
  T sums[kMmdBlock];
  const int64_t padded = round_up(n, kGroup<T>);
  int64_t i = 0;
  for (; i + 4 * kLanes<T> <= padded; i += 4 * kLanes<T>)
    mmd_evaluate_rows<Profile, result, diagonal, 4>(p, tile + i, i, columns, factor, sums + i);
  for (; i < padded; i += kLanes<T>)
    mmd_evaluate_rows<Profile, result, diagonal, 1>(p, tile + i, i, columns, factor, sums + i);
  double total = 0;
  for (int64_t k = 0; k < n; ++k) total += sums[k];
  return total;
}

template <class T>
static bool mmd_any_above(T limit, const T* tile, int64_t padded, int64_t columns) {
  Vec<T> most = {};
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < padded; i += kLanes<T>) most = larger(load(tile + j * kMmdBlock + i), most);
  for (int i = 0; i < kLanes<T>; ++i)
    if (most[i] > limit) return true;
  return false;
}

template <MmdResult result, bool diagonal, class T>
static double mmd_evaluate_tile(const MmdProfile<T>& p, T* tile, int64_t n, int64_t columns, T factor) {
  switch (p.kernel) {
    case MmdKernel::gaussian: return mmd_evaluate<MmdGaussian, result, diagonal>(p, tile, n, columns, factor);
    case MmdKernel::laplacian: return mmd_evaluate<MmdLaplacian, result, diagonal>(p, tile, n, columns, factor);
    case MmdKernel::energy: return mmd_evaluate<MmdEnergy, result, diagonal>(p, tile, n, columns, factor);
    case MmdKernel::rational_quadratic:
      return mmd_evaluate<MmdRationalQuadratic, result, diagonal>(p, tile, n, columns, factor);
    default:
      if (p.limit < 0 || mmd_any_above(p.limit, tile, round_up(n, kGroup<T>), columns))
        return mmd_evaluate<MmdInverse, result, diagonal>(p, tile, n, columns, factor);
      return mmd_evaluate<MmdInverseRational, result, diagonal>(p, tile, n, columns, factor);
  }
}

// grad[dims][i] += Σ_j slopes[j][i] (rows[d][i] − others[d][j]) for `vectors` vectors of rows.
template <class T, int vectors, int dims>
static inline void mmd_pull_tile(const T* slopes, const T* rows, const T* others, int64_t columns, T* grad) {
  Vec<T> row[dims][vectors], sums[dims][vectors] = {};
#pragma GCC unroll 2
  for (int d = 0; d < dims; ++d)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[d][v] = load(rows + d * kMmdBlock + v * kLanes<T>);
  for (int64_t j = 0; j < columns; ++j, slopes += kMmdBlock) {
#pragma GCC unroll 2
    for (int d = 0; d < dims; ++d) {
      const Vec<T> other = broadcast(others[d * kMmdBlock + j]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[d][v] += load(slopes + v * kLanes<T>) * (row[d][v] - other);
    }
  }
#pragma GCC unroll 2
  for (int d = 0; d < dims; ++d)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      T* const at = grad + d * kMmdBlock + v * kLanes<T>;
      store(at, load(at) + sums[d][v]);
    }
}

template <class T, int vectors>
static void mmd_pull_rows(const T* slopes, const T* rows, const T* others, int64_t D, int64_t columns, T* grad) {
  int64_t d = 0;
  for (; d + 2 <= D; d += 2)
    mmd_pull_tile<T, vectors, 2>(slopes, rows + d * kMmdBlock, others + d * kMmdBlock, columns, grad + d * kMmdBlock);
  if (d < D)
    mmd_pull_tile<T, vectors, 1>(slopes, rows + d * kMmdBlock, others + d * kMmdBlock, columns, grad + d * kMmdBlock);
}

// The gradient of a block of n rows, by slopes[columns][kMmdBlock].
template <class T>
static void mmd_pull(const T* slopes, const T* rows, const T* others, int64_t D, int64_t n, int64_t columns, T* grad) {
  constexpr int64_t wide = kRowTile * kLanes<T>;
  const int64_t padded = round_up(n, kGroup<T>);
  int64_t i = 0;
  for (; i + wide <= padded; i += wide) mmd_pull_rows<T, kRowTile>(slopes + i, rows + i, others, D, columns, grad + i);
  for (; i < padded; i += kLanes<T>) mmd_pull_rows<T, 1>(slopes + i, rows + i, others, D, columns, grad + i);
}

// One tile: its weighted sum, and its gradients into those of the blocks. tile and turned hold a block squared each.
template <class T>
static double mmd_tile(const MmdProblem<T>& p, int64_t b, int64_t c, T* tile, T* turned) {
  const int64_t in_x = p.x.blocks(), size = p.D * kMmdBlock;
  const MmdPoints<T>&rows = b < in_x ? p.x : p.y, &others = c < in_x ? p.x : p.y;
  const double weight = c < in_x ? p.weights.xx : b < in_x ? p.weights.xy : p.weights.yy;
  if (weight == 0) return 0;
  const int64_t n = std::min(kMmdBlock, rows.count - (b < in_x ? b : b - in_x) * kMmdBlock);
  const int64_t m = std::min(kMmdBlock, others.count - (c < in_x ? c : c - in_x) * kMmdBlock);
  const T *const left = p.blocks + b * size, *const right = p.blocks + c * size;
  mmd_distances(left, right, p.D, round_up(n, kGroup<T>), m, tile);
  const bool same_set = &rows == &others;
  const T factor = (same_set ? -4 : -2) * weight;  // ∂u/∂x = 2δ, and a pair of one set counts in both orders
  if (!rows.grad && !others.grad)
    return b == c ? weight * mmd_evaluate_tile<MmdResult::sum, true>(p.profile, tile, n, m, factor)
                  : (same_set ? 2 : 1) * weight * mmd_evaluate_tile<MmdResult::sum, false>(p.profile, tile, n, m, factor);
  const double sum = b == c ? weight * mmd_evaluate_tile<MmdResult::slope, true>(p.profile, tile, n, m, factor)
                            : (same_set ? 2 : 1) * weight *
                                  mmd_evaluate_tile<MmdResult::slope, false>(p.profile, tile, n, m, factor);
  if (rows.grad) mmd_pull(tile, left, right, p.D, n, m, p.grads + b * size);
  if (others.grad && b != c) {
    transpose(tile, kMmdBlock, 1, turned, kMmdBlock, m, n);
    mmd_pull(turned, right, left, p.D, m, n, p.grads + c * size);
  }
  return sum;
}

template <class T>
static double mmd_pairs(const MmdProblem<T>& p, int64_t group, int64_t other) {
  constexpr int64_t size = kMmdBlock * kMmdBlock;
  Arena<T> arena(Scratch::task, size, size);
  T *const tile = arena.take(size), *const turned = arena.take(size);
  std::fill_n(turned, size, T(0));  // the lanes beyond a short block are read, not used
  const auto end = [&](int64_t g) { return std::min(p.block_count(), (g + 1) * p.group); };
  double sum = 0;
  for (int64_t b = group * p.group; b < end(group); ++b)
    for (int64_t c = group == other ? b : other * p.group; c < end(other); ++c) sum += mmd_tile(p, b, c, tile, turned);
  return sum;
}

template <class T>
static void mmd_store_grads(const MmdProblem<T>& p, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const bool is_x = b < p.x.blocks();
    const MmdPoints<T>& points = is_x ? p.x : p.y;
    const int64_t begin = (is_x ? b : b - p.x.blocks()) * kMmdBlock, n = std::min(kMmdBlock, points.count - begin);
    if (points.grad) transpose(p.grads + b * p.D * kMmdBlock, kMmdBlock, 1, points.grad + begin * p.D, p.D, p.D, n);
  }
}

template <class T>
static void mmd_matrix(const MmdProblem<T>& p, T* out, int64_t first, int64_t last) {
  constexpr int64_t size = kMmdBlock * kMmdBlock;
  Arena<T> arena(Scratch::task, size);
  T* const tile = arena.take(size);
  for (int64_t b = first; b < last; ++b)
    for (int64_t c = 0; c < p.y.blocks(); ++c) {
      const int64_t i = b * kMmdBlock, j = c * kMmdBlock, n = std::min(kMmdBlock, p.x.count - i);
      const int64_t m = std::min(kMmdBlock, p.y.count - j), block = p.D * kMmdBlock;
      mmd_distances(p.blocks + b * block, p.blocks + (p.x.blocks() + c) * block, p.D, round_up(n, kGroup<T>), m, tile);
      mmd_evaluate_tile<MmdResult::values, false>(p.profile, tile, n, m, T(1));
      transpose(tile, kMmdBlock, 1, out + i * p.y.count + j, p.y.count, m, n);
    }
}

template <class T>
static constexpr MmdKernels<T> mmd_kernels() {
  return {mmd_pack_profile<T>, mmd_load<T>, mmd_pairs<T>, mmd_store_grads<T>, mmd_matrix<T>};
}
