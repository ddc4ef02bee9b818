// A part of a model that TVM's own lowering compiled, in C++.
//
// Needs C++17, libtvm_ffi.so and libtvm_runtime.so (folder `runtime` of the bundle). A failure is a
// std::runtime_error. One Model belongs to one thread at a time.
#ifndef GRAPHOPT_TVM_MODEL_H_
#define GRAPHOPT_TVM_MODEL_H_

#include <dlpack/dlpack.h>
#include <sched.h>
#include <tvm/ffi/c_api.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tensors.h"

namespace graphopt {

namespace detail {

inline void check(int code) {
  if (code == 0) return;
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  if (!error) throw std::runtime_error("the runtime failed without a message");
  TVMFFIByteArray text = TVMFFIErrorGetCellPtr(error)->message;
  std::string message(text.data, text.size);
  TVMFFIObjectDecRef(error);
  throw std::runtime_error(message);
}

// Owns one reference to a runtime object.
using Object = std::shared_ptr<void>;

inline Object own(TVMFFIObjectHandle handle) {
  return Object(handle, [](void* object) {
    if (object) TVMFFIObjectDecRef(object);
  });
}

inline TVMFFIAny any(int32_t type) {
  TVMFFIAny value;
  std::memset(&value, 0, sizeof(value));
  value.type_index = type;
  return value;
}
inline TVMFFIAny any(const Object& object) {
  TVMFFIAny value = any(TVMFFIObjectGetTypeIndex(object.get()));
  value.v_obj = static_cast<TVMFFIObject*>(object.get());
  return value;
}
inline TVMFFIAny any(const char* text) {
  TVMFFIAny value = any(kTVMFFIRawStr);
  value.v_c_str = text;
  return value;
}
inline TVMFFIAny integer(int64_t number) {
  TVMFFIAny value = any(kTVMFFIInt);
  value.v_int64 = number;
  return value;
}

inline TVMFFIAny call(const Object& function, std::vector<TVMFFIAny> arguments) {
  TVMFFIAny result = any(kTVMFFINone);
  check(TVMFFIFunctionCall(function.get(), arguments.data(), static_cast<int32_t>(arguments.size()), &result));
  return result;
}
inline Object global(const std::string& name) {
  TVMFFIByteArray text{name.data(), name.size()};
  TVMFFIObjectHandle handle = nullptr;
  check(TVMFFIFunctionGetGlobal(&text, &handle));
  if (!handle) throw std::runtime_error("the runtime has no function " + name);
  return own(handle);
}
inline Object object(const TVMFFIAny& value, const char* what) {
  if (value.type_index < kTVMFFIStaticObjectBegin) throw std::runtime_error(std::string("not found: ") + what);
  return own(value.v_obj);
}
inline Object method(const Object& module, const char* name) {
  TVMFFIAny flag = any(kTVMFFIBool);
  flag.v_int64 = 1;
  return object(call(global("ffi.ModuleGetFunction"), {any(module), any(name), flag}), name);
}

// Gives the runtime's pool all cores that this process may use: by itself it takes half of them for hyper-threads.
inline void use_threads(int threads) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) throw std::runtime_error("cannot read the allowed cores");
  std::vector<std::string> names;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &allowed)) names.push_back(std::to_string(core));
  std::vector<TVMFFIAny> words;
  for (const std::string& name : names) words.push_back(any(name.c_str()));
  Object cores = object(call(global("ffi.Array"), words), "ffi.Array");
  call(global("runtime.config_threadpool"), {integer(-3), integer(threads), any(cores)});
}

inline std::string dtype_name(DLDataType dtype) {
  if (dtype.code == kDLBool) return "bool";
  const char* kind = dtype.code == kDLInt ? "int" : dtype.code == kDLUInt ? "uint" : dtype.code == kDLBfloat ? "bfloat" : "float";
  return kind + std::to_string(dtype.bits);
}
inline DLDataType dtype_from(const std::string& name) {
  if (name == "bool") return {kDLBool, 8, 1};
  size_t digits = name.find_first_of("0123456789");
  std::string kind = name.substr(0, digits);
  auto bits = static_cast<uint8_t>(digits == std::string::npos ? 0 : std::stoi(name.substr(digits)));
  if (kind == "float" && bits) return {kDLFloat, bits, 1};
  if (kind == "bfloat" && bits) return {kDLBfloat, bits, 1};
  if (kind == "uint" && bits) return {kDLUInt, bits, 1};
  if (kind == "int" && bits) return {kDLInt, bits, 1};
  throw std::runtime_error("unknown element type " + name);
}

