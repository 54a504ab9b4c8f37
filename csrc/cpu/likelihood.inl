// See likelihood.h. One pass over blocks of features, which lie across lanes; every number is read once, and what one row
// needs beyond registers stays in the L1 cache. Parameters that serve several features or rows cost their exp and log once.

constexpr int64_t kBlockGroups = 64;  // groups of 64 bytes a block: Π(1 + e) ≤ 2^64 cannot overflow

template <class T>
constexpr int64_t kBlock = kBlockGroups * kGroup<T>;

// A block of features of one row: whole groups. Passed by value: vectors are stored where the compiler cannot know that they
// leave the caller's block alone, and it would read the pointers again after each.
template <class T>
struct LikelihoodBlock {
  const T *x, *a, *d;
  int64_t d_stride, d_step;
  const typename Simd<T>::Int* observed;  // −1 or 0, or null
  T* gradients[3];                        // null if not stored
};

template <class L, class T>
static inline void likelihood_load(const LikelihoodBlock<T>& b, int64_t i, Vec<T>* d) {
  for (int j = 0; j < L::derived; ++j) d[j] = load(b.d + j * b.d_stride + (b.d_step ? i : i % kGroup<T>));
}

// Decoder outputs come from memory: asked for 2 KB ahead they take 10 to 25 % less time than by the hardware's own fetching.
template <class T, bool write>
static inline void likelihood_prefetch(const T* p) {
  __builtin_prefetch(p + 2048 / sizeof(T), write);
}

template <class L, class T, bool masked>
static void likelihood_sum(LikelihoodBlock<T> b, int64_t n, typename L::template Sum<T>* out) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  typename L::template Sum<T> sums[registers];  // not *out, which would be stored at every step
  std::copy_n(out, registers, sums);
  for (int64_t group = 0; group < n; group += kGroup<T>) {
    likelihood_prefetch<T, false>(b.a + group);
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      const int64_t i = group + r * kLanes<T>;
      Vec<T> d[kLikelihoodDerived];
      likelihood_load<L>(b, i, d);
      const IntVec<T> observed = masked ? (IntVec<T>)load((const T*)b.observed + i) : IntVec<T>{};
      sums[r].template add<masked>(load(b.x + i), load(b.a + i), d, observed);
    }
  }
  std::copy_n(sums, registers, out);
}

// What becomes of the gradients of b. One or the other: a product that is stored too is not contracted with the sum.
enum class LikelihoodDb { none, stored, summed };

// Stores the gradients, or adds up those of b.
template <class L, class T, bool masked, LikelihoodDb use>
static void likelihood_gradient(LikelihoodBlock<T> b, int64_t n, T grad, Vec<T>* out) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  const Vec<T> g = broadcast(grad);
  Vec<T> sums[registers];
  std::copy_n(out, registers, sums);
  for (int64_t group = 0; group < n; group += kGroup<T>) {
    likelihood_prefetch<T, false>(b.a + group);
    if (b.gradients[1]) likelihood_prefetch<T, true>(b.gradients[1] + group);
#pragma GCC unroll 4
    for (int r = 0; r < registers; ++r) {
      const int64_t i = group + r * kLanes<T>;
      Vec<T> d[kLikelihoodDerived];
      likelihood_load<L>(b, i, d);
      const IntVec<T> observed = masked ? (IntVec<T>)load((const T*)b.observed + i) : IntVec<T>{};
      const Gradients<T> all = L::template gradient<T>(load(b.x + i), load(b.a + i), d, g);
      if (b.gradients[0]) store(b.gradients[0] + i, keep<T, masked>(observed, all.x));
      if (b.gradients[1]) store(b.gradients[1] + i, keep<T, masked>(observed, all.a));
      if (use == LikelihoodDb::stored) store(b.gradients[2] + i, keep<T, masked>(observed, all.b));
      if (use == LikelihoodDb::summed) sums[r] += keep<T, masked>(observed, all.b);
    }
  }
  std::copy_n(sums, registers, out);
}

// d[derived][stride] of the values b[0, step, ...] of n features, padded to whole groups; of one group if step is 0.
template <class L, class T, bool gradient>
static void likelihood_derive(const T* b, int64_t step, int64_t n, T* d, int64_t stride) {
  const int64_t size = step ? n : kGroup<T>;
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    T values[kLanes<T>];
    for (int64_t j = 0; j < kLanes<T>; ++j) values[j] = b[std::min(i + j, size - 1) * step];
    Vec<T> out[kLikelihoodDerived];
    L::template derive<T, gradient>(load(values), out);
    for (int j = 0; j < L::derived; ++j) store(d + j * stride + i, out[j]);
  }
}

