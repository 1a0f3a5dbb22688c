// The binding without Paddle: the same checker and kernels over NumPy arrays and whatever speaks DLPack.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "dispatch.h"

namespace py = pybind11;

// DLPack's in-memory layout, from its public specification: version 0, that of the "dltensor" capsule.
namespace dlpack {

constexpr int32_t kCpu = 1, kCuda = 2, kCudaManaged = 13;
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6, kFloat8E4M3 = 10 };

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
    case dlpack::kFloat8E4M3:
      return bits == 8 ? DType::kFloat8E4M3 : DType::kOther;
    default:
      return DType::kOther;
  }
}

// NumPy has no bfloat16 and no fp8 of its own: ml_dtypes adds dtypes of these names, or uint16, and uint8 of
// a weight, hold the bits.
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
    case 'V': {
      const auto name = type.attr("name").cast<std::string>();
      return name == "bfloat16"        ? DType::kBFloat16
             : name == "float8_e4m3fn" ? DType::kFloat8E4M3
                                       : DType::kOther;
    }
    default:
      return DType::kOther;
  }
}

DType dtype_of(const std::string& name) {
  for (DType dtype :
       {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kInt32, DType::kInt64, DType::kFloat64,
        DType::kInt16, DType::kInt8, DType::kFloat8E4M3, DType::kUInt8, DType::kBool}) {
    if (name == dtype_name(dtype)) return dtype;
  }
  return DType::kOther;
}

py::dtype numpy_dtype(DType dtype) {
  return py::dtype(dtype == DType::kBFloat16     ? "uint16"
                   : dtype == DType::kFloat8E4M3 ? "uint8"
                                                 : dtype_name(dtype));
}

// While it lives, this thread has given the interpreter's lock away. When the interpreter has ended
// meanwhile, Python before 3.14 unwinds the stack of a thread that asks for the lock, and a destructor that
// is unwound aborts the process. So such a thread waits for the end of the process, as with later Pythons.
class WithoutInterpreterLock {
 public:
  WithoutInterpreterLock() : state_(PyEval_SaveThread()) {}
  ~WithoutInterpreterLock() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }
  WithoutInterpreterLock(const WithoutInterpreterLock&) = delete;
  WithoutInterpreterLock& operator=(const WithoutInterpreterLock&) = delete;

 private:
  PyThreadState* state_;
};

// One array that the caller passed: what the kernels need to know of it, and what keeps it alive.
struct Array {
  Tensor view;
  bool writable = true;
  py::dtype dtype;  // of a NumPy array for results like this one
  py::object owner;
};

py::module_ library() { return py::module_::import("paddle_moe._cuda_arrays"); }

// The bytes from the first to the last of an array of a call.
struct Extent {
  Extent(std::string name, const Tensor& view) : name(std::move(name)) {
    int64_t count = 1, first = 0, last = 0;
    for (size_t i = view.shape.size(); i-- > 0; count *= view.shape[i]) {
      const int64_t way = (view.shape[i] - 1) * (view.strides.empty() ? count : view.strides[i]);
      (way < 0 ? first : last) += way;
    }
    const auto size = static_cast<int64_t>(dtype_size(view.dtype));
    begin = static_cast<const char*>(view.data) + first * size;
    end = count == 0 ? begin : begin + (last - first + 1) * size;
    if (count < last - first + 1) with_gaps = std::make_shared<Tensor>(view);
  }

  bool overlaps(const Extent& other) const {
    if (end <= other.begin || other.end <= begin) return false;
    if (!with_gaps && !other.with_gaps) return true;
    // NumPy knows whether one lies in the gaps of the other. It reads no element, so they may be on a GPU.
    return py::module_::import("numpy").attr("shares_memory")(array(), other.array()).cast<bool>();
  }

  py::array array() const {
    if (!with_gaps) return py::array(py::dtype("uint8"), {end - begin}, {1}, begin, py::none());
    const Tensor& view = *with_gaps;
    std::vector<py::ssize_t> strides;
    for (const int64_t stride : view.strides)
      strides.push_back(stride * static_cast<int64_t>(dtype_size(view.dtype)));
    return py::array(numpy_dtype(view.dtype), view.shape, strides, view.data, py::none());
  }

  std::string name;
  const char *begin, *end;
  std::shared_ptr<const Tensor> with_gaps;  // null: it has none
};

