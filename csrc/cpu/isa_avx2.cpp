// Standard headers come before the target pragma, so that their inline functions stay at the baseline and no other file
// can be linked against a copy that needs this level.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "scratch.h"

#if defined(__x86_64__)
#define LATENT_VECTOR_BYTES 32
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace latent_engine::avx2 {
#include "level.inl"
}  // namespace latent_engine::avx2
#pragma GCC pop_options
#else
namespace latent_engine::avx2 {  // never chosen: isa.cpp offers base only
extern const Kernels<float> kernels_f{};
extern const Kernels<double> kernels_d{};
}  // namespace latent_engine::avx2
#endif
