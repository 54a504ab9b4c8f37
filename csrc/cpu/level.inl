// Everything that is compiled once per instruction-set level; included inside the level's namespace.
#include "simd.inl"
#include "special.inl"
#include "pack.inl"
#include "probe.inl"
#include "gmm.inl"
#include "gmm_full.inl"
#include "importance_reduce.inl"
#include "importance.inl"
#include "likelihood_families.inl"
#include "likelihood.inl"
#include "logistic_mixture.inl"
#include "pairwise_kl.inl"
#include "pairwise_kl_diversity.inl"
#include "pairwise_kl_lines.inl"
#include "pairwise_kl_mean.inl"
#include "pairwise_kl_std.inl"
#include "pairwise_kl_gram.inl"
#include "mmd_profiles.inl"
#include "mmd.inl"
#include "mmd_normal.inl"
#include "noise.inl"
#include "reparametrize.inl"
#include "row_update.inl"

template <class T>
static constexpr Kernels<T> level_kernels() {
  return {{apply<T, exp<T>>, apply<T, log<T>>, arithmetic<T>},
          gmm_kernels<T>(),
          gmm_full_kernels<T>(),
          pairwise_kl_kernels<T>(),
          mmd_kernels<T>(),
          mmd_normal_kernels<T>(),
          importance_kernels<T>(),
          {likelihood_kernels<Bernoulli, T>(), likelihood_kernels<Gaussian, T>(),
           likelihood_kernels<DiscretizedLogistic, T>(), likelihood_kernels<NegativeBinomial, T>()},
          logistic_mixture_kernels<T>(),
          reparametrize_kernels<T>(),
          row_update_kernels<T>()};
}

extern const Kernels<float> kernels_f = level_kernels<float>();
extern const Kernels<double> kernels_d = level_kernels<double>();
