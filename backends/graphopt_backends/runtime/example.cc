// Calls the compiled model from C++: fills its inputs, runs it once and prints the first values of each output.
//
// The lines marked "this model" were written for the model beside this file. Build, in the bundle's folder:
//
//   @COMPILER@ -std=c++17 -O2 example.cc -o example -Iruntime/include -Wl,--no-as-needed
//       runtime/libtvm_ffi.so runtime/libtvm_runtime.so -Wl,-rpath,'$ORIGIN/runtime' -Wl,--allow-shlib-undefined
#include <graphopt/model.h>

#include <algorithm>
#include <iostream>

int main() {
  graphopt::Model model(@LIBRARY@);  // this model
  std::vector<graphopt::Tensor> inputs = {
@INPUTS@
  };
  // write your values into inputs[i].as<float>(), then:
  for (const graphopt::Tensor& output : model.run(inputs)) {
    std::cout << graphopt::detail::dtype_name(output.dtype) << " output:";
    if (output.dtype.code == kDLFloat && output.dtype.bits == 32)
      for (size_t i = 0; i < std::min<size_t>(output.bytes() / 4, 10); ++i) std::cout << " " << output.as<float>()[i];
    std::cout << "\n";
  }
}
