"""Image augmentation within the compiled step: pure functions of (key, images)."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def affine(
    key: jax.Array, images: jax.Array, *, degrees: float, scale: float, shift: float
) -> jax.Array:
    """A random rotation, stretch, shear and shift for each image, bilinear, zero outside.

    Args:
      key: PRNG key.
      images: (B, H, W, C).
      degrees: rotation, uniform in +- degrees.
      scale: log of the stretch along either axis, and the shear, uniform in +- scale.
      shift: pixels along either axis, uniform in +- shift.

    >>> x = jnp.ones((2, 8, 8, 1))
    >>> float(jnp.abs(affine(jax.random.key(0), x, degrees=0, scale=0, shift=0) - x).max())
    0.0
    """
    B, H, W, _ = images.shape

    def uniform(key, shape, limit):
        return jax.random.uniform(key, shape, images.dtype, -limit, limit)

    def axis(size):
        return jnp.arange(size, dtype=images.dtype)

    k = jax.random.split(key, 4)
    angle = uniform(k[0], (B, 1), degrees) * (jnp.pi / 180)
    stretch = jnp.exp(uniform(k[1], (B, 2), scale))
    shear = uniform(k[2], (B, 1), scale)
    offset = uniform(k[3], (B, 2), shift)
    y, x = jnp.meshgrid(axis(H) - (H - 1) / 2, axis(W) - (W - 1) / 2, indexing="ij")
    y, x = stretch[:, :1] * y.reshape(1, -1), stretch[:, 1:] * x.reshape(1, -1)  # (B, H W)
    y = y + shear * x
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    y, x = cos * y - sin * x, sin * y + cos * x
    y, x = y + offset[:, :1] + (H - 1) / 2, x + offset[:, 1:] + (W - 1) / 2
    # Bilinear interpolation as two products with hat functions: dense, and fast at small sizes.
    wy = jnp.maximum(0, 1 - jnp.abs(y[..., None] - axis(H).reshape(1, 1, H)))  # (B, H W, H)
    wx = jnp.maximum(0, 1 - jnp.abs(x[..., None] - axis(W).reshape(1, 1, W)))  # (B, H W, W)
    out = jnp.einsum("bph,bhwc,bpw->bpc", wy, images, wx)  # (B, H W, C)
    return out.reshape(images.shape)
