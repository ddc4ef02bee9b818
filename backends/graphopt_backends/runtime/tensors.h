// Tensors in memory and in files, for the programs that run compiled models.
//
// A file of tensors is a sequence of records: a line `tensor DTYPE DIMS BYTES NAME`, padded with blanks to a multiple
// of the alignment, then the values, padded with zeros. DIMS is like 1,3,224,224, or - for a scalar; the first line
// of the file is `graphopt tensors 1 ALIGNMENT`, padded alike.
#ifndef GRAPHOPT_TENSORS_H_
#define GRAPHOPT_TENSORS_H_

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
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

// Values in row-major order, aligned to 64 bytes or more; dtype is NumPy's name of the element type.
struct Tensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  size_t bytes = 0;
  std::shared_ptr<void> data;
};

// A tensor with room for its values, all zero.
inline Tensor make_tensor(std::string dtype, std::vector<int64_t> shape, size_t bytes, std::string name = "") {
  Tensor tensor{std::move(name), std::move(dtype), std::move(shape), bytes, nullptr};
  size_t room = (bytes + 63) / 64 * 64 + 64;
  void* memory = std::aligned_alloc(64, room);
  if (!memory) throw std::runtime_error("out of memory");
  std::memset(memory, 0, room);
  tensor.data = std::shared_ptr<void>(memory, std::free);
  return tensor;
}

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
    std::string header = line(at), tag, dims, dim;
    at += header.size() + 1;
    std::istringstream words(header);
    Tensor tensor;
    words >> tag >> tensor.dtype >> dims >> tensor.bytes;
    if (!words || tag != "tensor" || tensor.bytes > size - at) throw std::runtime_error(path + " is damaged");
    std::getline(words >> std::ws, tensor.name);
    tensor.name.erase(tensor.name.find_last_not_of(' ') + 1);
    std::istringstream sizes(dims == "-" ? "" : dims);
    while (std::getline(sizes, dim, ',')) tensor.shape.push_back(std::strtoll(dim.c_str(), nullptr, 10));
    tensor.data = std::shared_ptr<void>(all, all.get() + at);
    at = round_up(at + tensor.bytes);
    tensors.push_back(std::move(tensor));
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
    line("tensor " + tensor.dtype + " " + (dims.empty() ? "-" : dims) + " " +
         std::to_string(tensor.bytes) + " " + tensor.name);
    stream_.write(static_cast<const char*>(tensor.data.get()), static_cast<std::streamsize>(tensor.bytes));
    stream_ << std::string((64 - tensor.bytes % 64) % 64, '\0');
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

}  // namespace graphopt

#endif  // GRAPHOPT_TENSORS_H_
