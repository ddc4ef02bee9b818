"""Prune, quantize, compile and check any ONNX model."""
