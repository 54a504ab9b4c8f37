// The baseline of the architecture: 16-byte vectors, no FMA on x86-64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "scratch.h"

#define LATENT_VECTOR_BYTES 16
namespace latent_engine::base {
#include "level.inl"
}  // namespace latent_engine::base
