// The deviation of the total KL over ordered pairs, and its gradients. Two ways, of which the binding takes the cheaper: from
// Gram matrices in float64, or, here, from the pair matrix. Lanes hold a cache line of dimensions, and both divergences of a
// pair share δ = μ_i − μ_j and v = σ²_i − σ²_j, so that a pair of them costs 6 operations a dimension and 12 more for the
// gradients. Of close posteriors no digits cancel:
//
//     2 KL(i‖j) = Σ_d (δ² + v) w_j + Σ_d log σ²_j / σ²_i                               w = 1 / σ²
//     ∂μ_i = Σ_j c δ,   ∂log σ²_i = ½ Σ_j (c v − g_ji w_i δ²),   c = g_ij w_j + g_ji w_i,   g_ij the weight of KL(i‖j)

constexpr int kFirstRows = LATENT_VECTOR_BYTES == 64 ? 4 : 2, kSecondRows = 2;  // of a register tile
constexpr int64_t kPairBlock = 64;   // posteriors that stay in the cache, with their gradients, while others pass
constexpr int64_t kGradientRun = 256;  // posteriors whose gradients are added up before they join the total

enum PairPart { of_mu, of_variance, of_inverse };

// Packs the lines [first, last), a run at most. Dimensions past D have equal posteriors. Unless null, log_det[N] gains the
// log-determinants; so that those of close posteriors lose no digits to a common level, that of the first one is left out. The
// padding has the last means: δ² overflows only where it does elsewhere.
template <class T>
static void pair_pack(const Posteriors<T>& p, const PairValues<T>& values, int64_t first, int64_t last, double* log_det) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  for (int64_t i = 0; i < p.N; ++i) {
    const T *const mu = p.mu + i * p.mu_strides[0], *const log_var = p.log_var + i * p.log_var_strides[0];
    Vec<T> level[registers] = {};
    for (int64_t line = first; line < last; ++line)
      for (int r = 0; r < registers; ++r) {
        const int64_t d = line * kGroup<T> + r * kLanes<T>, left = std::max<int64_t>(p.D - d, 0);
        const auto read = [&](const T* row, int64_t stride) { return load_strided(row + d * stride, stride, left); };
        T* const at = values.at(i, line) + r * kLanes<T>;
        const Vec<T> x = read(log_var, p.log_var_strides[1]);
        Vec<T> w;
        store(at + of_mu * kGroup<T>, read(mu, p.mu_strides[1]));
        store(at + of_variance * kGroup<T>, exp<T>(x, w));
        store(at + of_inverse * kGroup<T>, w);
        if (log_det) level[r] += x - read(p.log_var, p.log_var_strides[1]);
      }
    if (log_det) log_det[i] += sum_lanes<T>(level);
  }
  for (int64_t i = p.N; i < round_up(p.N, kPairTile); ++i)
    for (int64_t line = first; line < last; ++line) {
      std::fill_n(values.at(i, line), values.kSize, T(0));
      std::copy_n(values.at(p.N - 1, line), kGroup<T>, values.at(i, line));
    }
}