// Reads the arrays of one call. The first one decides on which device the call runs, and on a GPU the current
// stream of its library is the stream of the call. All others must lie there too.
class Reader {
 public:
  Array read(std::string name, const py::object& object) {
    if (py::isinstance<Tensor>(object)) {
      has_specs_ = true;
      const auto view = object.cast<Tensor>();
      return {view, false, view.dtype == DType::kOther ? py::dtype() : numpy_dtype(view.dtype), object};
    }
    Array array = read_array(name, object);
    if (array.view.dtype == DType::kOther) return array;
    const auto size = static_cast<uintptr_t>(dtype_size(array.view.dtype));
    if (reinterpret_cast<uintptr_t>(array.view.data) % size != 0) {
      fail(name + " must begin at a multiple of its item size, " + std::to_string(size) +
           " bytes; pass a copy of it");
    }
    extents_.emplace_back(std::move(name), array.view);
    return array;
  }

  // The array that was read last, of a dtype that is known, will be written: it must not overlap one that was
  // read before it.
  void expect_apart() const {
    const Extent& written = extents_.back();
    for (const Extent& other : extents_) {
      if (&other != &written && written.overlaps(other)) {
        fail(written.name + " must not share memory with " + other.name + "; pass an array of its own");
      }
    }
  }

  // As if the arrays of `other` had been read here too.
  void add_arrays_of(const Reader& other) {
    extents_.insert(extents_.end(), other.extents_.begin(), other.extents_.end());
  }

  // A new array on the device of the call; `dtype` is that of the NumPy array that would hold it. NumPy's own
  // arrays begin anywhere in a cache line, and only whole lines can be written past the caches.
  py::object empty(const py::dtype& dtype, const std::vector<int64_t>& shape) const {
    if (on_gpu()) return library().attr("empty")(first_, dtype_name(dtype_of(dtype)), shape);
    constexpr py::ssize_t kLine = 64;
    py::ssize_t bytes = dtype.itemsize();
    for (const int64_t size : shape) bytes *= size;
    const py::array_t<uint8_t> owner(bytes + kLine);
    const auto begin = reinterpret_cast<uintptr_t>(owner.data());
    return py::array(dtype, shape, owner.data() + (kLine - begin % kLine) % kLine, owner);
  }

  const Device& device() const { return device_; }
  void expect_elements(const std::string& what) const {
    if (has_specs_) fail(what + " cannot be computed from a Spec, which has no elements");
  }

 private:
  Array read_array(const std::string& name, const py::object& object) {
    if (py::isinstance<py::array>(object)) {
      settle(name, object, {dlpack::kCpu, 0});
      return from_numpy(name, py::reinterpret_borrow<py::array>(object));
    }
    if (py::hasattr(object, "__dlpack__")) return from_dlpack(name, object);
    fail(name + " must be a NumPy array or have __dlpack__, got " +
         py::type::of(object).attr("__name__").cast<std::string>());
  }

  bool on_gpu() const { return device_.kind == Device::Kind::kCuda; }
  static std::string text(dlpack::Device device) {
    if (device.type == dlpack::kCpu) return "the CPU";
    if (device.type == dlpack::kCuda) return "the GPU " + std::to_string(device.id);
    return "the DLPack device type " + std::to_string(device.type);
  }

  static std::string text(dlpack::DataType type) {
    return "the DLPack type code " + std::to_string(type.code) + " with " + std::to_string(type.bits) +
           " bits and " + std::to_string(type.lanes) + " lanes";
  }

  void settle(const std::string& name, const py::object& object, dlpack::Device device) {
    if (device.type == dlpack::kCudaManaged) device.type = dlpack::kCuda;
    if (first_name_.empty()) {
      if (device.type == dlpack::kCuda) {
        device_ = dispatch::cuda_device(name.c_str(), device.id, nullptr);
        const auto stream = library().attr("current_stream")(object).cast<uintptr_t>();
        device_.stream = reinterpret_cast<cuda::Stream>(stream);
      } else if (device.type != dlpack::kCpu) {
        fail(name + " must be on the CPU or on a CUDA GPU, got " + text(device));
      }
      first_ = object;
      first_name_ = name;
      dlpack_device_ = device;
    } else if (device.type != dlpack_device_.type || device.id != dlpack_device_.id) {
      fail(name + " must be on the device of " + first_name_ + ", " + text(dlpack_device_) + ", got " +
           text(device));
    }
  }

