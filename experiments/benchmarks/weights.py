"""Flax's parameters into PyTorch's networks of the same names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn


def load(module: nn.Module, flat: dict[str, np.ndarray]) -> None:
    """Copies {"params/block0/conv1/kernel": array} to module.block0.conv1.weight, and so on.

    A linear layer behind an image's flattening says by its attribute `image`, (H, W, C), what it
    flattens: flax does it in that order, PyTorch as (C, H, W). A part with a method `load`
    ({name: array} of its own) reads its own.

    Raises:
      ValueError: an array finds no place, or a place no array.
    """
    left, own = dict(flat), []
    empty = {name for name, _ in module.named_parameters()}
    for dotted, part in module.named_modules():
        path = dotted.replace(".", "/")
        if hasattr(part, "load"):
            prefix = f"params/{path}/".replace("//", "/")
            mine = [name for name in left if name.startswith(prefix)]
            part.load({name.removeprefix(prefix): left.pop(name) for name in mine})  # type: ignore[operator]
            own.append(f"{dotted}.".removeprefix("."))
        elif not any(f"{dotted}.".startswith(o) for o in own):
            for name, value in _arrays(part, path, left).items():
                place: Any = getattr(part, name)
                if place.shape != value.shape:
                    raise ValueError(f"{dotted}.{name}: {value.shape} for {tuple(place.shape)}")
                with torch.no_grad():
                    place.copy_(torch.from_numpy(np.ascontiguousarray(value)))
                empty.discard(f"{dotted}.{name}".removeprefix("."))
    empty = {name for name in empty if not any(name.startswith(o) for o in own)}
    if left or empty:
        raise ValueError(f"no place for {sorted(left)}, no array for {sorted(empty)}")


def _arrays(part: nn.Module, path: str, left: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{PyTorch's name: array in its layout} of one layer, taken out of `left`."""

    def take(name: str, collection: str = "params") -> np.ndarray:
        return left.pop(f"{collection}/{path}/{name}".replace("//", "/"))

    out: dict[str, np.ndarray] = {}
    if isinstance(part, nn.Conv1d):
        out["weight"] = take("kernel").transpose(2, 1, 0)  # (w, I, O) -> (O, I, w)
    elif isinstance(part, nn.Conv2d):
        out["weight"] = take("kernel").transpose(3, 2, 0, 1)  # (h, w, I, O) -> (O, I, h, w)
    elif isinstance(part, nn.ConvTranspose2d):
        out["weight"] = take("kernel")[::-1, ::-1].transpose(2, 3, 0, 1)  # -> (I, O, h, w)
    elif isinstance(part, nn.Linear):
        kernel = take("kernel")  # (I, O)
        if image := getattr(part, "image", None):
            kernel = kernel.reshape(*image, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        out["weight"] = kernel.T
    elif isinstance(part, nn.Embedding):
        out["weight"] = take("embedding")
    elif isinstance(part, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)):
        out["weight"] = take("scale")
        if not isinstance(part, nn.LayerNorm):
            out["running_mean"] = take("mean", "batch_stats")
            out["running_var"] = take("var", "batch_stats")
    if out and getattr(part, "bias", None) is not None:
        out["bias"] = take("bias")
    return out