// Means of the dimensions of a line. Of a mean only Σ v Σ w − N² cancels: the other sums may be of T, over runs of posteriors.
template <class T>
static void pair_means(const PairwiseKlMean<T>& p, const PairValues<T>& values, int64_t line) {
  constexpr int halves = kLanes<T> / kLanes<double>;
  constexpr MomentSum narrow[] = {of_m, of_mw, of_m2, of_m2w};
  const int64_t N = p.batch.N, D = p.batch.D;
  for (int64_t d = line * kGroup<T>; d < std::min(D, (line + 1) * kGroup<T>); d += kLanes<T>) {
    const auto part = [&](int64_t i, PairPart k) { return load(values.at(i, line) + k * kGroup<T> + d % kGroup<T>); };
    Vec<T> shift = {};
    for (int64_t i = 0; i < N; ++i) shift += part(i, of_mu) - part(0, of_mu);
    const Vec<T> middle = part(0, of_mu) + shift / T(N);
    Vec<T> totals[kMeanSums] = {};
    Vec<double> of_var[halves] = {}, of_weight[halves] = {};
    for (int64_t i0 = 0; i0 < N; i0 += kGradientRun) {
      Vec<T> sums[kMeanSums] = {};
      for (int64_t i = i0; i < std::min(N, i0 + kGradientRun); ++i) {
        const Vec<T> m = part(i, of_mu) - middle, v = part(i, of_variance), w = part(i, of_inverse), mw = m * w;
        sums[of_m] += m, sums[of_mw] += mw, sums[of_m2] += m * m, sums[of_m2w] += m * mw;
        of_var[0] += wide_half<T, 0>(v), of_weight[0] += wide_half<T, 0>(w);
        if constexpr (halves == 2) of_var[1] += wide_half<T, 1>(v), of_weight[1] += wide_half<T, 1>(w);
      }
      for (const MomentSum s : narrow) totals[s] += sums[s];
    }
    for (int k = 0; k < std::min<int64_t>(kLanes<T>, D - d); ++k) {
      double sums[kMeanSums];
      for (const MomentSum s : narrow) sums[s] = totals[s][k];
      sums[of_v] = of_var[k / kLanes<double>][k % kLanes<double>];
      sums[of_w] = of_weight[k / kLanes<double>][k % kLanes<double>];
      p.moments[centre * D + d + k] = middle[k];
      pairwise_kl_mean_of(p, d + k, sums, 1);
    }
  }
}

// Σ (δ² + v) w over the lines [begin, end) for the first posteriors i, … and the second ones j, …, and off the diagonal the
// other way round: set, or added to what is there.
template <class T>
static inline void pair_total_tile(const PairValues<T>& values, int64_t begin, int64_t end, int64_t i, int64_t j, bool add,
                                   T* totals, int64_t stride) {
  constexpr int R = kFirstRows, S = kSecondRows, registers = 64 / LATENT_VECTOR_BYTES;
  constexpr int64_t size = PairValues<T>::kSize;
  Vec<T> parts[2 * R * S][registers];
#pragma GCC unroll 4
  for (int r = 0; r < registers; ++r) {
    const T *x = values.at(i, begin) + r * kLanes<T>, *y = values.at(j, begin) + r * kLanes<T>;
    Vec<T> sums[R][S] = {}, turned[R][S] = {};
    for (int64_t line = begin; line < end; ++line, x += kPairTile * size, y += kPairTile * size) {
      const auto part = [](const T* row, PairPart k) { return load(row + k * kGroup<T>); };
#pragma GCC unroll 4
      for (int a = 0; a < R; ++a) {
        const T* const row = x + a * size;
        const Vec<T> mu = part(row, of_mu), var = part(row, of_variance), inverse = part(row, of_inverse);
#pragma GCC unroll 4
        for (int b = 0; b < S; ++b) {
          const Vec<T> delta = mu - part(y + b * size, of_mu), v = var - part(y + b * size, of_variance);
          sums[a][b] += (delta * delta + v) * part(y + b * size, of_inverse);
          turned[a][b] += (delta * delta - v) * inverse;
        }
      }
    }
#pragma GCC unroll 4
    for (int a = 0; a < R; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < S; ++b) parts[b * R + a][r] = sums[a][b], parts[(R + a) * S + b][r] = turned[a][b];
  }
  Vec<T> folded[2 * R * S];
  T out[2 * R * S];
#pragma GCC unroll 16
  for (int k = 0; k < 2 * R * S; ++k) folded[k] = fold_registers<T>(parts[k]);
  sum_halves_of<T>(folded, out);
  const auto put = [&](const T* sums, int64_t n, T* to) {
    for (int64_t k = 0; k < n; ++k) to[k] = add ? to[k] + sums[k] : sums[k];
  };
  for (int b = 0; b < S; ++b) put(out + b * R, R, totals + (j + b) * stride + i);
  for (int a = 0; a < (j < i ? R : 0); ++a) put(out + (R + a) * S, S, totals + (i + a) * stride + j);
}

// Those for the posteriors [first, last) and all before them, whole tiles, into totals[stride][stride].
template <class T>
static void pair_totals(const PairValues<T>& values, int64_t begin, int64_t end, int64_t first, int64_t last, bool add,
                        T* totals, int64_t stride) {
  for (int64_t block = 0; block < last; block += kPairBlock)
    for (int64_t i = std::max(first, block); i < last; i += kFirstRows)
      for (int64_t j = block; j < std::min(i + kFirstRows, block + kPairBlock); j += kSecondRows)
        pair_total_tile(values, begin, end, i, j, add, totals, stride);
}

