// Runs a part of a model that TVM's own lowering compiled on tensors in files; like run.cc:
//
//   ./run_tvm model.part1.so inputs.tensors outputs.tensors [--threads N] [--weights FILE]
#include <iostream>

#include "model.h"

int main(int count, char** words) {
  std::vector<std::string> files;
  std::string weights;
  int threads = 1;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (word == "--threads" && i + 1 < count)
      threads = std::atoi(words[++i]);
    else if (word == "--weights" && i + 1 < count)
      weights = words[++i];
    else
      files.push_back(word);
  }
  if (files.size() != 3 || threads < 1) {
    std::cerr << "usage: run_tvm PART INPUTS OUTPUTS [--threads N] [--weights FILE]\n";
    return 2;
  }
  try {
    graphopt::Model model(files[0], threads, weights);
    std::vector<graphopt::Tensor> all = graphopt::read_tensors(files[1]);
    size_t step = model.inputs() ? model.inputs() : 1;
    if (all.size() % step) throw std::runtime_error(files[1] + ": the model takes " + std::to_string(step) + " inputs");
    graphopt::TensorWriter writer(files[2]);
    for (size_t i = 0; i < all.size(); i += step)
      for (const graphopt::Tensor& output : model.run({all.begin() + i, all.begin() + i + step})) writer.write(output);
    writer.close();
  } catch (const std::exception& error) {
    std::cerr << "run_tvm: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
