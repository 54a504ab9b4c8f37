// See pairwise_kl.h. One dimension at a time, with posteriors across lanes, or a cache line of dimensions: what a task needs
// stays in the L1 cache. A tile is four second posteriors j against first ones i. A pair of one dimension needs δ = μ_i − μ_j
// and p = σ²_i + δ². For weights g_ij of KL_d(i‖j) the gradients come from sums over j for each i, and over i for each j:
//
//     ∂μ_i = Σ_j g_ij δ_ij w_j − w_i Σ_k g_ki δ_ki                                    w = 1 / σ²
//     ∂log σ²_i = ½ [σ²_i Σ_j g_ij w_j − Σ_j g_ij + Σ_k g_ki − w_i Σ_k g_ki p_ki]

// Second posteriors whose operations alternate, with their sums in registers.
constexpr int pair_step(bool gradients) { return LATENT_VECTOR_BYTES == 64 && !gradients ? 4 : 2; }
constexpr int64_t kPairRows = 960;     // values of first posteriors a block, most: with their sums they take 23 KB
constexpr int64_t kPairColumns = 256;  // second posteriors whose sums are added up before they join the total
constexpr int kPairSums = 3;           // for each posterior, in each of its roles

// Σ f(i) over vectors of [0, n), a multiple of kGroup, in lanes whose sum no instruction-set level changes.
template <class T, class F>
static inline Vec<T> fold_groups(int64_t n, const F& f) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  Vec<T> sums[registers] = {};
  for (int64_t i = 0; i < n; i += kGroup<T>)
    for (int r = 0; r < registers; ++r) sums[r] += f(i + r * kLanes<T>);
  return fold_registers<T>(sums);
}

template <class T, class F>
static inline T sum_groups(int64_t n, const F& f) {
  return sum_halves<T>(fold_groups<T>(n, f));
}

// f(number of vectors, first of them) over n vectors, `most` at a time.
template <int most, class F>
static inline void in_tiles(int64_t n, const F& f, int64_t first = 0) {
  for (; first + most <= n; first += most) f(std::integral_constant<int, most>{}, first);
  if constexpr (most > 1) in_tiles<most - 1>(n, f, first);
}

// The first n lanes of values that are `stride` apart, zero in the others.
template <class T>
static inline Vec<T> load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return load_lanes(p, n);
  T lanes[kLanes<T>] = {};
  for (int64_t k = 0; k < std::min<int64_t>(n, kLanes<T>); ++k) lanes[k] = p[k * stride];
  return load(lanes);
}

// The padding has the last mean, and σ² of 0 for whose inverse 1 stands: nothing in it overflows that does not elsewhere.
template <class T>
static void pair_columns(const Posteriors<T>& p, const PairColumns<T>& c, int64_t first, int64_t last) {
  transpose(p.mu + first * p.mu_strides[1], p.mu_strides[0], p.mu_strides[1], c.mu + first * c.stride, c.stride, p.N,
            last - first);
  transpose(p.log_var + first * p.log_var_strides[1], p.log_var_strides[0], p.log_var_strides[1],
            c.log_var + first * c.stride, c.stride, p.N, last - first);
  const auto pad = [&](T* column, T value) { std::fill(column + p.N, column + c.stride, value); };
  for (int64_t d = first; d < last; ++d) {
    T* const mu = c.mu + d * c.stride;
    pad(mu, mu[p.N - 1]), pad(c.log_var + d * c.stride, T(0));
  }
  for (int64_t i = first * c.stride; i < last * c.stride; i += kLanes<T>) {
    Vec<T> w;
    store(c.var + i, exp<T>(load(c.log_var + i), w));
    store(c.inverse + i, w);
  }
  for (int64_t d = first; d < last; ++d) pad(c.var + d * c.stride, T(0));
}

// first, first + 1, …
template <class T>
static inline Vec<T> lane_numbers(int64_t first) {
  Vec<T> numbers;
  for (int i = 0; i < kLanes<T>; ++i) numbers[i] = T(i);
  return numbers + T(first);
}

