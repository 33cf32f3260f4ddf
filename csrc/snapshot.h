// Whether a tree of torch modules is as it was: what the fused layers ask before they trust what they read there.
#pragma once

#include <pybind11/pybind11.h>

namespace mmpeft {

// Registers class Snapshot; mmpeft_fast/layers/snapshot.py has its definition in Python.
void register_snapshot(pybind11::module_& m);

}  // namespace mmpeft
