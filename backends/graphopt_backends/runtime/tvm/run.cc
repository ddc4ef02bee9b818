// Runs a part of a model that TVM's own lowering compiled on tensors in files; like run.cc:
//
//   ./run_tvm model.part1.so inputs.tensors outputs.tensors [--threads N] [--weights FILE]
#include "arguments.h"
#include "model.h"

namespace {

void run_all(const graphopt::Arguments& given) {
  graphopt::Model model(given.model, given.threads, given.weights);
  std::vector<graphopt::Tensor> all = graphopt::read_tensors(given.inputs);
  size_t step = model.inputs() ? model.inputs() : 1;
  if (all.size() % step) throw std::runtime_error(given.inputs + ": the model takes " + std::to_string(step) + " inputs");
  graphopt::TensorWriter writer(given.outputs);
  for (size_t i = 0; i < all.size(); i += step)
    for (const graphopt::Tensor& output : model.run({all.begin() + i, all.begin() + i + step})) writer.write(output);
  writer.close();
}

}  // namespace

int main(int count, char** words) { return graphopt::with_arguments("run_tvm", count, words, run_all); }
