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

    def axis(size):
        return jnp.arange(size, dtype=images.dtype)

    u = jax.random.uniform(key, (B, 6), images.dtype, -1, 1)  # one draw: each takes a CPU .1 ms
    angle = u[:, :1] * (degrees * jnp.pi / 180)
    stretch = jnp.exp(u[:, 1:3] * scale)
    shear = u[:, 3:4] * scale
    offset = u[:, 4:] * shift
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
