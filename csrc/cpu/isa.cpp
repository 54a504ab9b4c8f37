#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace latent_engine {
namespace {

const char* const kNames[] = {"base", "avx2", "avx512"};

bool has(Isa level) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (level == Isa::avx512)
    return has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  return level == Isa::base;
}

Isa parse(const std::string& name) {
  for (int i = 0; i < 3; ++i)
    if (name == kNames[i]) {
      if (has(static_cast<Isa>(i))) return static_cast<Isa>(i);
      throw std::invalid_argument("this CPU does not have the instruction-set level '" + name + "'");
    }
  throw std::invalid_argument("unknown instruction-set level '" + name + "'; the levels are base, avx2 and avx512");
}

Isa initial() {
  const char* wanted = std::getenv("LATENT_ENGINE_CPU_ISA");
  if (wanted && *wanted) return parse(wanted);
  return has(Isa::avx512) ? Isa::avx512 : has(Isa::avx2) ? Isa::avx2 : Isa::base;
}

std::atomic<Isa>& level() {
  static std::atomic<Isa> value{initial()};
  return value;
}

}  // namespace

Isa isa() { return level().load(std::memory_order_relaxed); }
void set_isa(const std::string& name) { level() = parse(name); }
std::string isa_name(Isa which) { return kNames[static_cast<int>(which)]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < 3; ++i)
    if (has(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  return names;
}

}  // namespace latent_engine
