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
#define LATENT_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
namespace latent_engine::avx512 {
#include "level.inl"
}  // namespace latent_engine::avx512
#pragma GCC pop_options
#else
namespace latent_engine::avx512 {  // never chosen: isa.cpp offers base only
extern const Kernels<float> kernels_f{};
extern const Kernels<double> kernels_d{};
}  // namespace latent_engine::avx512
#endif
