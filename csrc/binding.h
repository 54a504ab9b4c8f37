// What the bindings of CPU ops share: tensors of the stable ABI, and the cut of work into tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>

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

// Runs task(i) for i < n: in parallel if there is more than one. What a task computes must not depend on which thread runs it.
template <class F>
void for_each_task(int64_t n, const F& task) {
  const auto range = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) task(i);
  };
  if (n > 1)
    torch::stable::parallel_for(0, n, 1, range);
  else
    range(0, n);
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
