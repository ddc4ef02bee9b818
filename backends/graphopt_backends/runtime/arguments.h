// The command line of the programs that run compiled models on files: MODEL INPUTS OUTPUTS [--threads N] [--weights FILE].
#ifndef GRAPHOPT_ARGUMENTS_H_
#define GRAPHOPT_ARGUMENTS_H_

#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

namespace graphopt {

struct Arguments {
  std::string model, inputs, outputs, weights;
  int threads = 1;
};

// Calls `run(arguments)`; returns the exit code of the program.
template <typename Run>
int with_arguments(const char* program, int count, char** words, Run run) {
  std::vector<std::string> files;
  Arguments found;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (word == "--threads" && i + 1 < count)
      found.threads = std::atoi(words[++i]);
    else if (word == "--weights" && i + 1 < count)
      found.weights = words[++i];
    else
      files.push_back(word);
  }
  if (files.size() != 3 || found.threads < 1) {
    std::cerr << "usage: " << program << " MODEL INPUTS OUTPUTS [--threads N] [--weights FILE]\n";
    return 2;
  }
  found.model = files[0], found.inputs = files[1], found.outputs = files[2];
  try {
    run(found);
  } catch (const std::exception& error) {
    std::cerr << program << ": " << error.what() << "\n";
    return 1;
  }
  return 0;
}

}  // namespace graphopt

#endif  // GRAPHOPT_ARGUMENTS_H_
