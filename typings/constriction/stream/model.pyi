import numpy as np
from numpy.typing import NDArray

class Categorical:
    def __init__(
        self, probabilities: NDArray[np.float32], lazy: bool | None = ..., perfect: bool | None = ...
    ) -> None: ...