// f(0), …, f(n − 1): with one operation of each in turn no instruction waits for the one before it, and the processor need not
// look ahead as far as the next chain. Eq. 8 takes a quarter less time so on an Intel Xeon.
template <class F, int... t>
static inline __attribute__((always_inline)) void together(const F& f, std::integer_sequence<int, t...>) {
  (f(t), ...);
}
template <int n, class F>
static inline __attribute__((always_inline)) void together(const F& f) {
  together(f, std::make_integer_sequence<int, n>{});
}

// out[t] += the sum of the lanes of parts[t].
template <class T>
static inline void add_lane_sums(const Vec<T> (&parts)[kPairTile][64 / LATENT_VECTOR_BYTES], T* out) {
  Vec<T> folded[kPairTile];
  T sums[std::max<int>(kPairTile, kLanes<T>)];
  for (int t = 0; t < kPairTile; ++t) folded[t] = fold_registers<T>(parts[t]);
  sum_halves_of<T>(folded, sums);
  for (int t = 0; t < kPairTile; ++t) out[t] += sums[t];
}

// One dimension of the batch: first posteriors lie across lanes, a second one is broadcast.
template <class T>
struct PairColumn {
  static constexpr int64_t kDiagonal = kGroup<T>;  // values of first posteriors among which the second ones of a tile are
  const T *mu, *var, *inverse, *halves;

  PairColumn(const PairColumns<T>& c, int64_t d)
      : mu(c.mu + d * c.stride), var(c.var + d * c.stride), inverse(c.inverse + d * c.stride),
        halves(c.log_var + d * c.stride) {}

  static Vec<T> second(const T* values, int64_t j, int64_t) { return broadcast(values[j]); }
  static int64_t diagonal(int64_t j) { return j / kGroup<T> * kGroup<T>; }

  // e of the first posteriors from i on, 0 for j itself.
  static Vec<T> without(Vec<T> e, int64_t i, int64_t j) { return lane_numbers<T>(i - j) == T(0) ? Vec<T>{} : e; }

  // Adds the sums of a tile of second posteriors to those in `sums`.
  static void add(const Vec<T> (&parts)[kPairTile][64 / LATENT_VECTOR_BYTES], T* sums, int64_t j) {
    add_lane_sums<T>(parts, sums + j);
  }
};

// The second posteriors j, … against the first ones of the values first, first + kGroup, … below last, with the weights that
// `tile` gives. Sums of the first posteriors join rows[kPairSums][kPairRows], those of the second ones `sums`. `lane` is that
// of the register in its group.
template <class T, bool on_diagonal, class Layout, class Tile>
static inline __attribute__((always_inline)) void pair_steps(const Layout& c, Tile& tile, int64_t j, int64_t lane,
                                                             int64_t first, int64_t last, T* rows,
                                                             Vec<T> (&sums)[kPairSums][Tile::step]) {
  constexpr int step = Tile::step;
  rows += lane;
  for (int64_t i = first + lane; i < last; i += kGroup<T>, rows += kGroup<T>) {
    const Vec<T> mu = load(c.mu + i), var = load(c.var + i);
    Vec<T> delta[step], p[step], g[step];
    together<step>([&](int t) { delta[t] = mu - c.second(c.mu, j + t, lane); });
    together<step>([&](int t) { p[t] = delta[t] * delta[t] + var; });
    tile.template weights<on_diagonal>(i, p, g);
    if (!Tile::gradients) continue;
    Vec<T> gw[step], g_sum = load(rows), gw_sum = load(rows + kPairRows), gwd_sum = load(rows + 2 * kPairRows);
    together<step>([&](int t) { gw[t] = g[t] * c.second(c.inverse, j + t, lane); });
    together<step>([&](int t) { g_sum += g[t], gw_sum += gw[t], gwd_sum += gw[t] * delta[t]; });
    together<step>([&](int t) { sums[0][t] += g[t], sums[1][t] += g[t] * delta[t], sums[2][t] += g[t] * p[t]; });
    store(rows, g_sum), store(rows + kPairRows, gw_sum), store(rows + 2 * kPairRows, gwd_sum);
  }
}

