#!/bin/sh
# Links model.so from its object code and the sources of the runtime, in the folder above this file.
# CC: a C compiler for @TRIPLE@, such as that of the Android NDK.
set -e
cd "$(dirname "$0")"
${CC:-@COMPILER@} -shared -fPIC -O2 -std=c11 -pthread -fvisibility=hidden -Wl,-soname,model.so -Wl,-Bsymbolic \
  -Wl,--version-script=exports.map -s -o ../model.so kernels.o model.c runtime.c cpu.c
