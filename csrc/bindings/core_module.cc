// The binding without Paddle: the same checker and kernels over NumPy arrays and whatever speaks DLPack.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moe.h"

namespace py = pybind11;

// DLPack's in-memory layout, from its public specification: version 0, that of the "dltensor" capsule.
namespace dlpack {

constexpr int32_t kCpu = 1;
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {
  Tensor tensor;
  void* manager_context;
  void (*deleter)(ManagedTensor*);
};

}  // namespace dlpack

namespace paddle_moe {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }

DType dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return DType::kOther;
  const int bits = type.bits;
  switch (type.code) {
    case dlpack::kFloat:
      return bits == 32   ? DType::kFloat32
             : bits == 16 ? DType::kFloat16
             : bits == 64 ? DType::kFloat64
                          : DType::kOther;
    case dlpack::kBfloat:
      return bits == 16 ? DType::kBFloat16 : DType::kOther;
    case dlpack::kInt:
      return bits == 32   ? DType::kInt32
             : bits == 64 ? DType::kInt64
             : bits == 16 ? DType::kInt16
             : bits == 8  ? DType::kInt8
                          : DType::kOther;
    case dlpack::kUInt:
      return bits == 8 ? DType::kUInt8 : DType::kOther;
    case dlpack::kBool:
      return DType::kBool;
    default:
      return DType::kOther;
  }
}

// NumPy has no bfloat16 of its own: uint16 holds its bits, or ml_dtypes adds a dtype of that name.
DType dtype_of(const py::dtype& type) {
  const auto size = static_cast<uint8_t>(8 * type.itemsize());
  if (type.byteorder() == '>') return DType::kOther;
  switch (type.kind()) {
    case 'f':
      return dtype_of(dlpack::DataType{dlpack::kFloat, size, 1});
    case 'i':
      return dtype_of(dlpack::DataType{dlpack::kInt, size, 1});
    case 'u':
      return size == 16 ? DType::kBFloat16 : dtype_of(dlpack::DataType{dlpack::kUInt, size, 1});
    case 'b':
      return DType::kBool;
    case 'V':
      return type.attr("name").cast<std::string>() == "bfloat16" ? DType::kBFloat16 : DType::kOther;
    default:
      return DType::kOther;
  }
}

DType dtype_of(const std::string& name) {
  for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt32, DType::kInt64,
                      DType::kFloat64, DType::kInt16, DType::kInt8, DType::kUInt8, DType::kBool}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  return DType::kOther;
}

py::dtype numpy_dtype(DType dtype) {
  return py::dtype(dtype == DType::kBFloat16 ? "uint16" : dtype_name(dtype));
}

// One array that the caller passed: what the kernels need to know of it, and what keeps it alive.
struct Array {
  Tensor view;
  bool writable = true;
  py::dtype dtype;  // of a NumPy array for results like this one
  py::object owner;
};

Array from_numpy(const std::string& name, const py::array& array) {
  Array result;
  result.owner = array;
  result.dtype = array.dtype();
  result.writable = array.writeable();
  result.view.data = array.data();
  result.view.dtype = dtype_of(array.dtype());
  const py::ssize_t item = array.itemsize();
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    if (array.strides(i) % item != 0) fail(name + " must have strides that are multiples of its item size");
    result.view.shape.push_back(array.shape(i));
    result.view.strides.push_back(array.strides(i) / item);
  }
  return result;
}

Array from_dlpack(const std::string& name, const py::object& object) {
  Array result;
  try {
    const py::tuple device = object.attr("__dlpack_device__")();
    const int type = py::int_(device[0]);  // int(): most libraries return an enumeration
    if (type != dlpack::kCpu) {
      fail(name + " must be on the CPU, got the DLPack device type " + std::to_string(type));
    }
    result.owner = object.attr("__dlpack__")();
  } catch (const py::error_already_set& error) {
    fail(name + " cannot be read through DLPack: " + error.what());
  }
  // The capsule stays unconsumed, so destroying it is what gives the array back.
  const auto* managed =
      static_cast<const dlpack::ManagedTensor*>(PyCapsule_GetPointer(result.owner.ptr(), "dltensor"));
  if (managed == nullptr) throw py::error_already_set();
  const dlpack::Tensor& tensor = managed->tensor;
  result.view.data = static_cast<const char*>(tensor.data) + tensor.byte_offset;
  result.view.dtype = dtype_of(tensor.dtype);
  result.view.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides != nullptr) result.view.strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  if (result.view.dtype != DType::kOther) result.dtype = numpy_dtype(result.view.dtype);
  return result;
}

Array array_of(const std::string& name, const py::object& object) {
  if (py::isinstance<Tensor>(object)) return {object.cast<Tensor>(), false, {}, object};
  if (py::isinstance<py::array>(object)) return from_numpy(name, py::reinterpret_borrow<py::array>(object));
  if (py::hasattr(object, "__dlpack__")) return from_dlpack(name, object);
  fail(name + " must be a NumPy array or have __dlpack__, got " +
       py::type::of(object).attr("__name__").cast<std::string>());
}

