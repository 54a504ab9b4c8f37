// See mmd.h. The points of one block lie across lanes, those of the other are broadcast. Per pair and dimension a tile costs
// one subtraction and one FMA for the distance, and the same again for each of the two blocks that need a gradient.

constexpr int kMmdColumns = 4;  // points broadcast in a register tile of distances

// The points of block b: their sample, the first of them, how many.
template <class T>
struct MmdBlock {
  const MmdPoints<T>& points;
  int64_t begin, n;

  MmdBlock(const MmdProblem<T>& p, int64_t b)
      : points(b < p.x.blocks() ? p.x : p.y),
        begin((b < p.x.blocks() ? b : b - p.x.blocks()) * kMmdBlock),
        n(std::min(kMmdBlock, points.count - begin)) {}
};

// Blocks [first, last) from the points, transposed; their gradients are set to zero.
template <class T>
static void mmd_load(const MmdProblem<T>& p, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; ++b) {
    const auto [points, begin, n] = MmdBlock<T>(p, b);
    T* const out = p.blocks + b * p.D * kMmdBlock;
    transpose(points.data + begin * points.strides[0], points.strides[0], points.strides[1], out, kMmdBlock, n, p.D);
    for (int64_t d = 0; d < p.D; ++d) std::fill_n(out + d * kMmdBlock + n, kMmdBlock - n, out[d * kMmdBlock + n - 1]);
    if (p.grads) std::fill_n(p.grads + b * p.D * kMmdBlock, p.D * kMmdBlock, T(0));
  }
}

// Columns [begin, end) of a tile, of which the rows [first, padded) are computed: as many as stay in the fastest cache between
// the steps.
struct MmdStrip {
  int64_t first, padded, begin, end;
};

