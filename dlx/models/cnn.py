"""Convolutional networks.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document
Recognition", Proceedings of the IEEE, 1998: local receptive fields, shared weights and
subsampling, so that what is learnt in one place of an image serves everywhere.

`LeNet5` is figure 2's layout with ReLU, maximum pooling and dense connections in place of the
paper's scaled tanh, trained subsampling and connection table. `SmallCNN` adds batch normalisation
(S. Ioffe and C. Szegedy, 2015) in place of the biases, and dropout before the classifier. `VGG`
(K. Simonyan and A. Zisserman, arXiv 1409.1556, table 1): only 3 x 3 convolutions, and many.

Symbols: B batch, H and W height and width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlx import nn
from dlx.errors import BadInput
from dlx.nn import torch

relu_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
conv = partial(nn.Conv, use_bias=False)


class SmallCNN(nn.Module):
    """3 x 3 convolutions, a 2 x 2 maximum after some of them, one linear layer.

    Attributes:
      channels: of each convolution.
      pool: whether a maximum follows each convolution.
      classes: logits.
      dropout: rate before the linear layer.
      padding: of all convolutions or of each: "SAME" keeps the size, "VALID" takes 2 off.
      dtype: of the computation; parameters are float32 in any case.
    """

    channels: tuple[int, ...] = (32, 64, 64)
    pool: tuple[bool, ...] = (True, False, True)
    classes: int = 10
    dropout: float = 0.3
    padding: str | tuple[str, ...] = "SAME"
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, C) -> logits (B, classes)."""
        one = isinstance(self.padding, str)
        paddings: Any = (self.padding,) * len(self.channels) if one else self.padding
        if not len(self.channels) == len(self.pool) == len(paddings):
            given = f"{len(self.channels)}, {len(self.pool)} and {len(paddings)}"
            raise BadInput(f"channels, pool and padding have {given} values: give equally many")
        layers = zip(self.channels, self.pool, paddings, strict=True)
        for i, (channels, pool, padding) in enumerate(layers, 1):  # (B, H, W, channels)
            x = conv(channels, (3, 3), padding=padding, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2)) if pool else x  # (B, H/2, W/2, channels)
        x = x.reshape(x.shape[0], -1)  # (B, H W C)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)  # (B, classes)


class ConvNet(nn.Module):
    """The network of many first lessons: two convolutions of 3 x 3, each with a maximum, two dense
    layers; 824,458 parameters on 28 x 28 images, nearly all in the first dense layer.

    Attributes:
      channels: of each convolution.
      units: of the hidden dense layer.
      classes: logits.
      dropout: rate before the last layer.
      dtype: of the computation; parameters are float32 in any case.
    """

    channels: tuple[int, ...] = (32, 64)
    units: int = 256
    classes: int = 10
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, C) -> logits (B, classes)."""
        for i, channels in enumerate(self.channels, 1):
            x = nn.relu(nn.Conv(channels, (3, 3), dtype=self.dtype, name=f"conv{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))  # (B, H / 2^i, W / 2^i, channels)
        x = x.reshape(x.shape[0], -1)  # (B, H W C)
        x = nn.relu(nn.Dense(self.units, dtype=self.dtype, name="dense")(x))  # (B, units)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)  # (B, classes)


class LeNet5(nn.Module):
    """C1 6, S2, C3 16, S4, C5 120, F6 84: 61,706 parameters on 28 x 28 images."""

    classes: int = 10
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, 28, 28, 1) -> logits (B, classes); other sizes from 12 on do as well."""
        check_size(x, 12)
        x = nn.Conv(6, (5, 5), dtype=self.dtype, name="c1")(x)  # (B, 28, 28, 6)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))  # (B, 14, 14, 6)
        x = nn.Conv(16, (5, 5), padding="VALID", dtype=self.dtype, name="c3")(x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))  # (B, 5, 5, 16)
        x = x.reshape(x.shape[0], -1)  # (B, 400)
        for name, units in (("c5", 120), ("f6", 84)):
            x = nn.relu(nn.Dense(units, dtype=self.dtype, name=name)(x))  # (B, units)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions, each halved by a maximum, and three linear layers.

    Attributes:
      stages: convolutions of each stage; the features double from 64 to 512.
      norm: batch normalisation after each convolution (the paper has none).
      classes: logits.
      dropout: rate before the second and third linear layer.
      dtype: of the computation; parameters are float32 in any case.
    """

    stages: tuple[int, ...]
    norm: bool = True
    classes: int = 1000
    dropout: float = 0.5
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> logits (B, classes); H and W at least 32."""
        check_size(x, 32)
        for i, count in enumerate(self.stages):
            for j in range(count):
                name = f"{i + 1}_{j + 1}"
                x = nn.Conv(min(64 * 2**i, 512), (3, 3), kernel_init=relu_init, dtype=self.dtype,
                            name=f"conv{name}")(x)  # fmt: skip
                if self.norm:
                    norm = nn.BatchNorm(
                        not train, momentum=0.9, dtype=self.dtype, name=f"norm{name}"
                    )
                    x = norm(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2))  # (B, H / 2^i, W / 2^i, features)
        x = adaptive_mean(x, 7)  # (B, 7, 7, 512)
        x = x.reshape(x.shape[0], -1)  # (B, 25088)
        for name in ("dense1", "dense2"):
            x = nn.relu(nn.Dense(4096, dtype=self.dtype, name=name)(x))  # (B, 4096)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