  static dlpack::Device dlpack_device_of(const std::string& name, const py::object& object) {
    try {
      const py::tuple device = object.attr("__dlpack_device__")();
      const int type = py::int_(device[0]);        // int(): most libraries return an enumeration
      if (type == dlpack::kCpu) return {type, 0};  // Paddle's CPU has the number None
      return {type, device[1].cast<int32_t>()};
    } catch (const py::error_already_set& error) {
      fail(name + " cannot be read through DLPack: " + error.what());
    }
  }

  static Array from_numpy(const std::string& name, const py::array& array) {
    Array result;
    result.owner = array;
    result.dtype = array.dtype();
    result.writable = array.writeable();
    result.view.data = array.data();
    result.view.dtype = dtype_of(array.dtype());
    if (result.view.dtype == DType::kOther) result.view.other_dtype = py::str(array.dtype());
    const py::ssize_t item = std::max<py::ssize_t>(1, array.itemsize());  // 0: of a dtype without fields
    for (py::ssize_t i = 0; i < array.ndim(); ++i) {
      if (array.strides(i) % item != 0) fail(name + " must have strides that are multiples of its item size");
      result.view.shape.push_back(array.shape(i));
      result.view.strides.push_back(array.strides(i) / item);
    }
    return result;
  }

  Array from_dlpack(const std::string& name, const py::object& object) {
    settle(name, object, dlpack_device_of(name, object));
    Array result;
    try {
      result.owner = on_gpu() ? library().attr("export")(first_, object, stream_for(object))
                              : object.attr("__dlpack__")();
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
    if (result.view.dtype == DType::kOther)
      result.view.other_dtype = text(tensor.dtype);
    else
      result.dtype = numpy_dtype(result.view.dtype);
    return result;
  }

  // The stream that the library of an array makes wait for it, in DLPack's numbers. The library of the first
  // array is asked for no order, -1: the call runs on its current stream. DLPack calls the default stream,
  // whose handle is null, 1.
  int64_t stream_for(const py::object& object) const {
    if (py::type::of(object).is(py::type::of(first_))) return -1;
    const auto stream = reinterpret_cast<intptr_t>(device_.stream);
    return stream == 0 ? 1 : stream;
  }

  Device device_ = dispatch::cpu_device();
  dlpack::Device dlpack_device_{dlpack::kCpu, 0};
  py::object first_;
  std::string first_name_;
  std::vector<Extent> extents_;  // in the order in which they were read
  bool has_specs_ = false;       // not all of them have elements
};

// An array that a kernel writes: the caller's `given`, checked, or a new one.
class Output {
 public:
  Output(const std::string& name, const py::object& given, const py::dtype& dtype,
         const std::vector<int64_t>& shape, Reader* reader, bool any_strides = false)
      : result_(given.is_none() ? reader->empty(dtype, shape) : given), array_(reader->read(name, result_)) {
    reader->expect_elements(name);
    const Tensor& view = array_.view;
    expect_dtype(name.c_str(), view, dtype_of(dtype));
    if (view.shape != shape)
      fail(name, " must have the shape ", shape_text(shape), ", got ", shape_text(view.shape));
    if (!array_.writable) fail(name + " must be writable, got a read-only array");
    if (!given.is_none()) reader->expect_apart();
    if (any_strides && may_hold_an_element_twice(view)) {
      fail(name + " must have an element for each index, got the strides " +
           py::repr(py::cast(view.strides)).cast<std::string>());
    }
    if (!any_strides && !is_contiguous(view)) {
      fail(name + " must be contiguous, got the strides " +
           py::repr(py::cast(view.strides)).cast<std::string>());
    }
  }

  template <class T = void>
  T* data() const {
    return static_cast<T*>(const_cast<void*>(array_.view.data));
  }
  const py::object& result() const { return result_; }
  const Tensor& view() const { return array_.view; }