// All pairs of the first posteriors of the values [i0, i1), whole groups, and the second ones [j0, j1), whole tiles.
template <class T, class Layout, class Weights>
static void pair_block(const Layout& c, Weights& weights, int64_t i0, int64_t i1, int64_t j0, int64_t j1, T* rows,
                       T* columns, int64_t stride) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES, step = Weights::Tile::step;
  for (int64_t tile_j = j0; tile_j < j1; tile_j += kPairTile) {
    const int64_t before = c.diagonal(tile_j), diagonal = std::clamp(before, i0, i1);
    const int64_t after = std::clamp(before + c.kDiagonal, i0, i1);
    Vec<T> parts[kPairSums][kPairTile][registers];
    for (int first = 0; first < kPairTile; first += step)
      for (int r = 0; r < registers; ++r) {
        const int64_t j = tile_j + first, lane = r * kLanes<T>;
        Vec<T> sums[kPairSums][step];
        together<step>([&](int t) { sums[0][t] = sums[1][t] = sums[2][t] = Vec<T>{}; });
        auto tile = weights.begin(j, r);
        pair_steps<T, false>(c, tile, j, lane, i0, diagonal, rows, sums);
        pair_steps<T, true>(c, tile, j, lane, diagonal, after, rows + diagonal - i0, sums);
        pair_steps<T, false>(c, tile, j, lane, after, i1, rows + after - i0, sums);
        weights.end(tile, r);
        for (int s = 0; s < kPairSums; ++s)
          together<step>([&](int t) { parts[s][first + t][r] = sums[s][t]; });
      }
    if (Weights::gradients)
      for (int s = 0; s < kPairSums; ++s) c.add(parts[s], columns + s * stride, tile_j);
    weights.done(i1 - i0);
  }
}

static constexpr int64_t pair_task_size(int64_t stride, bool gradients) {
  return kPairSums * ((gradients ? 2 * stride : 0) + kPairRows);
}

// The pairs of the second posteriors [first, last): the gradients of a layout of `stride` values in dmu and dlog_var, all the
// rest in `weights`. `memory` has pair_task_size values.
template <class T, class Layout, class Weights>
static void pair_task(const Layout& c, int64_t stride, int64_t first, int64_t last, T scale, Weights& weights, T* memory,
                      T* dmu, T* dlog_var) {
  const int64_t sums = Weights::gradients ? kPairSums * stride : 0;
  T *const first_role = memory, *const second_role = first_role + sums, *const rows = second_role + sums;
  std::fill_n(first_role, 2 * sums, T(0));
  const int64_t blocks = (stride + kPairRows - 1) / kPairRows, block = round_up((stride + blocks - 1) / blocks, kGroup<T>);
  for (int64_t i0 = 0; i0 < stride; i0 += block) {
    const int64_t i1 = std::min(stride, i0 + block);
    for (int64_t j0 = first; j0 < last; j0 += kPairColumns) {
      for (int s = 0; s < (Weights::gradients ? kPairSums : 0); ++s) std::fill_n(rows + s * kPairRows, i1 - i0, T(0));
      pair_block(c, weights, i0, i1, j0, std::min(last, j0 + kPairColumns), rows, second_role, stride);
      if (!Weights::gradients) continue;
      for (int s = 0; s < kPairSums; ++s)
        for (int64_t i = i0; i < i1; ++i) first_role[s * stride + i] += rows[s * kPairRows + i - i0];
    }
  }
  if (!Weights::gradients) return;
  const T *a = first_role, *b = second_role;
  for (int64_t i = 0; i < stride; ++i) {
    const T w = c.inverse[i];
    dmu[i] = scale * (a[2 * stride + i] - w * b[stride + i]);
    dlog_var[i] = scale * T(0.5) * ((c.var[i] * a[stride + i] - a[i]) + (b[i] - w * b[2 * stride + i]));
  }
}

// Rows [first, last) of both gradients[2][N][D]: the splits added up in order, and transposed.
template <class T>
static void pair_collect(const Posteriors<T>& p, const PairColumns<T>& c, const PairTasks<T>& tasks, T* gradients,
                         int64_t first, int64_t last) {
  const int64_t size = p.D * c.stride;
  for (int part = 0; part < 2; ++part) {
    T* const sums = tasks.gradients + part * size;
    for (int64_t split = 1; split < tasks.splits; ++split)
      for (int64_t d = 0; d < p.D; ++d)
        for (int64_t i = d * c.stride + first; i < d * c.stride + last; ++i) sums[i] += sums[2 * split * size + i];
    transpose(sums + first, c.stride, 1, gradients + part * p.N * p.D + first * p.D, p.D, p.D, last - first);
  }
}