def check_size(x: jax.Array, least: int) -> None:
    if x.ndim != 4 or min(x.shape[1:3]) < least:
        raise BadInput(f"images are {x.shape}: give (B, H, W, C), H and W at least {least}")


VGG11 = partial(VGG, (1, 1, 2, 2, 2))
VGG16 = partial(VGG, (2, 2, 3, 3, 3))


def adaptive_mean(x: jax.Array, size: int) -> jax.Array:
    """(B, H, W, C) -> (B, size, size, C): field i is the mean from floor(i H / size) to
    ceil((i + 1) H / size), as in torch; so any image fits the linear layers."""

    def weights(length: int) -> np.ndarray:
        w = np.zeros((size, length))
        for i in range(size):
            first, last = i * length // size, -(-(i + 1) * length // size)
            w[i, first:last] = 1 / (last - first)
        return w.astype(x.dtype)

    return jnp.einsum("ih,bhwc,jw->bijc", weights(x.shape[1]), x, weights(x.shape[2]))


def vgg_from_torch(state: Mapping[str, np.ndarray], stages: tuple[int, ...]) -> dict[str, Any]:
    """{"params", "batch_stats"} of a VGG from torchvision's names ("features.0.weight").

    Args:
      state: {name: array}, as ``safetensors.numpy.load_file`` reads it.
      stages: as the model's; whether it normalises is told by the arrays.

    Raises:
      BadInput: an array that such a VGG does not have, or none.
    """
    norm = any("running" in name or (name.endswith("weight") and np.ndim(x) == 1)
               for name, x in state.items())  # fmt: skip
    homes, place = {"classifier.0": "dense1", "classifier.3": "dense2", "classifier.6": "head"}, 0
    for i, count in enumerate(stages, 1):
        for j in range(1, count + 1):
            homes[f"features.{place}"] = f"conv{i}_{j}"
            homes[f"features.{place + 1}"] = f"norm{i}_{j}"
            place += 3 if norm else 2  # with its ReLU
        place += 1  # the maximum
    out: dict[str, Any] = {}
    for name, value in state.items():
        layer, _, last = name.rpartition(".")
        if last == "num_batches_tracked":
            continue
        if layer not in homes:
            raise BadInput(f"{name} is not of a VGG with stages {stages}: check both")
        value = np.asarray(value)
        if name == "classifier.0.weight":  # torch flattens (C, 7, 7), flax (7, 7, C)
            value = value.reshape(-1, 512, 7, 7).transpose(0, 2, 3, 1).reshape(len(value), -1)
        collection, leaf, value = torch.convert(last, value)
        out.setdefault(collection, {}).setdefault(homes[layer], {})[leaf] = value
    if not out:
        raise BadInput("no arrays are given: read them with safetensors.numpy.load_file")
    return out
