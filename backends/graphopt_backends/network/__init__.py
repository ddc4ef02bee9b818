"""Networks as one function: from an ONNX graph to kernels in order, on memory that is laid out before."""
