#include "scratch.h"

#include <new>
#include <stdexcept>
#include <string>

namespace latent_engine {
namespace {

constexpr std::align_val_t kAlignment{64};

struct Block {
  void* data = nullptr;
  std::size_t size = 0;
  ~Block() { ::operator delete(data, kAlignment); }
};

}  // namespace

void out_of_memory(std::size_t bytes, const char* what) {
  throw std::runtime_error("out of memory: the system has no " + std::to_string(bytes) + " bytes for " + what +
                           "; smaller batches need less");
}

void* scratch(Scratch use, std::size_t bytes) {
  thread_local Block blocks[2];
  Block& block = blocks[static_cast<int>(use)];
  if (bytes > block.size) {
    ::operator delete(block.data, kAlignment);
    block.data = nullptr;
    block.size = 0;
    block.data = ::operator new(bytes, kAlignment, std::nothrow);
    if (!block.data) out_of_memory(bytes, "intermediates");
    block.size = bytes;
  }
  return block.data;
}

}  // namespace latent_engine
