// Everything that is compiled once per instruction-set level; included inside the level's namespace.
#include "simd.inl"
#include "gmm.inl"

extern const MathKernels<float> math_f{apply<float, exp<float>>, apply<float, log<float>>};
extern const MathKernels<double> math_d{apply<double, exp<double>>, apply<double, log<double>>};
extern const GmmKernels<float> gmm_f = gmm_kernels<float>();
extern const GmmKernels<double> gmm_d = gmm_kernels<double>();
