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
  const double weight = c < in_x ? p.weights.xx : b < in_x ? p.weights.xy : p.weights.yy;
  if (weight == 0) return 0;
  const MmdBlock<T> left_block(p, b), right_block(p, c);
  const MmdPoints<T>&rows = left_block.points, &others = right_block.points;
  const int64_t n = left_block.n, m = right_block.n;
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
    const auto [points, begin, n] = MmdBlock<T>(p, b);
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
      const int64_t other = p.x.blocks() + c, block = p.D * kMmdBlock;
      const auto [x, i, n] = MmdBlock<T>(p, b);
      const auto [y, j, m] = MmdBlock<T>(p, other);
      mmd_distances(p.blocks + b * block, p.blocks + other * block, p.D, round_up(n, kGroup<T>), m, tile);
      mmd_evaluate_tile<MmdResult::values, false>(p.profile, tile, n, m, T(1));
      transpose(tile, kMmdBlock, 1, out + i * y.count + j, y.count, m, n);
    }
}

template <class T>
static constexpr MmdKernels<T> mmd_kernels() {
  return {mmd_pack_profile<T>, mmd_load<T>, mmd_pairs<T>, mmd_store_grads<T>, mmd_matrix<T>};
}