template <class L, class T, bool gradient>
static void likelihood_derive_all(const LikelihoodInputs<T>& in) {
  likelihood_derive<L, T, gradient>(in.b.data, in.b.step, in.P, in.derived, in.derived_size);
}

// The rows of a task, and the scratch memory they need.
template <class L, class T, bool gradient>
class LikelihoodTask {
  using Int = typename Simd<T>::Int;

 public:
  LikelihoodTask(const LikelihoodInputs<T>& in, const LikelihoodGrid& grid, int64_t task)
      : s_chunk(task % grid.s_chunks), n_chunk(task / grid.s_chunks), s_first(in.S * s_chunk / grid.s_chunks),
        s_last(in.S * (s_chunk + 1) / grid.s_chunks), n_first(in.N * n_chunk / grid.n_chunks),
        n_last(in.N * (n_chunk + 1) / grid.n_chunks), in_(in),
        arena_(Scratch::task, L::derived * kBlock<T>, kBlock<T>, 2 * kGroup<T>, 3 * kBlock<T>),
        derived_(arena_.take(L::derived * kBlock<T>)), observed_((Int*)arena_.take(kBlock<T>)),
        tail_(arena_.take(2 * kGroup<T>)), scratch(arena_.take(3 * kBlock<T>)) {}

  // Calls f(s, n) for each row, in the order of memory while the rows of x, which the samples share as a rule, stay in the
  // cache, else all samples of a data point in turn.
  template <class F>
  void for_each_row(const F& f) {
    if ((n_last - n_first) * in_.P * int64_t(sizeof(T)) <= likelihood_cache(gradient)) {
      for (int64_t s = s_first; s < s_last; ++s)
        for (int64_t n = n_first; n < n_last; ++n) f(s, n);
    } else {
      for (int64_t n = n_first; n < n_last; ++n)
        for (int64_t s = s_first; s < s_last; ++s) f(s, n);
    }
  }

  // Calls f(p, block, whole, tail, rest) for each block of row (s, n), which begins at feature p: `whole` features are whole
  // groups, the `rest` is the group `tail`, of which only that many are observed.
  template <class F>
  void for_each_block(int64_t s, int64_t n, const F& f) {
    const T *x = in_.x.at(s, n, 0), *a = in_.a.at(s, n, 0);
    for (int64_t p = 0; p < in_.P; p += kBlock<T>) {
      const int64_t size = std::min(kBlock<T>, in_.P - p), whole = size / kGroup<T> * kGroup<T>, rest = size - whole;
      LikelihoodBlock<T> block{x + p, a + p, nullptr, 0, 0, nullptr, {}};
      derive(s, n, p, size, block);
      if (in_.mask.data) observe(in_.mask.at(s, n, p), size);
      if (in_.mask.data) block.observed = observed_;
      LikelihoodBlock<T> tail = block;
      if (rest) {
        std::copy_n(x + p + whole, rest, tail_);
        std::copy_n(a + p + whole, rest, tail_ + kGroup<T>);
        if (!in_.mask.data)
          for (int64_t i = 0; i < kGroup<T>; ++i) observed_[whole + i] = i < rest ? -1 : 0;
        tail.x = tail_, tail.a = tail_ + kGroup<T>, tail.observed = observed_ + whole;
        if (tail.d_step) tail.d += whole;
      }
      f(p, block, whole, tail, rest);
    }
  }

  const int64_t s_chunk, n_chunk, s_first, s_last, n_first, n_last;

 private:
  void derive(int64_t s, int64_t n, int64_t p, int64_t size, LikelihoodBlock<T>& block) {
    if (L::derived == 0) return;
    block.d_step = in_.b.step;
    if (in_.derived) {
      block.d = in_.derived + p * in_.b.step, block.d_stride = in_.derived_size;
    } else {
      block.d = derived_, block.d_stride = kBlock<T>;
      if (in_.b.step || p == 0) likelihood_derive<L, T, gradient>(in_.b.at(s, n, p), in_.b.step, size, derived_, kBlock<T>);
    }
  }

  void observe(const bool* mask, int64_t size) {
    const int64_t step = in_.mask.step, padded = round_up(size, kGroup<T>);
    for (int64_t i = 0; i < size; ++i) observed_[i] = -Int(mask[i * step]);
    std::fill(observed_ + size, observed_ + padded, 0);
  }

