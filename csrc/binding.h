// What the bindings of CPU ops share: tensors of the stable ABI, and the cut of work into tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace latent_engine {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTaskWork = 1 << 19;  // multiplications of a task: 20 to 40 µs
constexpr int64_t kMaxTasks = 32;

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Tasks that one thread begins with; others take from them what it has not begun when theirs are done.
struct alignas(64) TaskShare {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// Runs task(i) for i < n: in parallel if there is more than one. What a task computes must not depend on which thread runs it.
// Each thread has a stretch of tasks, as in the call before it, so that what lies in its caches serves again; a core that
// others use as well, or a slower one, holds up the rest by one task at most.
template <class F>
void for_each_task(int64_t n, const F& task) {
  if (n == 1) return task(0);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), n);
  std::vector<TaskShare> shares(threads);
  for (int64_t t = 0; t < threads; ++t) shares[t].next = t * n / threads, shares[t].end = (t + 1) * n / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
      for (int64_t k = 0; k < threads; ++k) {
        TaskShare& share = shares[(t + k) % threads];
        for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(i);
      }
  });
}

// Tasks that `work` multiplications are worth: a power of two, which threads share evenly.
inline int64_t task_count(int64_t work) {
  int64_t tasks = 1;
  while (tasks < std::min(work / kTaskWork, kMaxTasks)) tasks *= 2;
  return tasks;
}

// Runs f(first, last) over [0, n), in parallel where the n items of `work` multiplications each are worth it. The parts
// depend on sizes only.
template <class F>
void in_parts(int64_t n, int64_t work, const F& f) {
  const int64_t step = std::max<int64_t>(ceil_div(n, task_count(n * work)), 1);
  for_each_task(ceil_div(n, step), [&](int64_t i) { f(std::min(n, i * step), std::min(n, (i + 1) * step)); });
}

// Asks for huge pages under a large fresh array: the faults of small ones cost up to four times what filling it does.
inline void advise_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t page = 1 << 21;
  const int64_t first = round_up(reinterpret_cast<int64_t>(data), page);
  const int64_t last = (reinterpret_cast<int64_t>(data) + bytes) / page * page;
  if (last - first >= 2 * page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// A contiguous tensor of the type of `like`, or of float64, by the shim's direct call: `stable::new_empty` boxes its
// arguments, 1 µs more.
inline Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, bool is_wide = false) {
  constexpr int kMaxDims = 64;  // of PyTorch
  int64_t strides[kMaxDims], stride = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  is_wide = is_wide || like.scalar_type() == ScalarType::Double;
  const int32_t dtype = is_wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor tensor(handle);
  if (stride >= 1 << 20) advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

// Whether an output of whole rows of `row` numbers is written past the caches, which it would leave again before it is read.
inline bool passes_cache(const Tensor& out, int64_t row) {
  constexpr int64_t cache = 12'000'000, line = 64;
  const int64_t bytes = out.numel() * out.element_size();
  return bytes > cache && (reinterpret_cast<int64_t>(out.const_data_ptr()) | row * int64_t(out.element_size())) % line == 0;
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace latent_engine
