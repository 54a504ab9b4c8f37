#include "large_blocks.h"

#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace latent_engine {

#if defined(__linux__)
namespace {

constexpr std::size_t kPage = std::size_t(2) << 20;
constexpr std::size_t kLazy = std::size_t(32) << 20;  // from here on MADV_FREE, 0.1 ms, is little beside filling a block

// The latest first; eight hold the large results of a training step. Exchanged without a lock, which a fork could leave taken.
std::atomic<LargeBlock*> kept[8];

// Whether a block of `size` may serve a result of `needed` bytes: a fifth of it is left over at most.
bool fits(std::size_t size, std::size_t needed) { return size >= needed && size - needed <= needed / 4; }

void unmap(LargeBlock* block) {
  if (block) munmap(block->data, block->size);
  delete block;
}

// A page more than asked for is mapped, and what lies before and behind the aligned part given back.
void* map_aligned(std::size_t size) {
  void* const all = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* const first = static_cast<char*>(all);
  const std::size_t before = (kPage - reinterpret_cast<std::uintptr_t>(all) % kPage) % kPage;
  if (before) munmap(first, before);
  munmap(first + before + size, kPage - before);
  madvise(first + before, size, MADV_HUGEPAGE);
  return first + before;
}

}  // namespace

LargeBlock* take_large_block(std::size_t bytes) {
  const std::size_t size = (bytes + kPage - 1) / kPage * kPage;
  for (auto& place : kept) {
    LargeBlock* const block = place.exchange(nullptr);
    if (!block) continue;
    if (fits(block->size, size)) return block;
    LargeBlock* none = nullptr;
    if (!place.compare_exchange_strong(none, block)) unmap(block);
  }
  void* data = map_aligned(size);
  if (!data) {
    release_large_blocks();
    data = map_aligned(size);
  }
  return data ? new LargeBlock{data, size} : nullptr;
}

void keep_large_block(LargeBlock* block) {
  if (block->size >= kLazy) madvise(block->data, block->size, MADV_FREE);
  for (auto& place : kept) {
    block = place.exchange(block);
    if (!block) return;
  }
  unmap(block);
}

void release_large_blocks() {
  for (auto& place : kept) unmap(place.exchange(nullptr));
}

#else

LargeBlock* take_large_block(std::size_t) { return nullptr; }
void keep_large_block(LargeBlock*) {}
void release_large_blocks() {}

#endif

}  // namespace latent_engine