// KL − mean of the second posteriors [first, last) from the totals of all parts, and their sums.
template <class T>
static void pair_divergences(const PairwiseKlDirect<T>& p, int64_t first, int64_t last) {
  const int64_t stride = p.stride, N = p.batch.N;
  for (int64_t j = first; j < last; ++j) {
    T* const row = p.deviations + j * stride;
    for (int64_t i = 0; i < stride; i += kLanes<T>) {
      Vec<T> total = load(row + i);
      for (int64_t part = 1; part < p.parts; ++part) total += load(row + part * stride * stride + i);
      store(row + i, T(0.5) * (total + (broadcast(p.log_det[j]) - load(p.log_det + i))) - p.mean);
    }
    if (j < N) std::fill(row + N, row + stride, T(0)), row[j] = 0;
    else std::fill_n(row, stride, T(0));
    p.sums[j] = sum_groups<T>(stride, [&](int64_t k) { return load(row + k); });
  }
}

// Takes the mean of the deviations out of them, which rounding left there, and adds up their squares.
template <class T>
static void pair_deviations(const PairwiseKlDirect<T>& p, T error, int64_t first, int64_t last) {
  const int64_t stride = p.stride, N = p.batch.N;
  for (int64_t j = first; j < last; ++j) {
    T* const row = p.deviations + j * stride;
    for (int64_t i = 0; i < (j < N ? N : 0); ++i) row[i] -= i == j ? T(0) : error;
    p.squares[j] = sum_groups<double>(stride, [&](int64_t k) { return load_as<double>(row + k) * load_as<double>(row + k); });
  }
}

// Adds those of the pairs of posteriors i, …, i + rows − 1 with [first, last), at most i, to `sums` of the former and
// `others` of the latter, which are at `first`: of μ, and twice those of log σ². One line of dimensions, in [posteriors][kGroup].
template <class T, int rows>
static inline void pair_gradient_tile(const PairwiseKlDirect<T>& p, const PairValues<T>& values, int64_t i, int64_t first,
                                      int64_t last, int64_t lane, T* const (&sums)[2], T* const (&others)[2]) {
  const auto part = [&](int64_t row, PairPart k) { return load(values.data + row * values.kSize + k * kGroup<T> + lane); };
  Vec<T> mu[rows], var[rows], inverse[rows], dmu[rows], dlog_var[rows];
#pragma GCC unroll 4
  for (int a = 0; a < rows; ++a) {
    mu[a] = part(i + a, of_mu), var[a] = part(i + a, of_variance), inverse[a] = part(i + a, of_inverse);
    dmu[a] = Vec<T>{}, dlog_var[a] = Vec<T>{};
  }
  T *mu_sum = others[0] + lane, *log_var_sum = others[1] + lane;
  for (int64_t j = first; j < last; ++j, mu_sum += kGroup<T>, log_var_sum += kGroup<T>) {
    const Vec<T> mu_j = part(j, of_mu), var_j = part(j, of_variance), inverse_j = part(j, of_inverse);
    const T *const as_first = p.deviations + j * p.stride + i, *as_second = p.deviations + i * p.stride + j;
    Vec<T> dmu_j = load(mu_sum), dlog_var_j = load(log_var_sum);
#pragma GCC unroll 4
    for (int a = 0; a < rows; ++a) {
      const Vec<T> delta = mu[a] - mu_j, v = var[a] - var_j, square = delta * delta;
      const Vec<T> of_first = as_first[a] * inverse_j, of_second = as_second[a * p.stride] * inverse[a];
      const Vec<T> both = of_first + of_second;
      dmu[a] += both * delta, dmu_j -= both * delta;
      dlog_var[a] += both * v, dlog_var_j -= both * v;
      dlog_var[a] -= of_second * square, dlog_var_j -= of_first * square;
    }
    store(mu_sum, dmu_j), store(log_var_sum, dlog_var_j);
  }
#pragma GCC unroll 4
  for (int a = 0; a < rows; ++a) {
    T *const at = sums[0] + (i + a) * kGroup<T> + lane, *const log_var_at = sums[1] + (i + a) * kGroup<T> + lane;
    store(at, load(at) + dmu[a]), store(log_var_at, load(log_var_at) + dlog_var[a]);
  }
}

