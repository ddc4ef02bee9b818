// Runs a compiled model on tensors in files, many feeds in one process:
//
//   ./run model.so inputs.tensors outputs.tensors [--threads N] [--weights model.weights]
//
// inputs.tensors holds the inputs of every feed one after the other, in the order of model.plan.json; outputs.tensors
// will hold the outputs alike. tensors.h describes the format. Build, in the folder of this file:
//
//   @COMPILER@ -std=c++17 -O2 run.cc -o run -ldl
#include <dlfcn.h>

#include "arguments.h"
#include "graphopt.h"
#include "tensors.h"

namespace {

template <typename Function>
Function* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (!found) throw std::runtime_error(std::string("not a compiled model: it has no ") + name);
  return reinterpret_cast<Function*>(found);
}

std::vector<graphopt::Tensor> outputs_of(const graphopt_description& model) {
  std::vector<graphopt::Tensor> made;
  for (int i = 0; i < model.output_count; ++i) {
    const graphopt_tensor& t = model.outputs[i];
    made.push_back(graphopt::make_tensor(t.dtype, {t.shape, t.shape + t.rank}, t.bytes, t.name));
  }
  return made;
}

void run_all(const graphopt::Arguments& given) {
  const std::string &path = given.model, &inputs = given.inputs, &weights = given.weights;
  std::string file = path.find('/') == std::string::npos ? "./" + path : path;
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  const graphopt_description& made = *symbol<decltype(graphopt_describe)>(library, "graphopt_describe")();
  if (made.format != GRAPHOPT_FORMAT) throw std::runtime_error(path + " has another format: compile the model again");
  char message[512] = "";
  graphopt_model* model = symbol<decltype(graphopt_open)>(library, "graphopt_open")(
      weights.empty() ? nullptr : weights.c_str(), given.threads, message, sizeof message);
  if (!model) throw std::runtime_error(message);
  auto* run = symbol<decltype(graphopt_run)>(library, "graphopt_run");

  std::vector<graphopt::Tensor> all = graphopt::read_tensors(inputs);
  size_t step = made.input_count ? static_cast<size_t>(made.input_count) : 1;
  if (all.size() % step) throw std::runtime_error(inputs + ": the model takes " + std::to_string(step) + " inputs");
  graphopt::TensorWriter writer(given.outputs);
  std::vector<graphopt::Tensor> outputs = outputs_of(made);
  for (size_t i = 0; i < all.size(); i += step) {
    std::vector<const void*> sources;
    std::vector<void*> targets;
    for (int k = 0; k < made.input_count; ++k) {
      const graphopt::Tensor& given = all[i + k];
      const graphopt_tensor& wanted = made.inputs[k];
      if (given.bytes != wanted.bytes || given.dtype != wanted.dtype)
        throw std::runtime_error(std::string("input ") + wanted.name + " takes " + std::to_string(wanted.bytes) +
                                 " bytes of " + wanted.dtype + ", not " + std::to_string(given.bytes) + " of " + given.dtype);
      sources.push_back(given.data.get());
    }
    for (const graphopt::Tensor& output : outputs) targets.push_back(output.data.get());
    run(model, sources.data(), targets.data());
    for (const graphopt::Tensor& output : outputs) writer.write(output);
  }
  writer.close();
  symbol<decltype(graphopt_close)>(library, "graphopt_close")(model);
}

}  // namespace

int main(int count, char** words) { return graphopt::with_arguments("run", count, words, run_all); }
