// Runs kernels of csrc/cuda on the host, so that their arithmetic, indices and barriers are tested without a GPU: the
// threads of a block are coroutines that switch at barriers, in alternating order so that a missing barrier shows. Shared
// memory and workspaces start as NaN; a write past shared memory is an error. Include it before an op's .cuh.
#pragma once

#include <ucontext.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_, unsigned y_, unsigned z_) : x(x_), y(y_), z(z_) {}
};
struct Index {
  unsigned x, y, z;
};
struct float4 {
  float x, y, z, w;
};
using cudaStream_t = int;

static Index threadIdx, blockIdx;

namespace latent_engine {

constexpr int THREADS = 128, STACK = 1 << 17, MARGIN = 4096;
static int WAVE = 264;
static bool reversed;
enum class Scalar { f32, bf16, f16 };

static ucontext_t scheduler, threads[THREADS];
static std::vector<char> stacks(THREADS * STACK);
alignas(16) static float memory[(228 * 1024) / 4 + MARGIN];
alignas(16) static char lanes[THREADS][16];
static std::function<void()> body;
static int finished;

static float* shared_memory() { return memory; }

static void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulation: %s\n", message);
  std::abort();
}

static void wait_at_barrier() { swapcontext(&threads[threadIdx.x], &scheduler); }

static void run_thread() {
  body();
  ++finished;
}

static void run_block() {
  finished = 0;
  for (int t = 0; t < THREADS; ++t) {
    getcontext(&threads[t]);
    threads[t].uc_stack.ss_sp = &stacks[static_cast<size_t>(t) * STACK];
    threads[t].uc_stack.ss_size = STACK;
    threads[t].uc_link = &scheduler;
    makecontext(&threads[t], run_thread, 0);
  }
  for (bool forward = !reversed; finished == 0; forward = !forward) {
    for (int i = 0; i < THREADS; ++i) {
      threadIdx.x = forward ? i : THREADS - 1 - i;
      swapcontext(&scheduler, &threads[threadIdx.x]);
    }
  }
  if (finished != THREADS) fail("some threads of a block returned while others wait at a barrier");
}

template <class T>
T from_lane_xor(T value, int mask) {
  std::memcpy(lanes[threadIdx.x], &value, sizeof(T));
  wait_at_barrier();
  std::memcpy(&value, lanes[threadIdx.x ^ mask], sizeof(T));
  wait_at_barrier();
  return value;
}

static float fast_exp(float x) { return std::exp(x); }

static float load(const void* data, Scalar type, int64_t i) {
  if (type == Scalar::f32) return static_cast<const float*>(data)[i];
  if (type == Scalar::f16) return static_cast<const _Float16*>(data)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static void store(void* data, Scalar type, int64_t i, float value) {
  if (type == Scalar::f32) static_cast<float*>(data)[i] = value;
  else if (type == Scalar::f16) static_cast<_Float16*>(data)[i] = static_cast<_Float16>(value);
  else {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int shared_floats, cudaStream_t, Arguments... arguments) {
  body = [&] { kernel(arguments...); };
  if (shared_floats * sizeof(float) > 227 * 1024) fail("more shared memory than a block has");
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        std::fill(memory, memory + shared_floats, std::numeric_limits<float>::quiet_NaN());
        std::fill(memory + shared_floats, memory + shared_floats + MARGIN, 12345.f);
        run_block();
        for (int i = 0; i < MARGIN; ++i)
          if (memory[shared_floats + i] != 12345.f) fail("a write past shared memory");
      }
}

// Floats that live as long as it does.
struct Workspace {
  std::vector<std::vector<float>> kept;
  float* operator()(int64_t count) {
    return kept.emplace_back(count, std::numeric_limits<float>::quiet_NaN()).data();
  }
};

}  // namespace latent_engine

static void __syncthreads() { latent_engine::wait_at_barrier(); }