// An array that a kernel writes: the caller's `given`, checked, or a new one.
class Output {
 public:
  Output(const char* name, const py::object& given, const py::dtype& dtype, const std::vector<int64_t>& shape)
      : result_(given.is_none() ? py::array(dtype, shape) : given), array_(array_of(name, result_)) {
    const Tensor& view = array_.view;
    const DType expected = dtype_of(dtype);
    if (view.dtype != expected) {
      fail(std::string(name) + " must have the dtype " + dtype_name(expected) + ", got " +
           dtype_name(view.dtype));
    }
    if (view.shape != shape) {
      fail(std::string(name) + " must have the shape " + py::repr(py::cast(shape)).cast<std::string>() +
           ", got " + py::repr(py::cast(view.shape)).cast<std::string>());
    }
    if (!array_.writable) fail(std::string(name) + " must be writable, got a read-only array");
    const bool empty = std::count(shape.begin(), shape.end(), 0) != 0;
    int64_t stride = 1;
    for (size_t i = shape.size(); i-- > 0; stride *= shape[i]) {
      if (!empty && shape[i] > 1 && !view.strides.empty() && view.strides[i] != stride) {
        fail(std::string(name) + " must be contiguous, got the strides " +
             py::repr(py::cast(view.strides)).cast<std::string>());
      }
    }
  }

  template <class T = void>
  T* data() const {
    return static_cast<T*>(const_cast<void*>(array_.view.data));
  }
  const py::object& result() const { return result_; }

 private:
  py::object result_;
  Array array_;
};

constexpr size_t kAlignment = 64;

// The caller's bytes, checked, or new ones; aligned for the kernels.
class Workspace {
 public:
  Workspace(const py::object& given, size_t bytes) {
    const size_t needed = bytes + kAlignment;
    owner_ = given.is_none() ? array_of("workspace", py::array(py::dtype("uint8"), needed))
                             : array_of("workspace", given);
    const Tensor& view = owner_.view;
    if (view.dtype != DType::kUInt8 || view.shape.size() != 1 ||
        static_cast<size_t>(view.shape[0]) < needed || (!view.strides.empty() && view.strides[0] != 1) ||
        !owner_.writable) {
      fail("workspace must be a writable, contiguous uint8 array with at least " + std::to_string(needed) +
           " bytes, got " + dtype_name(view.dtype) + " with the shape " +
           py::repr(py::cast(view.shape)).cast<std::string>() + (owner_.writable ? "" : ", read-only"));
    }
    void* pointer = const_cast<void*>(view.data);
    size_t space = needed;
    data_ = std::align(kAlignment, bytes, pointer, space);
  }
  void* data() const { return data_; }

 private:
  Array owner_;
  void* data_;
};

class Experts {
 public:
  Experts(const py::object& hidden_states, const py::object& routing_table, const py::object& router_weights,
          const py::list& gate_up_weights, const py::list& down_weights,
          const std::optional<py::list>& gate_up_bias, const std::optional<py::list>& down_bias,
          bool permuted_weights, const std::string& activation, int64_t experts_min, int64_t experts_max,
          int64_t chunk_size, bool measurement_mode)
      : measurement_mode_(measurement_mode) {
    Arguments arguments;
    arguments.hidden_states = keep("hidden_states", hidden_states);
    dtype_ = arrays_.back().dtype;
    arguments.routing_table = keep("routing_table", routing_table);
    arguments.router_weights = keep("router_weights", router_weights);
    arguments.gate_up_weights = keep_all("gate_up_weights", gate_up_weights);
    arguments.down_weights = keep_all("down_weights", down_weights);
    if (gate_up_bias) arguments.gate_up_bias = keep_all("gate_up_bias", *gate_up_bias);
    if (down_bias) arguments.down_bias = keep_all("down_bias", *down_bias);
    arguments.permuted_weights = permuted_weights;
    arguments.activation = activation;
    arguments.experts_min = experts_min;
    arguments.experts_max = experts_max;
    arguments.chunk_size = chunk_size;
    problem_ = resolve(arguments);
  }

  size_t workspace_size() const { return cpu::workspace_size(problem_, num_threads_) + kAlignment; }

  py::object run(const py::object& out, const py::object& workspace) const {
    const Output output("out", out, dtype_, {problem_.num_tokens, problem_.hidden_size});
    const Workspace scratch(workspace, cpu::workspace_size(problem_, num_threads_));
    py::array_t<float> amax(measurement_mode_ ? problem_.num_experts() : 0);
    float* amax_data = measurement_mode_ ? amax.mutable_data() : nullptr;
    {
      py::gil_scoped_release release;
      cpu::mixture_of_experts(problem_, num_threads_, scratch.data(), output.data(), amax_data);
    }
    if (measurement_mode_) return py::make_tuple(output.result(), amax);
    return output.result();
  }

