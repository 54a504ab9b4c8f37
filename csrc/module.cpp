// latent_engine.kernels._C: what is not a tensor op. Importing it registers the CPU kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

template <class T>
const latent_engine::MathKernels<T>& math();
template <>
const latent_engine::MathKernels<float>& math() {
  static const latent_engine::MathKernels<float> levels[] = {latent_engine::base::math_f, latent_engine::avx2::math_f, latent_engine::avx512::math_f};
  return latent_engine::at_isa(levels);
}
template <>
const latent_engine::MathKernels<double>& math() {
  static const latent_engine::MathKernels<double> levels[] = {latent_engine::base::math_d, latent_engine::avx2::math_d, latent_engine::avx512::math_d};
  return latent_engine::at_isa(levels);
}

template <class T, bool log>
py::array_t<T> evaluate(py::array_t<T, py::array::c_style> x) {
  py::array_t<T> y(x.size());
  (log ? math<T>().log : math<T>().exp)(x.data(), y.mutable_data(), x.size());
  return y;
}

std::map<std::string, std::string> build_info() {
  return {{"compiler", "g++ " __VERSION__}, {"torch_abi", "2.11"}, {"standard", "C++17"}};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and the instruction-set level of the CPU kernels.";
  m.def("build_info", build_info, "Compiler, language standard and the lowest torch whose ABI the library needs.");
  m.def("cpu_isa", [] { return latent_engine::isa_name(latent_engine::isa()); }, "The instruction-set level in use.");
  m.def("cpu_isas", latent_engine::available_isas, "The levels this machine can run, lowest first.");
  m.def("set_cpu_isa", latent_engine::set_isa, py::arg("name"), "Sets the level; ValueError if this machine does not have it.");
  m.def("exp", evaluate<float, false>, py::arg("x").noconvert(), "e^x as the kernels compute it.");
  m.def("exp", evaluate<double, false>, py::arg("x").noconvert());
  m.def("log", evaluate<float, true>, py::arg("x").noconvert(), "log x as the kernels compute it.");
  m.def("log", evaluate<double, true>, py::arg("x").noconvert());
}
