// Snapshot of a module tree: the class of each module and the objects in its __dict__, by identity, with the contents
// of dicts and lists among them (parameters, submodules, hooks, adapters' settings); and of attributes of classes and
// modules that were looked up besides. Comparing pointers takes some 10 us where reading the layer takes 150.
//
// Everything is held by a strong reference, so that no address is used again, but for the first module and its
// `reading` (which holds the snapshot): the layer owns its reading, and a model is freed without a garbage collection.
#include "snapshot.h"

#include <vector>

namespace py = pybind11;

namespace mmpeft {
namespace {

class Snapshot {
 public:
  Snapshot(const py::list& modules, const py::list& lookups, py::handle reading) : reading_(reading.ptr()) {
    bool is_first = true;
    for (const py::handle module : modules) {
      modules_.push_back(is_first ? nullptr : py::reinterpret_borrow<py::object>(module).release().ptr());
      Py_INCREF(Py_TYPE(module.ptr()));
      kinds_.push_back(Py_TYPE(module.ptr()));
      is_first = false;
      record_dict(dict_of(module.ptr()).ptr(), /*depth=*/1);
    }
    for (const py::handle lookup : lookups) {
      const auto entry = lookup.cast<py::tuple>();
      owners_.push_back(py::object(entry[0]).release().ptr());
      names_.push_back(py::object(entry[1]).release().ptr());
      found_.push_back(py::object(entry[2]).release().ptr());
    }
  }
  Snapshot(const Snapshot&) = delete;
  Snapshot& operator=(const Snapshot&) = delete;
  ~Snapshot() { clear(); }

  bool holds(py::handle first) const {
    Cursor at;
    for (size_t i = 0; i < kinds_.size(); ++i) {
      PyObject* module = i ? modules_[i] : first.ptr();
      if (Py_TYPE(module) != kinds_[i] || !is_same_dict(dict_of(module).ptr(), 1, at)) return false;
    }
    for (size_t i = 0; i < owners_.size(); ++i) {
      if (look_up(owners_[i], names_[i]).ptr() != found_[i]) return false;
    }
    return true;
  }

  int traverse(visitproc visit, void* arg) {
    for (auto* objects : all())
      for (PyObject* object : *objects) Py_VISIT(object);
    for (PyTypeObject* kind : kinds_) Py_VISIT(kind);
    return 0;
  }

  void clear() {
    for (auto* objects : all()) {
      std::vector<PyObject*> mine;
      mine.swap(*objects);
      for (PyObject* object : mine) Py_XDECREF(object);
    }
    std::vector<PyTypeObject*> kinds;
    kinds.swap(kinds_);
    for (PyTypeObject* kind : kinds) Py_DECREF(kind);
    sizes_.clear();
  }

 private:
  struct Cursor {
    size_t value = 0, size = 0;
  };

  std::vector<std::vector<PyObject*>*> all() { return {&modules_, &values_, &owners_, &names_, &found_}; }

  static py::object dict_of(PyObject* module) {
    PyObject* dict = PyObject_GenericGetDict(module, nullptr);
    if (!dict) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(dict);
  }

  // An entry of a namespace, or an attribute of a class or an object; None where there is none.
  static py::object look_up(PyObject* owner, PyObject* name) {
    py::object found;
    if (PyDict_Check(owner)) {
      found = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(owner, name));
    } else {
      found = py::reinterpret_steal<py::object>(PyObject_GetAttr(owner, name));
    }
    if (found) return found;
    PyErr_Clear();
    return py::none();
  }

  void record(PyObject* value, int depth) {
    Py_XINCREF(value == reading_ ? nullptr : value);
    values_.push_back(value == reading_ ? nullptr : value);
    if (depth && PyDict_Check(value)) {
      record_dict(value, 0);
    } else if (depth && PyList_Check(value)) {
      sizes_.push_back(PyList_GET_SIZE(value));
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(value); ++i) record(PyList_GET_ITEM(value, i), 0);
    }
  }

  // depth 1: dicts and lists among the values are looked into as well.
  void record_dict(PyObject* dict, int depth) {
    sizes_.push_back(PyDict_GET_SIZE(dict));
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value);) record(value, depth);
  }

  bool is_same(PyObject* value, int depth, Cursor& at) const {
    if ((value == reading_ ? nullptr : value) != values_[at.value++]) return false;
    if (depth && PyDict_Check(value)) return is_same_dict(value, 0, at);
    if (depth && PyList_Check(value)) {
      const Py_ssize_t size = PyList_GET_SIZE(value);
      if (size != sizes_[at.size++]) return false;
      for (Py_ssize_t i = 0; i < size; ++i)
        if (!is_same(PyList_GET_ITEM(value, i), 0, at)) return false;
    }
    return true;
  }

  bool is_same_dict(PyObject* dict, int depth, Cursor& at) const {
    if (PyDict_GET_SIZE(dict) != sizes_[at.size++]) return false;
    PyObject *key, *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value);)
      if (!is_same(value, depth, at)) return false;
    return true;
  }

  PyObject* reading_;  // borrowed: its owner holds this object
  std::vector<PyObject*> modules_, values_, owners_, names_, found_;
  std::vector<PyTypeObject*> kinds_;
  std::vector<Py_ssize_t> sizes_;
};

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  if (!instance->get_value_and_holder().holder_constructed()) return 0;
  return py::cast<Snapshot&>(py::handle(self)).traverse(visit, arg);
}

int clear(PyObject* self) {
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  if (instance->get_value_and_holder().holder_constructed()) py::cast<Snapshot&>(py::handle(self)).clear();
  return 0;
}

}  // namespace

void register_snapshot(py::module_& m) {
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    auto* type = &heap_type->ht_type;
    type->tp_flags |= Py_TPFLAGS_HAVE_GC;
    type->tp_traverse = traverse;
    type->tp_clear = clear;
  });
  py::class_<Snapshot>(m, "Snapshot", collected, "See mmpeft_fast.layers.snapshot.")
      .def(py::init<const py::list&, const py::list&, py::handle>(), py::arg("modules"), py::arg("lookups"),
           py::arg("reading"))
      .def("holds", &Snapshot::holds, py::arg("first"));
}

}  // namespace mmpeft
