// See reparametrize.h. Elements are independent of one another. Samples are taken a few at a time for all rows of a tile, whose
// elements lie next to one another in each: one element after the other would touch a page for each of its samples.

constexpr int64_t kSampleTile = 4;       // samples
constexpr int64_t kElementTile = 1024;   // elements, whose numbers stay in the L1 cache

template <class T>
static int64_t reparametrize_padded(int64_t D) {
  return round_up(D, kLanes<T>);
}

template <class T>
static int64_t reparametrize_rows(int64_t D) {
  return std::max<int64_t>(kElementTile / std::max<int64_t>(reparametrize_padded<T>(D), 1), 1);
}

// Numbers in the noise of a tile that is made from keys.
template <class T>
static int64_t reparametrize_noise_size(const ReparametrizeInputs<T>& in) {
  return in.keys ? kSampleTile * (round_up(reparametrize_rows<T>(in.D) * in.D, kDraws) + kDraws) : 0;
}

// The noise of samples s to s + kSampleTile of rows [first, last): as given, or made from the keys at `room`.
template <class T>
static ReparametrizeArray<T> reparametrize_noise(const ReparametrizeInputs<T>& in, int64_t s, int64_t first, int64_t last,
                                                 T* room) {
  if (!in.keys) return in.noise;
  const int64_t begin = first * in.D / kDraws * kDraws, size = round_up(last * in.D, kDraws) - begin;
  for (int64_t r = s; r < std::min(s + kSampleTile, in.S); ++r)
    standard_normal(static_cast<uint64_t>(in.keys[r]), begin, size, room + (r - s) * size);
  return {room - s * size - begin, size, in.D};
}

// Calls f(noise, s, n, i, lanes, slot) for samples s to s + kSampleTile of the vectors of rows first to last, of `lanes` lanes
// from element i, and each with room of its own in a tile. Of a row that is long enough the last one reaches back over elements
// that it makes once more, which costs less than one that is filled and emptied in part.
template <class T, class F>
static inline void for_each_vector(const ReparametrizeInputs<T>& in, int64_t first, int64_t last, T* room, const F& f) {
  const int64_t rows = reparametrize_rows<T>(in.D), padded = reparametrize_padded<T>(in.D);
  for (int64_t tile = first; tile < last; tile += rows)
    for (int64_t s = 0; s == 0 || s < in.S; s += kSampleTile) {
      const int64_t end = std::min(tile + rows, last);
      const ReparametrizeArray<T> noise = reparametrize_noise(in, s, tile, end, room);
      for (int64_t n = tile; n < end; ++n) {
        int64_t i = 0, slot = (n - tile) * padded;
        for (; i + kLanes<T> <= in.D; i += kLanes<T>, slot += kLanes<T>) f(noise, s, n, i, kLanes<T>, slot);
        if (i < in.D && i > 0) f(noise, s, n, in.D - kLanes<T>, kLanes<T>, slot);
        if (i < in.D && i == 0) f(noise, s, n, 0, in.D, slot);
      }
    }
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
  const int64_t tile = reparametrize_rows<T>(in.D) * reparametrize_padded<T>(in.D), room = reparametrize_noise_size(in);
  Arena<T> arena(Scratch::task, tile, room);
  T* const stds = arena.take(tile);
  for_each_vector(in, first, last, arena.take(room), [=](const ReparametrizeArray<T>& drawn, int64_t s, int64_t n, int64_t i,
                                                         int64_t lanes, int64_t slot) {
    const Vec<T> mean = load_lanes(in.mean.at(0, n) + i, lanes);
    Vec<T> std;
    if (s == 0) {
      const ReparametrizeScale<T> scale(load_lanes(in.log_var.at(0, n) + i, lanes));
      const Vec<T> kl = (mean * mean + scale.expm1_minus_log_var()) * T(0.5);
      reparametrize_store(p.kl + n * in.D + i, lanes, kl, p.kl_past_cache);
      std = scale.std;
      if (in.S > kSampleTile) store(stds + slot, std);
    } else {
      std = load(stds + slot);
    }
    const T* noise = drawn.at(s, n) + i;
    T* z = p.z + (s * in.N + n) * in.D + i;
    const int64_t next_noise = drawn.stride_s, next_z = in.N * in.D;  // which would be read again after each store
    for (int64_t left = std::min(kSampleTile, in.S - s); left > 0; --left, noise += next_noise, z += next_z)
      reparametrize_store<T>(z, lanes, std * load_lanes(noise, lanes) + mean, p.z_past_cache);
  });
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
  const int64_t tile = reparametrize_rows<T>(in.D) * reparametrize_padded<T>(in.D), room = reparametrize_noise_size(in);
  Arena<T> arena(Scratch::task, tile, tile, room);
  T *const dmeans = arena.take(tile), *const dstds = arena.take(tile);
  for_each_vector(in, first, last, arena.take(room), [=](const ReparametrizeArray<T>& drawn, int64_t s, int64_t n, int64_t i,
                                                         int64_t lanes, int64_t slot) {
    const int64_t end = std::min(s + kSampleTile, in.S);
    Vec<T> dmean = s ? load(dmeans + slot) : Vec<T>{}, dstd = s ? load(dstds + slot) : Vec<T>{};
    if (p.grad_z.data) {
      const T *grad = p.grad_z.at(s, n) + i, *noise = drawn.at(s, n) + i;
      for (int64_t r = s; r < end; ++r, grad += p.grad_z.stride_s, noise += drawn.stride_s) {
        const Vec<T> g = load_lanes(grad, lanes);
        dmean += g, dstd += g * load_lanes(noise, lanes);
      }
    }
    if (end == in.S) return reparametrize_finish(p, n, i, lanes, dmean, dstd);
    store(dmeans + slot, dmean), store(dstds + slot, dstd);
  });
  fence_stores();
}

template <class T>
static constexpr ReparametrizeKernels<T> reparametrize_kernels() {
  return {reparametrize_forward<T>, reparametrize_backward<T>};
}