 private:
  py::object result_;
  Array array_;
};

constexpr size_t kAlignment = dispatch::kWorkspaceAlignment;

// The caller's bytes, checked, or new ones; aligned for the kernels.
class Workspace {
 public:
  Workspace(const py::object& given, size_t bytes, Reader* reader) {
    const size_t needed = bytes + kAlignment;
    const std::vector<int64_t> shape{static_cast<int64_t>(needed)};
    owner_ = reader->read("workspace", given.is_none() ? reader->empty(py::dtype("uint8"), shape) : given);
    const Tensor& view = owner_.view;
    if (view.dtype != DType::kUInt8 || view.shape.size() != 1 ||
        static_cast<size_t>(view.shape[0]) < needed || (!view.strides.empty() && view.strides[0] != 1) ||
        !owner_.writable) {
      fail("workspace must be a writable, contiguous uint8 array with at least ", needed, " bytes, got ",
           dtype_text(view), " with the shape ", shape_text(view.shape),
           owner_.writable ? "" : ", read-only");
    }
    if (!given.is_none()) reader->expect_apart();
    void* pointer = const_cast<void*>(view.data);
    size_t space = needed;
    data_ = std::align(kAlignment, bytes, pointer, space);
  }
  void* data() const { return data_; }

 private:
  Array owner_;
  void* data_;
};

class Gate {
 public:
  Gate(const py::object& hidden_states, const py::object& gate_weight)
      : hidden_states_(reader_.read("hidden_states", hidden_states)),
        gate_weight_(reader_.read("gate_weight", gate_weight)),
        problem_(resolve_gate(hidden_states_.view, gate_weight_.view)) {}

  size_t workspace_size() const {
    reader_.expect_elements("workspace_size");
    return dispatch::gate_workspace_size(reader_.device(), problem_) + kAlignment;
  }

  const GateProblem& problem() const { return problem_; }
  const Reader& reader() const { return reader_; }

  // An array for the logits.
  py::object new_logits() {
    return reader_.empty(numpy_dtype(DType::kFloat32), {problem_.num_tokens, problem_.num_experts});
  }

  py::object run(const py::object& out, const py::object& workspace) {
    const Output logits("out", out, numpy_dtype(DType::kFloat32), {problem_.num_tokens, problem_.num_experts},
                        &reader_);
    const Workspace scratch(workspace, dispatch::gate_workspace_size(reader_.device(), problem_), &reader_);
    {
      const WithoutInterpreterLock unlocked;
      dispatch::gate(reader_.device(), problem_, scratch.data(), logits.data<float>());
    }
    return logits.result();
  }

  py::tuple backward(const py::object& grad_logits, const py::object& out_hidden_states,
                     const py::object& out_gate_weight, bool hidden_states_wanted, bool gate_weight_wanted) {
    const Array grad = reader_.read("grad_logits", grad_logits);
    std::optional<Output> hidden_states, gate_weight;
    if (hidden_states_wanted) {
      hidden_states.emplace("gradient of hidden_states", out_hidden_states, hidden_states_.dtype,
                            hidden_states_.view.shape, &reader_);
    }
    if (gate_weight_wanted) {
      gate_weight.emplace("gradient of gate_weight", out_gate_weight, gate_weight_.dtype,
                          gate_weight_.view.shape, &reader_, true);
    }
    const GateBackwardProblem problem = resolve_gate_backward(
        hidden_states_.view, gate_weight_.view, grad.view, hidden_states ? hidden_states->view() : Tensor{},
        gate_weight ? gate_weight->view() : Tensor{});
    const Device device = reader_.device();
    const Workspace scratch(py::none(), dispatch::gate_backward_workspace_size(device, problem), &reader_);
    {
      const WithoutInterpreterLock unlocked;
      dispatch::gate_backward(device, problem, scratch.data());
    }
    return py::make_tuple(hidden_states ? hidden_states->result() : py::none(),
                          gate_weight ? gate_weight->result() : py::none());
  }

 private:
  Reader reader_;
  Array hidden_states_, gate_weight_;
  GateProblem problem_;
};

class Route {
 public:
  // options: the members of RouteOptions, in their order.
  template <class... Options>
  Route(const py::object& logits, const py::object& correction_bias, const Options&... options)
      : logits_(reader_.read("logits", logits)),
        correction_bias_(correction_bias.is_none() ? Array{}
                                                   : reader_.read("correction_bias", correction_bias)),
        problem_(resolve_route(logits_.view, correction_bias_.view, {options...})) {}

  const RouteProblem& problem() const { return problem_; }
  const Reader& reader() const { return reader_; }

  // Arrays for the routing table and the router weights.
  py::tuple new_routing() {
    const std::vector<int64_t> shape{problem_.num_tokens, problem_.top_k};
    return py::make_tuple(reader_.empty(numpy_dtype(DType::kInt32), shape),
                          reader_.empty(numpy_dtype(DType::kFloat32), shape));
  }

