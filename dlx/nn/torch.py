"""PyTorch's layout of parameters in that of flax."""

from __future__ import annotations

import numpy as np


def convert(name: str, value: np.ndarray) -> tuple[str, str, np.ndarray]:
    """(collection, leaf, array) of a convolution's, a linear layer's or a batch norm's parameter.

    Args:
      name: the last part of its name: weight, bias, running_mean or running_var.
      value: (O, I, H, W), (O, I) or (C,).

    Raises:
      ValueError: it is another one.

    >>> convert("weight", np.zeros((8, 3, 5, 5)))[2].shape
    (5, 5, 3, 8)
    """
    if value.dtype == np.float16:  # parameters are float32, whatever computes
        value = value.astype(np.float32)
    match name, value.ndim:
        case "weight", 4:
            return "params", "kernel", value.transpose(2, 3, 1, 0)  # (H, W, I, O)
        case "weight", 2:
            return "params", "kernel", value.T  # (I, O)
        case "weight", 1:
            return "params", "scale", value
        case "bias", 1:
            return "params", "bias", value
        case "running_mean" | "running_var", 1:
            return "batch_stats", name.removeprefix("running_"), value
    raise ValueError(f"{name} of shape {value.shape} is no parameter of a known layer")
