// A compiled model in C++: load the library, run it on tensors in memory, or on tensors in files.
//
//   graphopt::Model model("model.so");                       // 1 thread; Model(path, threads, weights) for more
//   std::vector<graphopt::Tensor> out = model.run(inputs);   // in the order of model.plan.json
//
// Needs C++17, libtvm_ffi.so and libtvm_runtime.so (folder `runtime` of the bundle), and nothing else. A failure is a
// std::runtime_error. One Model belongs to one thread at a time.
//
// A file of tensors is a sequence of records: a line `tensor DTYPE DIMS BYTES NAME`, padded with blanks to a multiple
// of the alignment, then the values, padded with zeros. DIMS is like 1,3,224,224, or - for a scalar; the first line
// of the file is `graphopt tensors 1 ALIGNMENT`, padded alike.
#ifndef GRAPHOPT_MODEL_H_
#define GRAPHOPT_MODEL_H_

#include <dlpack/dlpack.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace graphopt {

// Values in row-major order, aligned to 64 bytes or more.
struct Tensor {
  std::string name;
  DLDataType dtype{kDLFloat, 32, 1};
  std::vector<int64_t> shape;
  std::shared_ptr<void> data;

  size_t bytes() const {
    size_t count = 1;
    for (int64_t size : shape) count *= static_cast<size_t>(size);
    return (count * dtype.bits * dtype.lanes + 7) / 8;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data.get());
  }
};

// A tensor with room for its values, all zero.
inline Tensor make_tensor(DLDataType dtype, std::vector<int64_t> shape, std::string name = "") {
  Tensor tensor{std::move(name), dtype, std::move(shape), nullptr};
  size_t room = (tensor.bytes() + 63) / 64 * 64 + 64;
  void* memory = std::aligned_alloc(64, room);
  if (!memory) throw std::runtime_error("out of memory");
  std::memset(memory, 0, room);
  tensor.data = std::shared_ptr<void>(memory, std::free);
  return tensor;
}

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
  view.dtype = tensor.dtype;
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
  Tensor tensor{"", view->dtype, std::vector<int64_t>(view->shape, view->shape + view->ndim), nullptr};
  tensor.data = std::shared_ptr<void>(object, static_cast<char*>(view->data) + view->byte_offset);
  return tensor;
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

}  // namespace detail

// Reads all tensors of a file; the values stay in the file until they are used.
inline std::vector<Tensor> read_tensors(const std::string& path) {
  int file = open(path.c_str(), O_RDONLY);
  struct stat status {};
  if (file < 0 || fstat(file, &status) != 0) throw std::runtime_error("cannot read " + path);
  auto size = static_cast<size_t>(status.st_size);
  void* memory = size ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0) : MAP_FAILED;
  close(file);
  if (memory == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  std::shared_ptr<char> all(static_cast<char*>(memory), [size](char* start) { munmap(start, size); });

  auto line = [&](size_t start) {
    const void* end = start < size ? std::memchr(all.get() + start, '\n', size - start) : nullptr;
    if (!end) throw std::runtime_error(path + " is cut short");
    const char* begin = all.get() + start;
    return std::string(begin, static_cast<const char*>(end));
  };
  std::string first = line(0);
  size_t align = 0;
  if (std::sscanf(first.c_str(), "graphopt tensors 1 %zu", &align) != 1 || align < 64)
    throw std::runtime_error(path + " is not a file of tensors");
  auto round_up = [align](size_t value) { return (value + align - 1) / align * align; };

  std::vector<Tensor> tensors;
  for (size_t at = round_up(first.size() + 1); at < size;) {
    std::string header = line(at), tag, dtype, dims, dim;
    std::istringstream words(header);
    size_t bytes = 0;
    words >> tag >> dtype >> dims >> bytes >> std::ws;
    Tensor tensor;
    std::getline(words, tensor.name);
    tensor.name.erase(tensor.name.find_last_not_of(' ') + 1);
    tensor.dtype = detail::dtype_from(dtype);
    std::istringstream sizes(dims == "-" ? "" : dims);
    while (std::getline(sizes, dim, ',')) tensor.shape.push_back(std::stoll(dim));
    at += header.size() + 1;
    if (tag != "tensor" || bytes != tensor.bytes() || at + bytes > size) throw std::runtime_error(path + " is damaged");
    tensor.data = std::shared_ptr<void>(all, all.get() + at);
    tensors.push_back(std::move(tensor));
    at = round_up(at + bytes);
  }
  return tensors;
}

// Writes tensors to a file one after the other.
class TensorWriter {
 public:
  explicit TensorWriter(const std::string& path) : stream_(path, std::ios::binary), path_(path) {
    line("graphopt tensors 1 64");
  }
  void write(const Tensor& tensor) {
    std::string dims;
    for (int64_t size : tensor.shape) dims += (dims.empty() ? "" : ",") + std::to_string(size);
    line("tensor " + detail::dtype_name(tensor.dtype) + " " + (dims.empty() ? "-" : dims) + " " +
         std::to_string(tensor.bytes()) + " " + tensor.name);
    stream_.write(static_cast<const char*>(tensor.data.get()), static_cast<std::streamsize>(tensor.bytes()));
    stream_ << std::string((64 - tensor.bytes() % 64) % 64, '\0');
    check();
  }
  void close() {
    stream_.close();
    check();
  }

 private:
  void line(std::string text) {
    text += std::string((64 - (text.size() + 1) % 64) % 64, ' ') + "\n";
    stream_ << text;
    check();
  }
  void check() const {
    if (!stream_) throw std::runtime_error("cannot write " + path_);
  }
  std::ofstream stream_;
  std::string path_;
};

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

#endif  // GRAPHOPT_MODEL_H_
