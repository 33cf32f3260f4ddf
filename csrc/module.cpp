// mmpeft_fast._C: loading it registers the ops; the module itself tells how it was built and what it runs on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "csrc/cpu/kernels.h"
#include "csrc/snapshot.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of mmpeft-fast.";
  m.attr("torch_version") = MMPEFT_TORCH_VERSION;
  m.attr("compiler") = __VERSION__;
  m.def("instruction_set", [] { return std::string(mmpeft::kernels().name); }, "The instruction set in use.");
  m.def("num_lanes", [] { return mmpeft::kernels().lanes; }, "Floats in a vector of it.");
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const char* const* name = mmpeft::instruction_sets(); *name; ++name) names.emplace_back(*name);
        return names;
      },
      "Those that this processor runs, worst first.");
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (mmpeft::use_instruction_set(name.c_str())) return;
        std::string message = "instruction set: expected one of";
        for (const char* const* known = mmpeft::instruction_sets(); *known; ++known)
          message += std::string(" ") + *known;
        throw pybind11::value_error(message + ", got " + name);
      },
      "Changes it, for the whole process; speed changes, and results by no more than rounding.");
  mmpeft::register_snapshot(m);
}
