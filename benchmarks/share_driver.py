"""onnxsim's k-means, inside its own environment: python share_driver.py JOB.json.

The job is `{"way": "shipped" | "clusters", "model": ..., "out": ..., "entries": ..., "weights": {name: axis}}`. As
shipped, `quantize_weight_only_kmeans` knows 4 bits and matrices only, and writes float weights again. For other sizes
and layers its own routine for a list of numbers clusters the tensors that are named, or each of their channels where
there is an axis.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnxsim import quantize_weight_only_kmeans
from onnxsim.kmeans_quantization import _kmeans_1d

_ROUNDS, _SEED = 20, 0  # what the shipped function is fixed to


def main(path: str) -> None:
    """Do a job, and print the seconds that it took."""
    job = json.loads(Path(path).read_text("utf8"))
    model, start = onnx.load(job["model"]), time.perf_counter()
    if job["way"] == "shipped":
        model = quantize_weight_only_kmeans(model)
    else:
        for tensor in model.graph.initializer:
            if tensor.name in job["weights"]:
                array, axis = numpy_helper.to_array(tensor), job["weights"][tensor.name]
                channels = np.moveaxis(array, axis, 0) if axis is not None else array[None]
                clustered = np.stack([_clustered(channel, job["entries"]) for channel in channels])
                whole = np.moveaxis(clustered, 0, axis) if axis is not None else clustered[0]
                tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(whole), tensor.name))
    seconds = time.perf_counter() - start
    onnx.save(model, job["out"])
    print(json.dumps({"seconds": seconds}))


def _clustered(array: np.ndarray, entries: int) -> np.ndarray:
    """An array with each number replaced by its cluster's."""
    values, codes = _kmeans_1d(array.reshape(-1), entries, _ROUNDS, _SEED)
    return values.astype(np.float32)[codes].reshape(array.shape)


if __name__ == "__main__":
    main(sys.argv[1])
