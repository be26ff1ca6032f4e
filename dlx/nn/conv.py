"""Convolution and pooling whose gradients XLA compiles well on a CPU; elsewhere the plain ones.

The numbers are those of `jax.lax` and flax. Reverse mode works to any order; forward mode does not
(jax.custom_vjp).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for ``nn.Conv(conv_general_dilated=...)``.

    In the backward pass a barrier stands before the operands: without it XLA's CPU compiler
    recomputes what made them (normalisation, ReLU) within the strided reads of the gradient's
    convolutions. 1.4 times faster for three layers of 24 to 64 channels on 8 x 8 images.
    """

    def plain(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, k, *args, **kwargs)

    def backward(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(plain, x, k)[1](dy)

    def barred(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        return backward(*jax.lax.optimization_barrier((x, k, dy)))

    conv = jax.custom_vjp(plain)
    conv.defvjp(
        lambda x, k: (plain(x, k), (x, k)),
        lambda saved, dy: jax.lax.platform_dependent(*saved, dy, cpu=barred, default=backward),
    )
    return conv(lhs, rhs)


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
    """2 x 2 maximum with stride 2: (B, H, W, C) -> (B, H // 2, W // 2, C).

    An odd last row or column is left out, as without padding. Of equal values the first gets the
    gradient, as in flax and torch. The gradient compares the four values once more: XLA's own, a
    search for each place, takes twice as long on a CPU. It does not compare with the maximum, for
    XLA may have made that from values rounded otherwise: then none would be equal.
    """
    return _fields(x).max((2, 4))


def _fields(x: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    return x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)


def _forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return max_pool(x), x


def _backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    B, H, W, C = x.shape
    fields = _fields(x)
    a, b, c, d = (fields[:, :, i, :, j] for i in range(2) for j in range(2))
    left, right = a >= b, c >= d
    top = jnp.where(left, a, b) >= jnp.where(right, c, d)
    chosen = (top & left, top & ~left, ~top & right, ~top & ~right)  # one of them, always
    da, db, dc, dd = (jnp.where(one, dy, jnp.zeros_like(dy)) for one in chosen)
    rows = [jnp.stack([da, db], 3), jnp.stack([dc, dd], 3)]  # (B, H/2, W/2, 2, C) each
    dx = jnp.stack(rows, 2).reshape(B, H // 2 * 2, W // 2 * 2, C)
    return (jnp.pad(dx, ((0, 0), (0, H % 2), (0, W % 2), (0, 0))),)


max_pool.defvjp(_forward, _backward)
