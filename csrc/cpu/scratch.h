// Scratch memory of kernel tasks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latent {

// At least `bytes` bytes, 64-byte aligned, that belong to the calling thread until its next call. Kept between calls: the
// page faults of a fresh block cost more than a small task.
void* scratch(std::size_t bytes);

// Hands out consecutive arrays of a thread's scratch memory; `sizes` are all that will be taken.
template <class T>
class Arena {
 public:
  template <class... Sizes>
  explicit Arena(Sizes... sizes) : next_(static_cast<T*>(scratch((padded(sizes) + ... + 0) * sizeof(T)))) {}

  T* take(int64_t n) {
    T* const array = next_;
    next_ += padded(n);
    return array;
  }

 private:
  static constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  T* next_;
};

}  // namespace latent
