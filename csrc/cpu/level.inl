// Everything that is compiled once per instruction-set level; included inside the level's namespace.
#include "simd.inl"
#include "gmm.inl"

template <class T, Vec<T> (*f)(Vec<T>)>
static void apply(const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    T lanes[kLanes<T>] = {};
    const int64_t m = std::min<int64_t>(n - i, kLanes<T>);
    std::copy_n(x + i, m, lanes);
    store(lanes, f(load(lanes)));
    std::copy_n(lanes, m, y + i);
  }
}

extern const MathKernels<float> math_f{apply<float, exp<float>>, apply<float, log<float>>};
extern const MathKernels<double> math_d{apply<double, exp<double>>, apply<double, log<double>>};
extern const GmmKernels<float> gmm_f = gmm_kernels<float>();
extern const GmmKernels<double> gmm_d = gmm_kernels<double>();
