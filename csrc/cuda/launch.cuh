// How work is cut into blocks.
#pragma once

#include <cstdint>

namespace latent_engine {

__host__ __device__ inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

struct Split {
  int64_t count, tiles_each;

  // Enough splits of `tiles` to fill the device, given the blocks that there are anyway.
  Split(int64_t tiles, int64_t blocks) {
    const int64_t wanted = tiles_of(WAVE, blocks > 0 ? blocks : 1);
    tiles_each = tiles_of(tiles, wanted < tiles ? wanted : (tiles > 0 ? tiles : 1));
    count = tiles_each > 0 ? tiles_of(tiles, tiles_each) : 1;
  }
};

inline dim3 grid(int64_t x, int64_t y = 1, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

}  // namespace latent_engine
