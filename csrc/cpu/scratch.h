// Scratch memory that is kept between calls: the page faults of a fresh block cost more than a small task.
#pragma once

#include <cstddef>
#include <cstdint>

namespace latent_engine {

// Throws the one error of memory that the system does not have for `what`.
[[noreturn]] void out_of_memory(std::size_t bytes, const char* what);

// Who uses it: a task, or the launch around the tasks, one of which may run on the same thread.
enum class Scratch { task, launch };

// At least `bytes` bytes, 64-byte aligned, that belong to the calling thread until it asks for the same `use` again.
void* scratch(Scratch use, std::size_t bytes);

// Hands out consecutive arrays of a thread's scratch memory; `sizes` are all that will be taken.
template <class T>
class Arena {
 public:
  template <class... Sizes>
  explicit Arena(Scratch use, Sizes... sizes) : next_(static_cast<T*>(scratch(use, (padded(sizes) + ... + 0) * sizeof(T)))) {}

  T* take(int64_t n) {
    T* const array = next_;
    next_ += padded(n);
    return array;
  }

 private:
  static constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
  T* next_;
};

}  // namespace latent_engine