 private:
  Tensor keep(const std::string& name, const py::object& object) {
    arrays_.push_back(array_of(name, object));
    return arrays_.back().view;
  }

  std::vector<Tensor> keep_all(const std::string& name, const py::list& objects) {
    std::vector<Tensor> views;
    for (size_t i = 0; i < objects.size(); ++i) {
      views.push_back(keep(objects.size() == 1 ? name : name + "[" + std::to_string(i) + "]", objects[i]));
    }
    return views;
  }

  std::vector<Array> arrays_;
  py::dtype dtype_;
  Problem problem_;
  int num_threads_ = cpu::num_threads();
  bool measurement_mode_;
};

class Gate {
 public:
  Gate(const py::object& hidden_states, const py::object& gate_weight)
      : hidden_states_(array_of("hidden_states", hidden_states)),
        gate_weight_(array_of("gate_weight", gate_weight)),
        problem_(resolve_gate(hidden_states_.view, gate_weight_.view)) {}

  size_t workspace_size() const { return cpu::gate_workspace_size(problem_, num_threads_) + kAlignment; }

  py::object run(const py::object& out, const py::object& workspace) const {
    const Output logits("out", out, numpy_dtype(DType::kFloat32),
                        {problem_.num_tokens, problem_.num_experts});
    const Workspace scratch(workspace, cpu::gate_workspace_size(problem_, num_threads_));
    {
      py::gil_scoped_release release;
      cpu::gate(problem_, num_threads_, scratch.data(), logits.data<float>());
    }
    return logits.result();
  }

 private:
  Array hidden_states_, gate_weight_;
  GateProblem problem_;
  int num_threads_ = cpu::num_threads();
};

class Route {
 public:
  Route(const py::object& logits, const py::object& correction_bias, int64_t top_k,
        const std::string& scoring, int64_t num_groups, int64_t topk_groups, const std::string& group_score,
        float group_mask_fill, bool renormalize, float renormalize_eps, float scaling_factor)
      : logits_(array_of("logits", logits)),
        correction_bias_(correction_bias.is_none() ? Array{} : array_of("correction_bias", correction_bias)),
        problem_(resolve_route(logits_.view, correction_bias_.view,
                               {top_k, scoring, num_groups, topk_groups, group_score, group_mask_fill,
                                renormalize, renormalize_eps, scaling_factor})) {}

  py::tuple run(const py::object& out_table, const py::object& out_weights) const {
    const std::vector<int64_t> shape{problem_.num_tokens, problem_.top_k};
    const Output table("out[0]", out_table, numpy_dtype(DType::kInt32), shape);
    const Output weights("out[1]", out_weights, numpy_dtype(DType::kFloat32), shape);
    {
      py::gil_scoped_release release;
      cpu::route(problem_, cpu::num_threads(), table.data<int32_t>(), weights.data<float>());
    }
    return py::make_tuple(table.result(), weights.result());
  }

 private:
  Array logits_, correction_bias_;
  RouteProblem problem_;
};

}  // namespace
}  // namespace paddle_moe

PYBIND11_MODULE(_core, module) {
  using namespace paddle_moe;
  module.doc() = "Compiled part of paddle_moe.core; the arguments are documented there.";
  // An array of which only the dtype's name and the shape (-1: unknown) are known: enough for all checks.
  py::class_<Tensor>(module, "Spec").def(py::init([](const std::string& dtype, std::vector<int64_t> shape) {
    return Tensor{nullptr, dtype_of(dtype), std::move(shape), {}};
  }));
  // Constructing one of these checks the arguments; run() computes.
  py::class_<Experts>(module, "Experts")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::list&, const py::list&,
                    const std::optional<py::list>&, const std::optional<py::list>&, bool, const std::string&,
                    int64_t, int64_t, int64_t, bool>())
      .def("workspace_size", &Experts::workspace_size)
      .def("run", &Experts::run);
  py::class_<Gate>(module, "Gate")
      .def(py::init<const py::object&, const py::object&>())
      .def("workspace_size", &Gate::workspace_size)
      .def("run", &Gate::run);
  py::class_<Route>(module, "Route")
      .def(py::init<const py::object&, const py::object&, int64_t, const std::string&, int64_t, int64_t,
                    const std::string&, float, bool, float, float>())
      .def("run", &Route::run);
  module.attr("LAST_EXPERT_PASSED") = kLastExpertPassed;
  module.def("set_num_threads", &cpu::set_num_threads);
  module.def("num_threads", &cpu::num_threads);
  module.def("measure_flops", [](int num_threads) {
    py::gil_scoped_release release;
    return cpu::measure_flops(num_threads);
  });
  module.def("measure_read", [](const py::array& data, int streams, int num_threads) {
    const void* bytes = data.data();
    const size_t size = static_cast<size_t>(data.nbytes());
    py::gil_scoped_release release;
    return cpu::measure_read(bytes, size, streams, num_threads);
  });
  module.def("isa_name", &cpu::isa_name);
  module.def("available_isas", &cpu::available_isas);
}