struct Lent {
  DLManagedTensor managed;
  Tensor tensor;
};

// Hands a tensor to the runtime without copying it.
inline Object lend(const Tensor& tensor) {
  auto* lent = new Lent{{}, tensor};
  DLTensor& view = lent->managed.dl_tensor;
  view.data = lent->tensor.data.get();
  view.device = {kDLCPU, 0};
  view.ndim = static_cast<int32_t>(lent->tensor.shape.size());
  view.dtype = dtype_from(tensor.dtype);
  view.shape = lent->tensor.shape.data();
  view.strides = nullptr;
  view.byte_offset = 0;
  lent->managed.manager_ctx = lent;
  lent->managed.deleter = [](DLManagedTensor* self) { delete static_cast<Lent*>(self->manager_ctx); };
  TVMFFIObjectHandle handle = nullptr;
  check(TVMFFITensorFromDLPack(&lent->managed, 64, 1, &handle));
  return own(handle);
}

// Takes a tensor from the runtime without copying it.
inline Tensor take(const Object& object) {
  DLTensor* view = TVMFFITensorGetDLTensorPtr(object.get());
  Tensor tensor{"", dtype_name(view->dtype), std::vector<int64_t>(view->shape, view->shape + view->ndim), 0, nullptr};
  size_t count = 1;
  for (int64_t size : tensor.shape) count *= static_cast<size_t>(size);
  tensor.bytes = (count * view->dtype.bits * view->dtype.lanes + 7) / 8;
  tensor.data = std::shared_ptr<void>(object, static_cast<char*>(view->data) + view->byte_offset);
  return tensor;
}

}  // namespace detail

class Model {
 public:
  // `weights`: the file model.weights, where the bundle has one; it is mapped, not read.
  explicit Model(const std::string& library, int threads = 1, const std::string& weights = "") {
    using namespace detail;
    std::string path = library.find('/') == std::string::npos ? "./" + library : library;
    Object module = object(call(global("ffi.ModuleLoadFromFile"), {any(path.c_str())}), path.c_str());
    machine_ = object(call(method(module, "vm_load_executable"), {}), "vm_load_executable");
    call(method(machine_, "vm_initialization"), {integer(kDLCPU), integer(0), integer(2)});
    use_threads(threads);
    main_ = method(machine_, "main");
    arity_ = static_cast<size_t>(call(method(machine_, "get_function_arity"), {any("main")}).v_int64);
    if (!weights.empty())
      for (const Tensor& tensor : read_tensors(weights)) weights_.push_back(lend(tensor));
    if (weights_.size() > arity_) throw std::runtime_error(weights + " does not belong to " + library);
  }

  // Tensors that run() takes.
  size_t inputs() const { return arity_ - weights_.size(); }

  // Runs once; the results stay valid as long as they are held.
  std::vector<Tensor> run(const std::vector<Tensor>& inputs) {
    using namespace detail;
    std::vector<Object> lent;
    for (const Tensor& tensor : inputs) lent.push_back(lend(tensor));
    std::vector<TVMFFIAny> arguments;
    for (const Object& tensor : lent) arguments.push_back(any(tensor));
    for (const Object& tensor : weights_) arguments.push_back(any(tensor));
    TVMFFIAny value = call(main_, arguments);
    Object result = object(value, "result");
    std::vector<Tensor> outputs;
    if (value.type_index == kTVMFFITensor) {
      outputs.push_back(take(result));
    } else {
      int64_t count = call(global("ffi.ArraySize"), {any(result)}).v_int64;
      for (int64_t i = 0; i < count; ++i)
        outputs.push_back(take(object(call(global("ffi.ArrayGetItem"), {any(result), integer(i)}), "output")));
    }
    return outputs;
  }

 private:
  detail::Object machine_, main_;
  std::vector<detail::Object> weights_;
  size_t arity_ = 0;
};

}  // namespace graphopt

#endif  // GRAPHOPT_TVM_MODEL_H_