  const LikelihoodInputs<T>& in_;
  Arena<T> arena_;
  T* derived_;
  Int* observed_;
  T* tail_;

 public:
  T* const scratch;  // [3][kBlock], for the caller
};

template <class L, class T>
static void likelihood_forward(const LikelihoodForward<T>& p, int64_t task) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  LikelihoodTask<L, T, false> rows(p.inputs, p.grid, task);
  rows.for_each_row([&](int64_t s, int64_t n) {
    double log_prob = 0;
    rows.for_each_block(s, n, [&](int64_t, const LikelihoodBlock<T>& block, int64_t whole, const LikelihoodBlock<T>& tail,
                                  int64_t rest) {
      typename L::template Sum<T> sums[registers];
      (block.observed ? likelihood_sum<L, T, true> : likelihood_sum<L, T, false>)(block, whole, sums);
      if (rest) likelihood_sum<L, T, true>(tail, kGroup<T>, sums);
      Vec<T> totals[registers];
      for (int r = 0; r < registers; ++r) totals[r] = sums[r].total();
      log_prob += sum_lanes<T>(totals);
    });
    p.log_prob[s * p.inputs.N + n] = T(log_prob);
  });
}

template <class L, class T, LikelihoodDb use>
static void likelihood_gradients(const LikelihoodBackward<T>& p, int64_t task) {
  constexpr int registers = 64 / LATENT_VECTOR_BYTES;
  const int64_t N = p.inputs.N, P = p.inputs.P;
  LikelihoodTask<L, T, true> rows(p.inputs, p.grid, task);
  rows.for_each_row([&](int64_t s, int64_t n) {
    const T g = p.grad[s * p.grad_strides[0] + n * p.grad_strides[1]];
    rows.for_each_block(s, n, [&](int64_t first, LikelihoodBlock<T> block, int64_t whole, LikelihoodBlock<T> tail,
                                  int64_t rest) {
      for (int k = 0; k < 3; ++k) {
        const LikelihoodGradient<T>& to = p.gradients[k];
        if (!to.needed() || !to.per_p) continue;
        T* const scratch = rows.scratch + k * kBlock<T>;
        block.gradients[k] = to.full ? to.full + (s * N + n) * P + first : scratch;
        tail.gradients[k] = scratch + whole;
      }
      Vec<T> sums[registers] = {};
      const auto kernel = block.observed ? likelihood_gradient<L, T, true, use> : likelihood_gradient<L, T, false, use>;
      kernel(block, whole, g, sums);
      if (rest) likelihood_gradient<L, T, true, use>(tail, kGroup<T>, g, sums);
      for (int k = 0; k < 3; ++k) {
        const LikelihoodGradient<T>& to = p.gradients[k];
        if (to.full) std::copy_n(tail.gradients[k], rest, block.gradients[k] + whole);
        if (!to.partial) continue;
        const int64_t is = to.per_s ? s : rows.s_chunk, in = to.per_n ? n : rows.n_chunk;
        const int64_t row = is * (to.per_n ? N : p.grid.n_chunks) + in;
        const bool fresh = (to.per_s || s == rows.s_first) && (to.per_n || n == rows.n_first);
        if (to.per_p) {
          double* const partial = to.partial + row * P + first;
          if (fresh) std::fill_n(partial, whole + rest, 0.0);
          for (int64_t i = 0; i < whole + rest; ++i) partial[i] += double(block.gradients[k][i]);
        } else {
          to.partial[row] = (fresh && first == 0 ? 0.0 : to.partial[row]) + sum_lanes<T>(sums);
        }
      }
    });
  });
}

template <class L, class T>
static void likelihood_backward(const LikelihoodBackward<T>& p, int64_t task) {
  using Db = LikelihoodDb;
  auto gradients = likelihood_gradients<L, T, Db::none>;
  if constexpr (L::derived > 0)
    if (p.gradients[2].needed())
      gradients = p.gradients[2].per_p ? likelihood_gradients<L, T, Db::stored> : likelihood_gradients<L, T, Db::summed>;
  gradients(p, task);
}

template <class L, class T>
static constexpr LikelihoodKernels<T> likelihood_kernels() {
  return {likelihood_derive_all<L, T, false>, likelihood_derive_all<L, T, true>, likelihood_forward<L, T>,
          likelihood_backward<L, T>};
}
