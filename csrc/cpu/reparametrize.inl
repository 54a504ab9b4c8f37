// See reparametrize.h. Elements are independent of one another. A few samples at a time are taken of all rows of a tile, whose
// elements lie next to one another in each: one element after the other would touch a page for each of its samples.

// Samples at once. Forward one stream of stores takes half the time of four; backward sums over samples stay in registers.
constexpr int64_t kForwardSamples = 1, kBackwardSamples = 4;
constexpr int64_t kElementTile = 1024;  // elements, whose numbers stay in the L1 cache

template <class T>
static int64_t reparametrize_padded(int64_t D) {
  return round_up(D, kLanes<T>);
}

template <class T>
static int64_t reparametrize_rows(int64_t D) {
  return std::max<int64_t>(kElementTile / std::max<int64_t>(reparametrize_padded<T>(D), 1), 1);
}

// Numbers in the noise of `samples` samples of a tile that is made from keys.
template <class T>
static int64_t reparametrize_noise_size(const ReparametrizeInputs<T>& in, int64_t samples) {
  return in.keys ? samples * (round_up(reparametrize_rows<T>(in.D) * in.D, kDraws) + kDraws) : 0;
}

// The noise of samples [s, s_end) of rows [first, last): as given, or made from the keys at `room`.
template <class T>
static ReparametrizeArray<T> reparametrize_noise(const ReparametrizeInputs<T>& in, int64_t s, int64_t s_end, int64_t first,
                                                 int64_t last, T* room) {
  if (!in.keys) return in.noise;
  const int64_t begin = first * in.D / kDraws * kDraws, size = round_up(last * in.D, kDraws) - begin;
  for (int64_t r = s; r < s_end; ++r)
    standard_normal(static_cast<uint64_t>(in.keys[r]), begin, size, room + (r - s) * size);
  return {room - s * size - begin, size, in.D};
}

// Calls f(noise, s, s_end, n, i, lanes, slot) for the samples [s, s_end), `samples` at most, of the vectors of rows first to
// last, of `lanes` lanes from element i, and each with room of its own in a tile. Of a row that is long enough the last one
// reaches back over elements that it makes once more, which costs less than one that is filled and emptied in part; `dense`
// arrays have one row a tile.
template <class T, class F>
static inline void for_each_vector(const ReparametrizeInputs<T>& in, int64_t samples, bool dense, int64_t first, int64_t last,
                                   T* room, const F& f) {
  const int64_t rows = reparametrize_rows<T>(in.D), padded = reparametrize_padded<T>(in.D);
  for (int64_t tile = first; tile < last; tile += rows)
    for (int64_t s = 0; s == 0 || s < in.S; s += samples) {
      const int64_t end = std::min(tile + rows, last), s_end = std::min(s + samples, in.S);
      const int64_t size = dense ? (end - tile) * in.D : in.D;
      const ReparametrizeArray<T> noise = reparametrize_noise(in, s, s_end, tile, end, room);
      for (int64_t n = tile; n < (dense ? tile + 1 : end); ++n) {
        int64_t i = 0, slot = (n - tile) * padded;
        for (; i + kLanes<T> <= size; i += kLanes<T>, slot += kLanes<T>) f(noise, s, s_end, n, i, kLanes<T>, slot);
        if (i < size && i > 0) f(noise, s, s_end, n, size - kLanes<T>, kLanes<T>, slot);
        if (i < size && i == 0) f(noise, s, s_end, n, 0, size, slot);
      }
    }
}

// Whether mean, log σ² and noise have no gaps between rows.
template <class T>
static bool reparametrize_dense(const ReparametrizeInputs<T>& in) {
  return in.mean.is_dense(in.D) && in.log_var.is_dense(in.D) && in.noise.is_dense(in.D);
}

// Of v = log σ², with h = v / 2: σ = e^h, from 0 to infinity, and from u = e^h − 1 and u − h to a few eps of themselves e^v − 1
// and e^v − 1 − v. u − h is what the polynomial of exp adds to h where that needs no reduction, to 2 eps in float32.
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

// `lanes` is kLanes where it goes past the caches.
template <class T>
static inline void reparametrize_store(T* p, int64_t lanes, Vec<T> v, bool past_cache) {
  past_cache ? store_past_cache(p, v) : store_lanes(p, lanes, v);
}