// f(i, v) for every v vectors of rows that begin at row i in [first, end): `most` at a time, and at once what is left.
template <class T, int most, class F>
static inline void mmd_in_vectors(int64_t first, int64_t end, const F& f) {
  int64_t i = first;
  for (; i + most * kLanes<T> <= end; i += most * kLanes<T>) f(i, std::integral_constant<int, most>{});
  const int64_t left = (end - i) / kLanes<T>;
  if constexpr (most > 3)
    if (left == 3) f(i, std::integral_constant<int, 3>{});
  if constexpr (most > 2)
    if (left == 2) f(i, std::integral_constant<int, 2>{});
  if (left == 1) f(i, std::integral_constant<int, 1>{});
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

template <class T>
static void mmd_distances(const T* rows, const T* others, int64_t D, const MmdStrip& s, T* tile) {
  for (int64_t j = s.begin; j < s.end; j += kMmdColumns)
    mmd_in_vectors<T, kRowTile>(s.first, s.padded, [&](int64_t i, auto v) {
      mmd_distance_tile<T, v>(rows + i, others + j, D, tile + j * kMmdBlock + i);
    });
}

enum class MmdResult { sum, slope, values };

// For v vectors of rows, of which the first is row `first`, the squared distances become `factor` times the slopes, or the
// values, whose sums are added to sums[rows]. In a diagonal tile only the values of rows i > j count.
template <class Profile, MmdResult result, bool diagonal, int v, class T>
static inline void mmd_evaluate_rows(const MmdProfile<T>& p, T* tile, int64_t first, int64_t begin, int64_t end, T factor,
                                     T* sums) {
  using IntVec = typename Simd<T>::IntVec;
  IntVec row[v];
  Vec<T> total[v] = {};
  for (int i = 0; i < v; ++i)
    for (int lane = 0; lane < kLanes<T>; ++lane) row[i][lane] = first + i * kLanes<T> + lane;
  for (int64_t j = begin; j < end; ++j) {
    T* const column = tile + j * kMmdBlock + first;
    Vec<T> u[v], f[v] = {}, g[v] = {};
    for (int i = 0; i < v; ++i) u[i] = load(column + i * kLanes<T>);
    Profile::template at<result == MmdResult::slope>(p, factor, u, f, g);
#pragma GCC unroll 4
    for (int i = 0; i < v; ++i) {
      if (diagonal) f[i] = row[i] > (typename Simd<T>::Int)j ? f[i] : Vec<T>{};
      if (result != MmdResult::values) total[i] += f[i];
      if (result != MmdResult::sum) store(column + i * kLanes<T>, result == MmdResult::slope ? g[i] : f[i]);
    }
  }
  for (int i = 0; i < v; ++i) {
    T* const at = sums + first + i * kLanes<T>;
    store(at, load(at) + total[i]);
  }
}

template <class Profile, MmdResult result, bool diagonal, class T>
static void mmd_evaluate(const MmdProfile<T>& p, T* tile, const MmdStrip& s, T factor, T* sums) {
  mmd_in_vectors<T, 4>(s.first, s.padded, [&](int64_t i, auto v) {
    mmd_evaluate_rows<Profile, result, diagonal, v>(p, tile, i, s.begin, s.end, factor, sums);
  });
}

template <class T>
static bool mmd_any_above(T limit, const T* tile, const MmdStrip& s) {
  Vec<T> most = {};
  mmd_in_vectors<T, 4>(s.first, s.padded, [&](int64_t i, auto v) {
    Vec<T> of_rows[v] = {};
    for (int64_t j = s.begin; j < s.end; ++j)
      for (int k = 0; k < v; ++k) of_rows[k] = larger(load(tile + j * kMmdBlock + i + k * kLanes<T>), of_rows[k]);
    for (int k = 0; k < v; ++k) most = larger(of_rows[k], most);
  });
  bool found = false;
  for (int i = 0; i < kLanes<T>; ++i) found |= most[i] > limit;
  return found;
}

template <MmdResult result, bool diagonal, class T>
static void mmd_evaluate_strip(const MmdProfile<T>& p, T* tile, const MmdStrip& s, T factor, T* sums) {
  switch (p.kernel) {
    case MmdKernel::gaussian: return mmd_evaluate<MmdGaussian, result, diagonal>(p, tile, s, factor, sums);
    case MmdKernel::laplacian: return mmd_evaluate<MmdLaplacian, result, diagonal>(p, tile, s, factor, sums);
    case MmdKernel::energy: return mmd_evaluate<MmdEnergy, result, diagonal>(p, tile, s, factor, sums);
    case MmdKernel::rational_quadratic:
      return mmd_evaluate<MmdRationalQuadratic, result, diagonal>(p, tile, s, factor, sums);
    default:
      if (p.limit < 0 || mmd_any_above(p.limit, tile, s))
        return mmd_evaluate<MmdInverse, result, diagonal>(p, tile, s, factor, sums);
      return mmd_evaluate<MmdInverseRational, result, diagonal>(p, tile, s, factor, sums);
  }
}

// tile[m][kMmdBlock] of the pairs of two blocks of n and m points, and the sum of the values. In a diagonal tile a pair counts
// once, and each half of the slopes mirrors the other.
template <MmdResult result, bool diagonal, class T>
static double mmd_fill(const MmdProfile<T>& p, const T* rows, const T* others, int64_t D, int64_t n, int64_t m, T factor,
                       T* tile) {
  constexpr int64_t group = kGroup<T>;
  const int64_t padded = round_up(n, group);
  T sums[kMmdBlock] = {};
  for (int64_t j = 0; j < m; j += group) {
    const MmdStrip strip{diagonal ? j : 0, padded, j, std::min(m, j + group)};
    mmd_distances(rows, others, D, strip, tile);
    mmd_evaluate_strip<result, diagonal>(p, tile, strip, factor, sums);
  }
  for (int64_t j = 0; diagonal && result == MmdResult::slope && j < m; j += group)
    for (int64_t i = j + group; i < padded; i += group)
      transpose(tile + j * kMmdBlock + i, kMmdBlock, 1, tile + i * kMmdBlock + j, kMmdBlock, group, group);
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += sums[i];
  return total;
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
  mmd_in_vectors<T, kRowTile>(0, round_up(n, kGroup<T>), [&](int64_t i, auto v) {
    mmd_pull_rows<T, v>(slopes + i, rows + i, others, D, columns, grad + i);
  });
}

// One tile: its weighted sum, and its gradients into those of the blocks. tile and turned hold a block squared each.
template <class T>
static double mmd_tile(const MmdProblem<T>& p, int64_t b, int64_t c, T* tile, T* turned) {
  const int64_t in_x = p.x.blocks(), size = p.D * kMmdBlock;
  const double weight = c < in_x ? p.weights.xx : b < in_x ? p.weights.xy : p.weights.yy;
  if (weight == 0) return 0;
  const MmdBlock<T> left_block(p, b), right_block(p, c);
  const MmdPoints<T>&rows = left_block.points, &others = right_block.points;
  const int64_t n = left_block.n, m = right_block.n;
  const T *const left = p.blocks + b * size, *const right = p.blocks + c * size;
  const bool same_set = &rows == &others;
  // ∂u/∂x = 2δ, and a pair of one set counts in both orders.
  const T factor = (same_set ? -4 : -2) * weight * p.profile.slope_unit;
  const bool with_slopes = rows.grad || others.grad;
  const auto fill = b == c ? (with_slopes ? mmd_fill<MmdResult::slope, true, T> : mmd_fill<MmdResult::sum, true, T>)
                           : (with_slopes ? mmd_fill<MmdResult::slope, false, T> : mmd_fill<MmdResult::sum, false, T>);
  const double sum = (same_set ? 2 : 1) * weight * fill(p.profile, left, right, p.D, n, m, factor, tile);
  if (rows.grad) mmd_pull(tile, left, right, p.D, n, m, p.grads + b * size);
  if (others.grad && b != c) {
    transpose(tile, kMmdBlock, 1, turned, kMmdBlock, m, n);
    for (int64_t i = 0; i < n; ++i)  // the lanes beyond a short block are read, not used
      std::fill(turned + i * kMmdBlock + m, turned + i * kMmdBlock + round_up(m, kGroup<T>), T(0));
    mmd_pull(turned, right, left, p.D, m, n, p.grads + c * size);
  }
  return sum;
}

template <class T>
static double mmd_pairs(const MmdProblem<T>& p, int64_t group, int64_t other) {
  constexpr int64_t size = kMmdBlock * kMmdBlock;
  Arena<T> arena(Scratch::task, size, size);
  T *const tile = arena.take(size), *const turned = arena.take(size);
  const auto end = [&](int64_t g) { return std::min(p.block_count(), (g + 1) * p.group); };
  double sum = 0;
  for (int64_t b = group * p.group; b < end(group); ++b)
    for (int64_t c = group == other ? b : other * p.group; c < end(other); ++c) sum += mmd_tile(p, b, c, tile, turned);
  return sum;
}

template <class T>
static void mmd_store_grads(const MmdProblem<T>& p, int64_t first, int64_t last) {
  const int64_t size = p.D * kMmdBlock;
  for (int64_t b = first; b < last; ++b) {
    const auto [points, begin, n] = MmdBlock<T>(p, b);
    T* const grad = p.grads + b * size;
    for (int64_t copy = 1; copy < p.copies; ++copy) {
      const T* const more = grad + copy * p.size();
      for (int64_t i = 0; i < size; ++i) grad[i] += more[i];
    }
    for (int64_t i = 0; i < size; ++i) grad[i] /= p.profile.slope_unit;
    if (points.grad) transpose(grad, kMmdBlock, 1, points.grad + begin * p.D, p.D, p.D, n);
  }
}

template <class T>
static void mmd_matrix(const MmdProblem<T>& p, T* out, int64_t first, int64_t last) {
  constexpr int64_t size = kMmdBlock * kMmdBlock;
  Arena<T> arena(Scratch::task, size);
  T* const tile = arena.take(size);
  for (int64_t b = first; b < last; ++b)
    for (int64_t c = 0; c < p.y.blocks(); ++c) {
      const int64_t other = p.x.blocks() + c, block = p.D * kMmdBlock;
      const auto [x, i, n] = MmdBlock<T>(p, b);
      const auto [y, j, m] = MmdBlock<T>(p, other);
      mmd_fill<MmdResult::values, false>(p.profile, p.blocks + b * block, p.blocks + other * block, p.D, n, m, T(1), tile);
      transpose(tile, kMmdBlock, 1, out + i * y.count + j, y.count, m, n);
    }
}

template <class T>
static constexpr MmdKernels<T> mmd_kernels() {
  return {mmd_pack_profile<T>, mmd_load<T>, mmd_pairs<T>, mmd_store_grads<T>, mmd_matrix<T>};
}
