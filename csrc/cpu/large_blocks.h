// Memory of large results, kept when they are freed for those that come later. The allocator returns much of it to the system,
// and to fill fresh pages takes 2 to 5 times as long as to fill pages that are there.
#pragma once

#include <cstddef>

namespace latent_engine {

constexpr std::size_t kLargeBlock = std::size_t(4) << 20;  // bytes of the smallest

struct LargeBlock {
  void* data;
  std::size_t size;
};

// A block of at least `bytes` bytes in huge pages, 2 MB aligned, its contents undefined; null where the system has none.
LargeBlock* take_large_block(std::size_t bytes);

// Keeps the block, in place of the oldest if too many are kept. When memory runs short the system takes the pages of those of
// 32 MB and more.
void keep_large_block(LargeBlock* block);

// Gives all that is kept back to the system.
void release_large_blocks();

}  // namespace latent_engine