template <class T>
static void reparametrize_forward(const ReparametrizeForward<T>& p, int64_t first, int64_t last) {
  const ReparametrizeInputs<T>& in = p.inputs;
  const int64_t tile = reparametrize_rows<T>(in.D) * reparametrize_padded<T>(in.D);
  const int64_t room = reparametrize_noise_size(in, kForwardSamples);
  Arena<T> arena(Scratch::task, tile, room);
  T* const stds = arena.take(tile);
  const auto vector = [=](const ReparametrizeArray<T>& noise, int64_t s, int64_t s_end, int64_t n, int64_t i, int64_t lanes,
                          int64_t slot) {
    const Vec<T> mean = load_lanes(in.mean.at(0, n) + i, lanes);
    Vec<T> std;
    if (s == 0) {
      const ReparametrizeScale<T> scale(load_lanes(in.log_var.at(0, n) + i, lanes));
      const Vec<T> kl = (mean * mean + scale.expm1_minus_log_var()) * T(0.5);
      reparametrize_store(p.kl + n * in.D + i, lanes, kl, p.kl_past_cache);
      std = scale.std;
      if (s_end < in.S) store(stds + slot, std);
    } else {
      std = load(stds + slot);
    }
    if (s == s_end) return;
    const Vec<T> z = std * load_lanes(noise.at(s, n) + i, lanes) + mean;
    reparametrize_store<T>(p.z + (s * in.N + n) * in.D + i, lanes, z, p.z_past_cache);
  };
  for_each_vector(in, kForwardSamples, reparametrize_dense(in), first, last, arena.take(room), vector);
  fence_stores();
}

// The gradients of one vector, of which those through z are `dmean` and `dstd`.
template <class T>
static inline void reparametrize_finish(const ReparametrizeBackward<T>& p, int64_t n, int64_t i, int64_t lanes, Vec<T> dmean,
                                        Vec<T> dstd) {
  const ReparametrizeInputs<T>& in = p.inputs;
  Vec<T> dkl{};
  if (p.grad_kl.data) {
    const T* const grad = p.grad_kl.at(0, n);
    dkl = p.grad_kl_is_shared ? broadcast(*grad) : load_lanes(grad + i, lanes);
    dmean += dkl * load_lanes(in.mean.at(0, n) + i, lanes);
  }
  if (p.dmean) reparametrize_store(p.dmean + n * in.D + i, lanes, dmean, p.past_cache);
  if (!p.dlog_var) return;
  const ReparametrizeScale<T> scale(load_lanes(in.log_var.at(0, n) + i, lanes));
  Vec<T> dlog_var = scale.std * dstd;
  if (p.grad_kl.data) dlog_var += dkl * scale.expm1();
  reparametrize_store<T>(p.dlog_var + n * in.D + i, lanes, dlog_var * T(0.5), p.past_cache);
}

template <class T>
static void reparametrize_backward(const ReparametrizeBackward<T>& p, int64_t first, int64_t last) {
  ReparametrizeInputs<T> in = p.inputs;
  if (!p.grad_z.data) in.keys = nullptr;  // the noise is not looked at
  const int64_t tile = reparametrize_rows<T>(in.D) * reparametrize_padded<T>(in.D);
  const int64_t room = reparametrize_noise_size(in, kBackwardSamples);
  Arena<T> arena(Scratch::task, tile, tile, room);
  T *const dmeans = arena.take(tile), *const dstds = arena.take(tile);
  const bool kl_dense = p.grad_kl_is_shared ? p.grad_kl.stride_n == 0 : p.grad_kl.is_dense(in.D);
  const bool dense = kl_dense && p.grad_z.is_dense(in.D) && reparametrize_dense(in);
  const auto vector = [=](const ReparametrizeArray<T>& drawn, int64_t s, int64_t s_end, int64_t n, int64_t i, int64_t lanes,
                          int64_t slot) {
    Vec<T> dmean = s ? load(dmeans + slot) : Vec<T>{}, dstd = s ? load(dstds + slot) : Vec<T>{};
    if (p.grad_z.data) {
      const T *grad = p.grad_z.at(s, n) + i, *noise = drawn.at(s, n) + i;
      for (int64_t r = s; r < s_end; ++r, grad += p.grad_z.stride_s, noise += drawn.stride_s) {
        const Vec<T> g = load_lanes(grad, lanes);
        dmean += g, dstd += g * load_lanes(noise, lanes);
      }
    }
    if (s_end == in.S) return reparametrize_finish(p, n, i, lanes, dmean, dstd);
    store(dmeans + slot, dmean), store(dstds + slot, dstd);
  };
  for_each_vector(in, kBackwardSamples, dense, first, last, arena.take(room), vector);
  fence_stores();
}

template <class T>
static constexpr ReparametrizeKernels<T> reparametrize_kernels() {
  return {reparametrize_forward<T>, reparametrize_backward<T>};
}