  py::tuple run(const py::object& out_table, const py::object& out_weights) {
    const std::vector<int64_t> shape{problem_.num_tokens, problem_.top_k};
    const Output table("out[0]", out_table, numpy_dtype(DType::kInt32), shape, &reader_);
    const Output weights("out[1]", out_weights, numpy_dtype(DType::kFloat32), shape, &reader_);
    {
      const WithoutInterpreterLock unlocked;
      dispatch::route(reader_.device(), problem_, table.data<int32_t>(), weights.data<float>());
    }
    return py::make_tuple(table.result(), weights.result());
  }

  py::object backward(const py::object& routing_table, const py::object& grad_router_weights,
                      const py::object& out) {
    const Array table = reader_.read("routing_table", routing_table);
    const Array grad = reader_.read("grad_router_weights", grad_router_weights);
    const RouteBackwardProblem problem = resolve_route_backward(problem_, table.view, grad.view);
    const Output grad_logits("out", out, numpy_dtype(DType::kFloat32),
                             {problem_.num_tokens, problem_.num_experts}, &reader_);
    {
      const WithoutInterpreterLock unlocked;
      dispatch::route_backward(reader_.device(), problem, grad_logits.data<float>());
    }
    return grad_logits.result();
  }

 private:
  Reader reader_;
  Array logits_, correction_bias_;
  RouteProblem problem_;
};

class Experts {
 public:
  Experts(const py::object& hidden_states, const py::object& routing_table, const py::object& router_weights,
          const py::list& gate_up_weights, const py::list& down_weights,
          const std::optional<py::list>& gate_up_bias, const std::optional<py::list>& down_bias,
          const std::optional<py::list>& gate_up_scale, const std::optional<py::list>& down_scale,
          bool permuted_weights, const std::string& activation, int64_t experts_min, int64_t experts_max,
          int64_t chunk_size, bool measurement_mode)
      : measurement_mode_(measurement_mode) {
    arguments_.hidden_states = keep("hidden_states", hidden_states);
    dtype_ = arrays_.back().dtype;
    arguments_.routing_table = keep("routing_table", routing_table);
    arguments_.router_weights = keep("router_weights", router_weights);
    arguments_.gate_up_weights = keep_all("gate_up_weights", gate_up_weights);
    arguments_.down_weights = keep_all("down_weights", down_weights);
    if (gate_up_bias) arguments_.gate_up_bias = keep_all("gate_up_bias", *gate_up_bias);
    if (down_bias) arguments_.down_bias = keep_all("down_bias", *down_bias);
    if (gate_up_scale) arguments_.gate_up_scale = keep_all("gate_up_scale", *gate_up_scale);
    if (down_scale) arguments_.down_scale = keep_all("down_scale", *down_scale);
    static_cast<ExpertsOptions&>(arguments_) = {permuted_weights, activation, experts_min, experts_max,
                                                chunk_size};
    problem_ = resolve(arguments_);
  }

  size_t workspace_size() const {
    reader_.expect_elements("workspace_size");
    return dispatch::workspace_size(reader_.device(), problem_) + kAlignment;
  }

  int64_t pre_activation_rows() const {
    reader_.expect_elements("pre_activation_rows");
    return dispatch::saved_rows(reader_.device(), problem_);
  }

  py::object run(const py::object& out, const py::object& workspace, const py::object& pre_activations) {
    std::optional<Output> saved;
    if (!pre_activations.is_none()) {
      const std::vector<int64_t> shape{pre_activation_rows(), 2 * problem_.intermediate_size};
      saved.emplace("pre_activations", pre_activations, dtype_, shape, &reader_);
    }
    const size_t bytes = dispatch::workspace_size(reader_.device(), problem_);
    return run_with(out, workspace, bytes, [&](void* scratch, void* result, float* amax) {
      dispatch::mixture_of_experts(reader_.device(), problem_, scratch, result, amax,
                                   saved ? saved->data() : nullptr);
    });
  }

  // Also what comes before it: `gate` computes the logits that `route` was made with, and `route` the routing
  // that this was made with.
  py::object run_after(const Gate& gate, const Route& route, const py::object& out,
                       const py::object& workspace) {
    reader_.add_arrays_of(gate.reader());
    reader_.add_arrays_of(route.reader());
    const size_t bytes = dispatch::fused_workspace_size(reader_.device(), gate.problem(), problem_);
    return run_with(out, workspace, bytes, [&](void* scratch, void* result, float* amax) {
      dispatch::fused_gate_moe(reader_.device(), gate.problem(), route.problem(), problem_, scratch, result,
                               amax);
    });
  }

