// The instruction-set level that CPU kernels run at: chosen once by cpuid, overridable for tests.
#pragma once

#include <string>
#include <vector>

namespace latent_engine {

enum class Isa { base, avx2, avx512 };

// The level in use: LATENT_ENGINE_CPU_ISA if set, else the best the machine has.
Isa isa();
// Throws std::invalid_argument if the name is unknown or the machine does not have the level.
void set_isa(const std::string& name);
std::string isa_name(Isa level);
// All levels that this machine can run, lowest first.
std::vector<std::string> available_isas();

}  // namespace latent_engine
