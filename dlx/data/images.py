"""Image augmentation within the compiled step: pure functions of (key, images)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dlx.errors import BadInput


def normalise(
    images: jax.Array, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
) -> jax.Array:
    """Bytes (B, H, W, C) -> float32 (x / 255 - mean) / std, of each channel or of all.

    >>> normalise(jnp.full((1, 1, 1, 3), 255, jnp.uint8), (0.5,), (0.25,)).tolist()
    [[[[2.0, 2.0, 2.0]]]]
    """
    x = images.astype(jnp.float32) / 255
    return (x - jnp.array(mean).reshape(1, 1, 1, -1)) / jnp.array(std).reshape(1, 1, 1, -1)


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

    Raises:
      BadInput: images of less than 2 x 2 pixels.

    >>> x = jnp.ones((2, 8, 8, 1))
    >>> float(jnp.abs(affine(jax.random.key(0), x, degrees=0, scale=0, shift=0) - x).max())
    0.0
    """
    B, H, W, C = images.shape
    if H < 2 or W < 2:
        raise BadInput(f"affine: images of {H} x {W} pixels: at least 2 x 2 are needed")
    accurate = jnp.float64 if images.dtype == jnp.float64 else jnp.float32
    # One draw, and flat: a CPU takes .09 ms, not .01, where the last of its dimensions is 6 long.
    u = jax.random.uniform(key, (B * 6,), accurate, -1, 1).reshape(B, 6)
    angle, shear = u[:, 0] * (degrees * jnp.pi / 180), u[:, 3] * scale
    tall, wide = jnp.exp(u[:, 1] * scale), jnp.exp(u[:, 2] * scale)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    # Where in the image a pixel comes from, of its y and x from the middle: stretched, sheared
    # along y, rotated, shifted. The barrier is for a CPU: without it all of it is computed anew
    # for every pixel.
    to_y = cos * tall, (cos * shear - sin) * wide, u[:, 4] * shift + (H - 1) / 2
    to_x = sin * tall, (sin * shear + cos) * wide, u[:, 5] * shift + (W - 1) / 2
    maps = jax.lax.optimization_barrier(jnp.stack([*to_y, *to_x]))[..., None]  # (6, B, 1)
    y, x = np.indices((H, W)).reshape(2, 1, -1)  # NumPy's: XLA would compute them each time
    y = jnp.asarray(y - (H - 1) / 2, accurate)  # (1, H W)
    x = jnp.asarray(x - (W - 1) / 2, accurate)
    y, x = maps[0] * y + maps[1] * x + maps[2], maps[3] * y + maps[4] * x + maps[5]  # (B, H W)
    # Bilinear interpolation between four pixels, each with the share max(0, 1 - distance) along
    # either axis: so where it comes from beyond the image, it fades to zero within a pixel.
    top = jnp.clip(y, 0, H - 2).astype(jnp.int32)
    left = jnp.clip(x, 0, W - 2).astype(jnp.int32)
    down, right = y - top.astype(y.dtype), x - left.astype(x.dtype)
    # On a CPU the gathers are all that XLA does not vectorise. So they stand alone, behind a
    # barrier, and a pixel and the one to its right are a number, real and imaginary: two gathers
    # in place of four. 128 images of 28 x 28: .92 -> .65 ms, of 32 x 32 in colour 4.3 -> 1.7 (2
    # cores of an AMD EPYC).
    place, down, right = jax.lax.optimization_barrier((top * W + left, down, right))
    pixels = images.astype(accurate).reshape(B, H * W, C)
    beside = jax.lax.pad(pixels, jnp.zeros((), accurate), ((0, 0, 0), (-1, 1, 0), (0, 0, 0)))
    pairs = jax.lax.optimization_barrier(jax.lax.complex(pixels, beside))
    take = jax.vmap(lambda pairs, i: pairs.at[i].get(mode="promise_in_bounds"))

    def share(distance: jax.Array) -> jax.Array:
        return jnp.maximum(0, 1 - jnp.abs(distance))[..., None]  # (B, H W, 1)

    def between(pair: jax.Array) -> jax.Array:
        return share(right) * pair.real + share(right - 1) * pair.imag  # (B, H W, C)

    above, below = between(take(pairs, place)), between(take(pairs, place + W))
    out = share(down) * above + share(down - 1) * below
    # A convolution that reads it would compute it anew for each of its taps: on a CPU a step of
    # LeNet-5 then takes 19.4 ms instead of 13.1. The barrier is before the last reshape, or XLA
    # lays one channel out in another way and copies it.
    out = jax.lax.optimization_barrier(out.astype(images.dtype).reshape(B, -1))
    return out.reshape(images.shape)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Each image mirrored left to right with probability 1/2. (B, H, W, C) -> the same."""
    chosen = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def crop(key: jax.Array, images: jax.Array, pad: int, mode: str = "constant") -> jax.Array:
    """Each image padded by `pad` pixels and cropped to its size at a random place.

    Args:
      key: PRNG key.
      images: (B, H, W, C).
      pad: pixels on every side; the shift is uniform in +- pad along either axis.
      mode: what the border holds: "constant" is zeros, "reflect" the image mirrored.
    """
    B, H, W, C = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode)
    corners = jax.random.randint(key, (B, 2), 0, 2 * pad + 1)

    def window(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (H, W, C))

    return jax.vmap(window)(padded, corners)


def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """A square of `size` pixels set to zero in each image, its centre anywhere.

    T. DeVries, G. Taylor, arXiv 1708.04552: near the border less than the square is cut out.
    """
    B, H, W, _ = images.shape
    centre = jax.random.randint(key, (B, 2), 0, jnp.array([[H, W]]))

    def within(length: int, axis: int) -> jax.Array:
        first = centre[:, axis : axis + 1] - size // 2
        place = jnp.arange(length).reshape(1, -1)
        return (place >= first) & (place < first + size)  # (B, length)

    hole = within(H, 0)[:, :, None] & within(W, 1)[:, None, :]  # (B, H, W)
    return jnp.where(hole[..., None], jnp.zeros_like(images), images)


def mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Each image mixed with another of the batch, their targets in the same proportion.

    H. Zhang et al., arXiv 1710.09412: lambda ~ Beta(alpha, alpha), one for each image.

    Args:
      key: PRNG key.
      images: (B, H, W, C).
      targets: (B, classes) probabilities.
      alpha: 0 mixes nothing; 1 mixes uniformly.

    Raises:
      BadInput: alpha is below 0.
    """
    if alpha < 0:
        raise BadInput(f"alpha is {alpha}: give 0, which mixes nothing, or more")
    if not alpha:
        return images, targets
    draw, order = jax.random.split(key)
    share = jax.random.beta(draw, alpha, alpha, (images.shape[0], 1), images.dtype)
    other = jax.random.permutation(order, images.shape[0])
    by = share[:, :, None, None]
    return by * images + (1 - by) * images[other], share * targets + (1 - share) * targets[other]
