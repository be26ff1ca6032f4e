"""Convolution and pooling whose gradients XLA compiles well on a CPU; elsewhere the plain ones.

The numbers are those of `jax.lax` and flax. Reverse mode works to any order; forward mode does not
(jax.custom_vjp).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

MANY = 64 * 256  # input times output channels; below, XLA's own kernel gradient is as fast


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **kwargs: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for ``nn.Conv(conv_general_dilated=...)``.

    In the backward pass on a CPU a barrier stands before the operands: without it XLA recomputes
    what made them (normalisation, ReLU) within the strided reads of the gradient's convolutions.
    1.4 times faster for three layers of 24 to 64 channels on 8 x 8 images.

    Where channels are many (`MANY`), the kernel's gradient is a matrix product for each of its
    places: 1.3 to 5 times faster than XLA's, which convolves with the whole image as the window.
    """

    def plain(x: jax.Array, k: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, k, window_strides, padding, **kwargs)

    def backward(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(plain, x, k)[1](dy)

    def barred(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        x, k, dy = jax.lax.optimization_barrier((x, k, dy))
        if not products:
            return backward(x, k, dy)
        (dx,) = jax.vjp(lambda x: plain(x, k), x)[1](dy)
        return dx, _kernel_gradient(x, k, dy, padding)

    products = (
        lhs.ndim == 4
        and rhs.shape[2] * rhs.shape[3] >= MANY
        and tuple(window_strides) == (1, 1)
        and kwargs.get("feature_group_count", 1) == 1
        and all(set(kwargs.get(f"{side}_dilation") or (1,)) == {1} for side in ("lhs", "rhs"))
        and rhs.shape[:2] != (1, 1)
    )
    conv = jax.custom_vjp(plain)
    conv.defvjp(
        lambda x, k: (plain(x, k), (x, k)),
        lambda saved, dy: jax.lax.platform_dependent(*saved, dy, cpu=barred, default=backward),
    )
    return conv(lhs, rhs)


def _kernel_gradient(x: jax.Array, k: jax.Array, dy: jax.Array, padding: Any) -> jax.Array:
    """dk[i, j] = sum over b, h, w of x[b, h + i, w + j]^T dy[b, h, w]; layouts NHWC and HWIO."""
    (h, w, I, O), (_, H, W, _) = k.shape, dy.shape  # noqa: E741
    pads = padding
    if isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (h, w), (1, 1), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    flat = dy.reshape(-1, O)  # (B H W, O)
    places = [x[:, i : i + H, j : j + W].reshape(-1, I) for i in range(h) for j in range(w)]
    return jnp.stack([place.T @ flat for place in places]).reshape(k.shape)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Phi(x), by the error function.

    On a CPU its gradient is computed once, behind a barrier: XLA would put the exponential and
    the error function into each of the reductions of the normalisation before it. 1.2 times
    faster for the whole of a network of six convolutions.
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_gradient(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    def plain(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), x)[1](dy)[0]

    def barred(x: jax.Array, dy: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(plain(x, dy))

    return (jax.lax.platform_dependent(x, dy, cpu=barred, default=plain),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_gradient)


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