  Reader* reader() { return &reader_; }
  const Arguments& arguments() const { return arguments_; }
  // The NumPy dtype of a result like the array that was passed after `index` others.
  const py::dtype& dtype_at(size_t index) const { return arrays_[index].dtype; }

 private:
  // compute(workspace, out, amax), where amax is null unless it is wanted.
  template <class Compute>
  py::object run_with(const py::object& out, const py::object& workspace, size_t workspace_bytes,
                      Compute compute) {
    const Output output("out", out, dtype_, {problem_.num_tokens, problem_.hidden_size}, &reader_);
    const Workspace scratch(workspace, workspace_bytes, &reader_);
    std::optional<Output> amax;
    if (measurement_mode_) {
      amax.emplace("amax", py::none(), numpy_dtype(DType::kFloat32), std::vector{problem_.num_experts()},
                   &reader_);
    }
    {
      const WithoutInterpreterLock unlocked;
      compute(scratch.data(), output.data(), amax ? amax->data<float>() : nullptr);
    }
    if (amax) return py::make_tuple(output.result(), amax->result());
    return output.result();
  }

  Tensor keep(std::string name, const py::object& object) {
    arrays_.push_back(reader_.read(std::move(name), object));
    return arrays_.back().view;
  }

  std::vector<Tensor> keep_all(const std::string& name, const py::list& objects) {
    std::vector<Tensor> views;
    for (size_t i = 0; i < objects.size(); ++i) {
      views.push_back(keep(objects.size() == 1 ? name : name + "[" + std::to_string(i) + "]", objects[i]));
    }
    return views;
  }

  Reader reader_;
  std::vector<Array> arrays_;  // in the order of the arguments
  py::dtype dtype_;
  Arguments arguments_;
  Problem problem_;
  bool measurement_mode_;
};

// The gradients of an Experts call, one for each of its arrays but the routing table, in that order. `outs`
// holds for each of them the array to write, None for a new one, or False where it is not wanted; True only
// asks for the workspace that it takes.
class ExpertsBackward {
 public:
  ExpertsBackward(Experts& forward, const py::object& grad_out, const py::object& pre_activations,
                  const py::list& outs)
      : device_(forward.reader()->device()),
        reader_(forward.reader()),
        grad_out_(reader_->read("grad_out", grad_out)) {
    if (!pre_activations.is_none()) pre_activations_ = reader_->read("pre_activations", pre_activations);
    const Arguments& arguments = forward.arguments();
    Arguments gradients = arguments;
    gradients.gate_up_scale.clear();  // no results of this call
    gradients.down_scale.clear();
    size_t index = 0, next = 0;
    auto output = [&](const std::string& name, Tensor* tensor) {
      const py::object out = outs[next++];
      const py::dtype& dtype = forward.dtype_at(index++);
      const Tensor argument = *tensor;
      tensor->data = nullptr;
      if (py::isinstance<py::bool_>(out)) {
        if (out.cast<bool>()) *tensor = argument;  // any memory: none is written
        runs_ = runs_ && !out.cast<bool>();
        return;
      }
      const bool weight = name.find("_weights") != std::string::npos && name != "router_weights";
      outputs_.push_back(
          std::make_unique<Output>("gradient of " + name, out, dtype, tensor->shape, reader_, weight));
      results_[next - 1] = outputs_.back()->result();
      tensor->data = outputs_.back()->data();
      tensor->strides = outputs_.back()->view().strides;
    };
    auto output_all = [&](const std::string& name, std::vector<Tensor>* tensors) {
      for (Tensor& tensor : *tensors) output(name, &tensor);
    };
    const size_t expected = 2 + arguments.gate_up_weights.size() + arguments.down_weights.size() +
                            arguments.gate_up_bias.size() + arguments.down_bias.size();
    if (outs.size() != expected)
      fail("outs must hold " + std::to_string(expected) + " entries, got " + std::to_string(outs.size()));
    for (size_t i = 0; i < expected; ++i) results_.append(py::none());
    output("hidden_states", &gradients.hidden_states);
    ++index;  // the routing table
    output("router_weights", &gradients.router_weights);
    output_all("gate_up_weights", &gradients.gate_up_weights);
    output_all("down_weights", &gradients.down_weights);
    output_all("gate_up_bias", &gradients.gate_up_bias);
    output_all("down_bias", &gradients.down_bias);
    problem_ = resolve_backward(arguments, grad_out_.view, pre_activations_.view, gradients);
  }

