"""The network of airbench: CIFAR-10 to 94 % within ten epochs.

K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv 2404.00498. Section 3: a first
convolution of 2 x 2 that whitens patches and is never trained; three blocks, wide and shallow;
normalisation with a trained shift but no scale; a logit scale of 1/9; convolutions that begin as
the identity (section 3.3).

    patches p in R^12 of the training images,  E[p p^T] = sum_i lambda_i v_i v_i^T
    filters +- v_i / sqrt(lambda_i + eps)                                        (section 3.2)

Symbols: B batch, H and W height and width, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlx import nn


def whitening(images: jax.Array, eps: float = 5e-4) -> jax.Array:
    """(B, H, W, 3) -> (2, 2, 3, 24): filters whose responses are uncorrelated, each with its
    negative."""
    _, H, W, C = images.shape
    corners = [images[:, i : H - 1 + i, j : W - 1 + j] for i in (0, 1) for j in (0, 1)]
    p = jnp.stack(corners, 3).reshape(-1, 4 * C)  # (B (H - 1) (W - 1), 12)
    values, v = jnp.linalg.eigh(p.T @ p / p.shape[0])  # (12,), (12, 12) in columns
    # Of either sign v is an eigenvector: without a choice rounding could swap filter and negative.
    v = v * jnp.where(jnp.arange(1, 4 * C + 1, dtype=v.dtype) @ v < 0, -1.0, 1.0).reshape(1, -1)
    filters = (v / jnp.sqrt(values + eps).reshape(1, -1)).reshape(2, 2, C, 4 * C)
    return jnp.concatenate([filters, -filters], -1)


def identity_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """(h, w, I, O) kernel: output i is input i for i < I, the others are uniform in
    +- 1 / sqrt(fan in), torch's default."""
    h, w, I, O = shape  # noqa: E741
    bound = 1 / np.sqrt(h * w * I)
    kernel = jax.random.uniform(key, shape, dtype, -bound, bound)
    identity = np.zeros((h, w, I, min(I, O)))
    identity[h // 2, w // 2] = np.eye(I, min(I, O))
    return kernel.at[..., : min(I, O)].set(jnp.asarray(identity, dtype))


class Block(nn.Module):
    """Convolution, maximum, norm, GELU; convolution, norm, GELU."""

    features: int
    train: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(B, H, W, C) -> (B, H // 2, W // 2, features)."""
        conv = partial(nn.Conv, self.features, (3, 3), use_bias=False, dtype=self.dtype,
                       kernel_init=identity_init)  # fmt: skip
        norm = partial(nn.BatchNorm, not self.train, momentum=0.6, epsilon=1e-12, use_scale=False,
                       dtype=self.dtype)  # fmt: skip
        x = nn.max_pool(conv(name="conv1")(x), (2, 2), (2, 2))  # (B, H // 2, W // 2, features)
        gelu = partial(nn.gelu, approximate=False)
        x = gelu(norm(name="norm1")(x))
        return gelu(norm(name="norm2")(conv(name="conv2")(x)))


class Airbench(nn.Module):
    """The network; its whitening filters are the variable "whitening/kernel", zero at first.

    Attributes:
      widths: features of the three blocks.
      classes: logits.
      dtype: of the computation; parameters are float32 in any case.
    """

    widths: tuple[int, int, int] = (64, 256, 256)
    classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, 32, 32, 3) -> logits (B, classes)."""
        filters = self.variable("whitening", "kernel", jnp.zeros, (2, 2, 3, 24))
        bias = self.param("bias", nn.initializers.zeros, (24,))
        dimensions = ("NHWC", "HWIO", "NHWC")
        kernel, bias = filters.value.astype(x.dtype), bias.astype(x.dtype)
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=dimensions)
        x = nn.gelu(x + bias.reshape(1, 1, 1, -1), approximate=False)  # (B, 31, 31, 24)
        for i, width in enumerate(self.widths, 1):  # (B, 15, 15, 64), (B, 7, 7, 256)
            x = Block(width, train, self.dtype, name=f"block{i}")(x)  # (B, 3, 3, 256)
        x = x.max((1, 2))  # (B, 256)
        x = nn.Dense(self.classes, use_bias=False, dtype=self.dtype, name="head")(x)
        return x / 9  # (B, classes)
