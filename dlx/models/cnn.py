"""Convolutional networks.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document
Recognition", Proceedings of the IEEE, 1998: local receptive fields, shared weights and
subsampling, so that what is learnt in one place of an image serves everywhere.

`SmallCNN` keeps that layout and takes what came after: ReLU, batch normalisation (S. Ioffe and
C. Szegedy, 2015) in place of the biases, maximum pooling, dropout before the classifier.

Symbols: B batch, H and W height and width, C channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlx.nn.conv import conv_general_dilated, max_pool

conv = partial(nn.Conv, use_bias=False, conv_general_dilated=conv_general_dilated)


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
        layers = zip(self.channels, self.pool, paddings, strict=True)
        for i, (channels, pool, padding) in enumerate(layers, 1):  # (B, H, W, channels)
            x = conv(channels, (3, 3), padding=padding, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.relu(x)
            x = max_pool(x) if pool else x  # (B, H/2, W/2, channels)
        x = x.reshape(x.shape[0], -1)  # (B, H W C)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)  # (B, classes)
