"""The multi-layer perceptron.

D. Rumelhart, G. Hinton, R. Williams, "Learning representations by back-propagating errors",
Nature 1986: layers of units between input and output, whose weights the chain rule reaches.

    h_0 = x,    h_l = relu(W_l h_{l-1} + b_l),    logits = W_L h_{L-1} + b_L

ReLU and dropout (N. Srivastava et al., 2014) in place of the paper's sigmoid units.

Symbols: B batch, C classes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dlx import nn


class MLP(nn.Module):
    """Fully connected layers, each followed by ReLU and dropout, and a linear classifier.

    Attributes:
      features: units of each hidden layer.
      classes: logits.
      dropout: rate after each hidden layer.
      dtype: of the computation; parameters are float32 in any case.
    """

    features: tuple[int, ...] = (512, 512)
    classes: int = 10
    dropout: float = 0.0
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, ...) -> logits (B, C)."""
        x = x.reshape(x.shape[0], -1)  # (B, D)
        for i, width in enumerate(self.features, 1):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"dense{i}")(x))  # (B, width)
            x = nn.Dropout(self.dropout, deterministic=not train, name=f"dropout{i}")(x)
        return nn.Dense(self.classes, dtype=self.dtype, name="head")(x)  # (B, C)
