"""Residual networks.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385:
a block learns a residue F, and its input goes round it,

    y = F(x) + x                                                    (equation 1)
    y = F(x) + W_s x         where the shape changes                (equation 2)

so that depth costs nothing: a block can be the identity by F = 0. K. He et al., "Identity Mappings
in Deep Residual Networks", arXiv 1603.05027 (v2): normalisation and ReLU move before the
convolutions, and the sum is left alone from the first block to the last.

The ImageNet networks have the stride of a bottleneck in its 3 x 3 convolution (the paper has it in
the first 1 x 1), as torchvision does, whose weights therefore load. The CIFAR networks of section
4.2 have 6 n + 2 layers and shortcuts without parameters (option A).

Symbols: B batch, H and W height and width, C channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlx import nn
from dlx.errors import BadInput
from dlx.nn import torch

# torch's default initialisation of these networks: variance 2 / fan out.
kaiming = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(features: int, size: int, stride: int = 1, **kwargs: Any) -> nn.Conv:
    """A convolution without bias, padded by size // 2 on every side."""
    pad = [(size // 2, size // 2)] * 2
    return nn.Conv(features, (size, size), (stride, stride), padding=pad, use_bias=False,
                   kernel_init=kaiming, **kwargs)  # fmt: skip


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions: F(x) = norm(W_2 relu(norm(W_1 x)))."""

    features: int
    stride: int
    norm: Callable[..., Any]
    dtype: Any = None
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv(self.features, 3, dtype=self.dtype, name="conv2")(y)
        y = self.norm(name="norm2")(y)  # (B, H / stride, W / stride, features)
        if x.shape != y.shape:
            x = conv(self.features, 1, self.stride, dtype=self.dtype, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1 x 1 down, 3 x 3, 1 x 1 up to four times the features."""

    features: int
    stride: int
    norm: Callable[..., Any]
    dtype: Any = None
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = conv(self.features, 1, dtype=self.dtype, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = conv(self.features, 3, self.stride, dtype=self.dtype, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = conv(4 * self.features, 1, dtype=self.dtype, name="conv3")(y)
        y = self.norm(name="norm3")(y)  # (B, H / stride, W / stride, 4 features)
        if x.shape != y.shape:
            x = conv(4 * self.features, 1, self.stride, dtype=self.dtype, name="shortcut_conv")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The ImageNet networks: a 7 x 7 stem, four stages, a mean over the image, a linear layer.

    Attributes:
      blocks: in each stage; a stage halves the image (but the first) and doubles the features.
      block: BasicBlock or Bottleneck.
      features: of the first stage.
      classes: logits.
      dtype: of the computation; parameters are float32 in any case.
      small: for images of 32 x 32: a stem of 3 x 3 with stride 1 and without maximum.
    """

    blocks: tuple[int, ...]
    block: type[Any]
    features: int = 64
    classes: int = 1000
    dtype: Any = None
    small: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, 3) -> logits (B, classes)."""
        norm = partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        size, stride = (3, 1) if self.small else (7, 2)
        x = conv(self.features, size, stride, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(norm(name="norm1")(x))  # (B, H/2, W/2, 64)
        if not self.small:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # (B, H/4, W/4, 64)
        for i, count in enumerate(self.blocks, 1):
            for j in range(count):
                stride = 2 if i > 1 and j == 0 else 1
                width = self.features * 2 ** (i - 1)
                x = self.block(width, stride, norm, self.dtype, name=f"layer{i}_{j}")(x)
        x = x.mean((1, 2))  # (B, C)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


ResNet18 = partial(ResNet, (2, 2, 2, 2), BasicBlock)
ResNet34 = partial(ResNet, (3, 4, 6, 3), BasicBlock)
ResNet50 = partial(ResNet, (3, 4, 6, 3), Bottleneck)
ResNet101 = partial(ResNet, (3, 4, 23, 3), Bottleneck)
ResNet152 = partial(ResNet, (3, 8, 36, 3), Bottleneck)


# ---- CIFAR (section 4.2) -----------------------------------------------------------------------


def widen(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Option A, a shortcut without parameters: every second pixel, zeros for the new channels."""
    x = x[:, ::stride, ::stride]  # (B, H / stride, W / stride, C)
    new = features - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


class CifarBlock(nn.Module):
    """F(x) = norm(W_2 relu(norm(W_1 x))) with option A's shortcut; or, by v2 (1603.05027, figure
    1b), F(x) = W_2 relu(norm(W_1 relu(norm(x)))) and no ReLU after the sum."""

    features: int
    stride: int
    preactivation: bool
    norm: Callable[..., Any]
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv1(x: jax.Array) -> jax.Array:
            return conv(self.features, 3, self.stride, dtype=self.dtype, name="conv1")(x)

        def conv2(x: jax.Array) -> jax.Array:
            return conv(self.features, 3, dtype=self.dtype, name="conv2")(x)

        shortcut = widen(x, self.features, self.stride)  # (B, H / stride, W / stride, features)
        if self.preactivation:
            y = conv1(nn.relu(self.norm(name="norm1")(x)))
            return shortcut + conv2(nn.relu(self.norm(name="norm2")(y)))
        y = nn.relu(self.norm(name="norm1")(conv1(x)))
        return nn.relu(shortcut + self.norm(name="norm2")(conv2(y)))


class CifarResNet(nn.Module):
    """6 n + 2 layers in three stages of n blocks, on images of 32 x 32 or 28 x 28.

    Attributes:
      depth: 6 n + 2: 20, 32, 44, 56, 110.
      classes: logits.
      preactivation: v2: normalisation and ReLU before each convolution.
      features: of the first stage.
      dtype: of the computation; parameters are float32 in any case.
    """

    depth: int = 20
    classes: int = 10
    preactivation: bool = False
    features: int = 16
    dtype: Any = None

    def __post_init__(self):
        if self.depth < 8 or (self.depth - 2) % 6:
            raise BadInput(f"depth is {self.depth}: it must be 6 n + 2, like 20, 32, 44, 56, 110")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, C) -> logits (B, classes)."""
        norm = partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        x = conv(self.features, 3, dtype=self.dtype, name="conv1")(x)  # (B, H, W, 16)
        if not self.preactivation:
            x = nn.relu(norm(name="norm1")(x))
        for i in (1, 2, 3):
            for j in range((self.depth - 2) // 6):
                stride = 2 if i > 1 and j == 0 else 1
                x = CifarBlock(
                    self.features * 2 ** (i - 1), stride, self.preactivation, norm, self.dtype,
                    name=f"layer{i}_{j}",
                )(x)  # fmt: skip
        if self.preactivation:
            x = nn.relu(norm(name="norm1")(x))
        x = x.mean((1, 2))  # (B, 64)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)


# ---- Weights of PyTorch ------------------------------------------------------------------------


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"params", "batch_stats"} from torchvision's names ("layer1.0.conv1.weight"), or those of
    the usual CIFAR ResNets of PyTorch.

    Args:
      state: {name: array}, as ``safetensors.numpy.load_file`` reads it; a leading "module." is
        left out.

    Raises:
      BadInput: a name that no ResNet has, or no arrays at all.
    """
    out: dict[str, Any] = {}
    for name, value in state.items():
        *path, last = name.removeprefix("module.").split(".")
        if last == "num_batches_tracked":
            continue
        at = "/".join(path).replace("downsample/0", "shortcut_conv")
        at = at.replace("downsample/1", "shortcut_norm").replace("bn", "norm")
        at = re.sub(r"^(fc|linear)$", "head", re.sub(r"^(layer\d)/(\d+)", r"\1_\2", at))
        if not re.fullmatch(r"(conv|norm)1|head|layer\d_\d+/\w+", at):
            raise BadInput(f"{name} is no name of torchvision's ResNets: take off what precedes it")
        collection, leaf, value = torch.convert(last, np.asarray(value))
        place = out.setdefault(collection, {})
        for part in at.split("/"):
            place = place.setdefault(part, {})
        place[leaf] = value
    if not out:
        raise BadInput("no arrays are given: read them with safetensors.numpy.load_file")
    return out