  size_t workspace_size() const {
    reader_->expect_elements("workspace_size");
    return dispatch::backward_workspace_size(device_, problem_) + kAlignment;
  }

  py::list run(const py::object& workspace) const {
    if (!runs_) fail("outs must hold arrays, None or False, got True");
    const Workspace scratch(workspace, dispatch::backward_workspace_size(device_, problem_), reader_);
    {
      const WithoutInterpreterLock unlocked;
      dispatch::mixture_of_experts_backward(device_, problem_, scratch.data());
    }
    return results_;
  }

 private:
  const Device device_;
  Reader* const reader_;  // of the forward call, which the binding keeps alive
  Array grad_out_, pre_activations_;
  std::vector<std::unique_ptr<Output>> outputs_;
  py::list results_;
  bool runs_ = true;  // not made for the size of its workspace alone
  BackwardProblem problem_;
};

}  // namespace
}  // namespace paddle_moe

PYBIND11_MODULE(_core, module) {
  using namespace paddle_moe;
  module.doc() = "Compiled part of paddle_moe.core; the arguments are documented there.";
  // An array of which only the dtype's name and the shape (-1: unknown) are known: enough for all checks.
  py::class_<Tensor>(module, "Spec").def(py::init([](const std::string& dtype, std::vector<int64_t> shape) {
    Tensor spec{nullptr, dtype_of(dtype), std::move(shape), {}};
    if (spec.dtype == DType::kOther) spec.other_dtype = dtype;
    return spec;
  }));
  // Constructing one of these checks the arguments; run() computes.
  py::class_<Gate>(module, "Gate")
      .def(py::init<const py::object&, const py::object&>())
      .def("workspace_size", &Gate::workspace_size)
      .def("new_logits", &Gate::new_logits)
      .def("run", &Gate::run)
      .def("backward", &Gate::backward);
  py::class_<Route>(module, "Route")
      .def(py::init<const py::object&, const py::object&, int64_t, const std::string&, int64_t, int64_t,
                    const std::string&, float, bool, float, float>())
      .def("new_routing", &Route::new_routing)
      .def("run", &Route::run)
      .def("backward", &Route::backward);
  py::class_<Experts>(module, "Experts")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::list&, const py::list&,
                    const std::optional<py::list>&, const std::optional<py::list>&,
                    const std::optional<py::list>&, const std::optional<py::list>&, bool, const std::string&,
                    int64_t, int64_t, int64_t, bool>())
      .def("workspace_size", &Experts::workspace_size)
      .def("pre_activation_rows", &Experts::pre_activation_rows)
      .def("run", &Experts::run)
      .def("run_after", &Experts::run_after);
  py::class_<ExpertsBackward>(module, "ExpertsBackward")
      .def(py::init<Experts&, const py::object&, const py::object&, const py::list&>(),
           py::keep_alive<1, 2>())
      .def("workspace_size", &ExpertsBackward::workspace_size)
      .def("run", &ExpertsBackward::run);
  module.attr("LAST_EXPERT_PASSED") = kLastExpertPassed;
  module.attr("MAX_THREADS") = cpu::kMaxThreads;
  module.def("has_cuda", &dispatch::has_cuda);
  module.def("set_num_threads", &cpu::set_num_threads);
  module.def("num_threads", &cpu::num_threads);
  const auto expect_positive = [](const char* name, int value) {
    if (value < 1) fail(std::string(name) + " must be at least 1, got " + std::to_string(value));
  };
  module.def("measure_flops", [=](bool bf16, int num_threads) {
    expect_positive("num_threads", num_threads);
    const WithoutInterpreterLock unlocked;
    return cpu::measure_flops(bf16 ? DType::kBFloat16 : DType::kFloat32, num_threads);
  });
  module.def("measure_read", [=](const py::array& data, int streams, int num_threads) {
    expect_positive("streams", streams);
    expect_positive("num_threads", num_threads);
    const void* bytes = data.data();
    const size_t size = static_cast<size_t>(data.nbytes());
    const WithoutInterpreterLock unlocked;
    return cpu::measure_read(bytes, size, streams, num_threads);
  });
  module.def("isa_name", &cpu::isa_name);
  module.def("available_isas", &cpu::available_isas);
}
