"""The host beside an NPU: parts of a model as portable C, or as libraries for an Arm CPU."""
