// What the bindings of CPU ops share: tensors of the stable ABI, and the cut of work into tasks.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/flush_to_zero.h"
#include "cpu/kernels.h"
#include "cpu/large_blocks.h"
#include "cpu/scratch.h"

namespace latent_engine {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTaskWork = 1 << 19;  // multiplications of a task: 20 to 40 µs
constexpr int64_t kMaxTasks = 32;

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// Runs task(i) for i < n: in parallel if there is more than one. Every thread has an equal share, and when that is done takes
// what is left of the others': neither uneven tasks nor a core that something else runs on hold up the rest. What a task
// computes must not depend on which thread runs it.
template <class F>
void for_each_task(int64_t n, const F& task) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t threads = n > 1 ? std::min<int64_t>(n, torch::stable::get_num_threads()) : 1;
  if (threads == 1) {
    for (int64_t i = 0; i < n; ++i) task(i);
    return;
  }
  std::vector<Share> shares(threads);
  for (int64_t t = 0; t < threads; ++t) shares[t].next = t * n / threads, shares[t].end = (t + 1) * n / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    for (int64_t k = 0; k < threads; ++k) {
      Share& share = shares[(first + k) % threads];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) task(i);
    }
  });
}

// The same where numbers below the normal ones count for nothing.
template <class F>
void for_each_task_flushed(int64_t n, const F& task) {
  for_each_task(n, [&](int64_t i) {
    const FlushToZero flush;
    task(i);
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

// A contiguous tensor of the type of `like`, or of float64, by the shim's direct calls: `stable::new_empty` boxes its
// arguments, 1 µs more. A large one lies in a block that is kept for the next when it is freed; like every tensor over given
// memory it cannot be resized beyond that.
inline Tensor empty(const Tensor& like, IntHeaderOnlyArrayRef sizes, bool is_wide = false) {
  constexpr int kMaxDims = 64;  // of PyTorch
  int64_t strides[kMaxDims], stride = 1, numel = 1;
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1), numel *= sizes[i];
  }
  is_wide = is_wide || like.scalar_type() == ScalarType::Double;
  const int32_t dtype = is_wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const int64_t dims = static_cast<int64_t>(sizes.size()), bytes = numel * (is_wide ? 8 : 4);
  const int32_t cpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  LargeBlock* const block = bytes >= static_cast<int64_t>(kLargeBlock) ? take_large_block(bytes) : nullptr;
  if (block) {
    const auto keep = [](void*, void* freed) { keep_large_block(static_cast<LargeBlock*>(freed)); };
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(block->data, dims, sizes.data(), strides, 0, dtype, cpu, -1, &handle,
                                                  aoti_torch_layout_strided(), nullptr, 0, keep, block));
    return Tensor(handle);
  }
  if (aoti_torch_empty_strided(dims, sizes.data(), strides, dtype, cpu, 0, &handle) != AOTI_TORCH_SUCCESS)
    out_of_memory(bytes, "a result");
  return Tensor(handle);
}

// Whether an output of whole rows of `row` numbers is written past the caches, which it would leave again before it is read.
inline bool passes_cache(const Tensor& out, int64_t row) {
  constexpr int64_t cache = 12'000'000, line = 64;
  const int64_t bytes = out.numel() * out.element_size();
  return bytes > cache && (reinterpret_cast<int64_t>(out.const_data_ptr()) | row * int64_t(out.element_size())) % line == 0;
}

inline Tensor contiguous_copy(const Tensor& t) {
  try {
    return torch::stable::contiguous(t);
  } catch (const std::exception&) {
    out_of_memory(t.numel() * t.element_size(), "a contiguous copy of an argument");
  }
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : contiguous_copy(t); }

}  // namespace latent_engine
