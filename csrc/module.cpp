// latent_engine.kernels._C: what is not a tensor op. Importing it registers the CPU kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/kernels.h"
#include "cpu/large_blocks.h"

namespace py = pybind11;

namespace latent_engine {
namespace {

template <class T, bool log>
py::array_t<T> evaluate(py::array_t<T, py::array::c_style> x) {
  py::array_t<T> y(x.size());
  (log ? kernels<T>().math.log : kernels<T>().math.exp)(x.data(), y.mutable_data(), x.size());
  return y;
}

int64_t arithmetic(int64_t rounds) {
  float result;
  return kernels<float>().math.arithmetic(rounds, &result);
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", "g++ " __VERSION__}, {"torch_abi", "2.11"}, {"standard", "C++17"}};
}

}  // namespace
}  // namespace latent_engine

PYBIND11_MODULE(_C, m) {
  using namespace latent_engine;
  m.doc() = "Build information and the instruction-set level of the CPU kernels.";
  m.def("build_info", build_info, "Compiler, language standard and the lowest torch whose ABI the library needs.");
  m.def("cpu_isa", [] { return isa_name(isa()); }, "The instruction-set level in use.");
  m.def("cpu_isas", available_isas, "The levels this machine can run, lowest first.");
  m.def("set_cpu_isa", set_isa, py::arg("name"), "Sets the level; ValueError if this machine does not have it.");
  m.def("exp", evaluate<float, false>, py::arg("x").noconvert(), "e^x as the kernels compute it.");
  m.def("exp", evaluate<double, false>, py::arg("x").noconvert());
  m.def("log", evaluate<float, true>, py::arg("x").noconvert(), "log x as the kernels compute it.");
  m.def("log", evaluate<double, true>, py::arg("x").noconvert());
  m.def("arithmetic", arithmetic, py::arg("rounds"),
        "Works through FMAs and subtractions of floats, as many of each, in registers; returns how many in all.");
  m.def("release_memory", release_large_blocks,
        "Gives the memory of freed results of 4 MB and more, kept for later ones, back to the system.");
}
