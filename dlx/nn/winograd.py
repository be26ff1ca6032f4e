"""Winograd's form of a convolution of 3 x 3 with many channels.

For what is compiled for a CPU alone, as `dlx.nn.conv` uses it. Symbols as there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dlx.nn.products import Pads, Sizes, at_a_time, side_by_side

MANY, ROWS = 128, 64  # channels, rows of a product that are worth the sums


def at_once(x: jax.Array, k: tuple[int, ...], s: Sizes, pads: Pads) -> int:
    """Images that `conv` takes at a time; 0 where it does not pay."""
    if k[:2] != (3, 3) or s != (1, 1) or min(k[2:]) < MANY or min(pads[0] + pads[1]) < 0:
        return 0
    H, W = (size + sum(pad) - 2 for size, pad in zip(x.shape[1:3], pads, strict=True))
    rows = -(-H // 4) * W  # of a product, an image
    few = at_a_time(x, 58 * rows * k[2])  # 14 copies and a half, in float32
    return few if few * rows >= ROWS else 0


# Winograd's F(4, 3): Y = A (B x * G k) makes four values from six by six products, not twelve.
B4 = np.array([
    [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
])  # fmt: skip
G4 = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
A4 = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])


@functools.partial(jax.jit, static_argnums=(2, 3))
def conv(x: jax.Array, k: jax.Array, pads: Pads, few: int) -> jax.Array:
    """3 x 3, many channels: four rows of y at once from six of x, with half the products.

    A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308,
    section 4, along the column alone: both ways would save more products, and lose it to more
    sums and more to compile. A digit of float32 is lost at most.

    64 images: 512 channels at 4 x 4, 48 -> 13 ms; 256 at 8 x 8, 26 -> 14; 128 at 16 x 16, 19 ->
    15; 8 images: 512 at 7 x 7, 21 -> 12 ms; 256 at 14 x 14, 13 -> 9. The input's gradient is one
    more of these. ResNet-18's step, 64 images of 32 x 32: 1.90 -> 1.65 s, and 5.0 -> 6.1 s to
    compile, where flax takes 3.1. 64 channels as well: no faster. The kernel's gradient by the same
    means was slower than `_rows_by_columns`.
    """
    B, (C, O) = x.shape[0], k.shape[2:]  # noqa: E741
    H, W = (size + sum(pad) - 2 for size, pad in zip(x.shape[1:3], pads, strict=True))
    n = -(-H // 4)  # blocks of four rows
    rows = (pads[0][0], 4 * n + 2 - x.shape[1] - pads[0][0])
    G = jnp.asarray(G4, k.dtype) @ k.reshape(3, -1)
    G = G.reshape(6, 3 * C, O)

    def mixed(matrix: np.ndarray, parts: list[jax.Array], axis: int) -> jax.Array:
        """Sums of the parts, a row of the matrix each, on a new axis."""
        shape = [-1 if i == axis else 1 for i in range(parts[0].ndim + 1)]
        columns = jnp.asarray(matrix.T, x.dtype)
        return sum(
            c.reshape(shape) * jnp.expand_dims(p, axis) for c, p in zip(columns, parts, strict=True)
        )  # type: ignore[return-value]

    def part(x: jax.Array) -> jax.Array:
        x = lax.optimization_barrier(jnp.pad(x, ((0, 0), rows, pads[1], (0, 0))))
        x = mixed(B4, [x[:, i : i + 4 * n - 3 : 4] for i in range(6)], 0)
        x = lax.optimization_barrier(x)  # (6, b, n, W + 2, C)
        x = side_by_side([x[:, :, :, j : j + W] for j in range(3)])
        x = lax.optimization_barrier(x).reshape(6, -1, 3 * C)
        y = lax.optimization_barrier(jnp.einsum("ipc,ico->ipo", x, G))
        y = mixed(A4, list(y.reshape(6, -1, n, W, O)), 2)  # (b, n, 4, W, O)
        return y.reshape(-1, 4 * n, W, O)[:, :H]

    if few == B:
        return part(x)
    y = lax.map(part, x.reshape(B // few, few, *x.shape[1:]))
    return y.reshape(B, *y.shape[2:])