// The gradients of a line: its results and what the next one needs of the posteriors i, … come into the cache meanwhile.
template <class T>
static inline void pair_prefetch(const PairwiseKlDirect<T>& p, int64_t i, int64_t line) {
  const Posteriors<T>& b = p.batch;
  const int64_t d = line * kGroup<T>, next = d + kGroup<T>;
  for (int64_t row = i; row < i + kPairTile; ++row) {
    __builtin_prefetch(p.gradients + row * b.D + d, 1), __builtin_prefetch(p.gradients + (b.N + row) * b.D + d, 1);
    __builtin_prefetch(b.mu + row * b.mu_strides[0] + next * b.mu_strides[1]);
    __builtin_prefetch(b.log_var + row * b.log_var_strides[0] + next * b.log_var_strides[1]);
  }
}

// Those of all pairs in `sums`, from the values of one line; `others` have room for kPairBlock posteriors.
template <class T>
static void pair_line_gradient(const PairwiseKlDirect<T>& p, const PairValues<T>& values, T* const (&sums)[2],
                               T* const (&others)[2]) {
  const int64_t N = round_up(p.batch.N, kPairTile);
  for (T* sum : sums) std::fill_n(sum, N * kGroup<T>, T(0));
  for (int64_t run = 0; run < N; run += kGradientRun)
    for (int64_t block = 0; block < std::min(N, run + kGradientRun); block += kPairBlock) {
      const int64_t end = std::min(N, block + kPairBlock);
      for (T* sum : others) std::fill_n(sum, kPairBlock * kGroup<T>, T(0));
      for (int64_t i = std::max(run, block); i < std::min(N, run + kGradientRun); i += kPairTile) {
        if (i < end) pair_prefetch(p, i, values.first);
        const int64_t inside = (i - block) * kGroup<T>;
        for (int64_t lane = 0; lane < kGroup<T>; lane += kLanes<T>) {
          for (int64_t row = i; row < i + kPairTile; row += kFirstRows)
            pair_gradient_tile<T, kFirstRows>(p, values, row, block, std::min(i, end), lane, sums, others);
          for (int64_t row = i + 1; row < (i < end ? i + kPairTile : 0); ++row)
            pair_gradient_tile<T, 1>(p, values, row, i, row, lane, sums, {others[0] + inside, others[1] + inside});
        }
      }
      for (int k = 0; k < 2; ++k)
        for (int64_t at = 0; at < (end - block) * kGroup<T>; ++at) sums[k][block * kGroup<T> + at] += others[k][at];
    }
}

// The gradients of the lines [first, last).
template <class T>
static void pair_direct_gradient(const PairwiseKlDirect<T>& p, int64_t first, int64_t last) {
  const int64_t N = p.batch.N, D = p.batch.D, size = PairValues<T>::size(N, 1), padded = round_up(N, kPairTile) * kGroup<T>;
  constexpr int64_t block = kPairBlock * kGroup<T>;
  Arena<T> arena(Scratch::task, size, padded, padded, block, block);
  T *const data = arena.take(size), *const sums[] = {arena.take(padded), arena.take(padded)};
  T* const others[] = {arena.take(block), arena.take(block)};
  for (int64_t line = first; line < last; ++line) {
    const PairValues<T> values{data, line, 1};
    pair_pack(p.batch, values, line, line + 1, nullptr);
    for (int64_t i = 0; i < N; ++i) {
      T* const inverse = values.at(i, line) + of_inverse * kGroup<T>;
      for (int64_t k = 0; k < kGroup<T>; ++k) inverse[k] *= p.unit;
    }
    pair_line_gradient(p, values, sums, others);
    for (int k = 0; k < 2; ++k)
      pair_unpack(p.batch, line * kGroup<T>, 0, N, p.gradients + k * N * D,
                  [&](int64_t at) { return load(sums[k] + at) * (k == 0 ? p.scale : T(0.5) * p.scale); });
  }
}
