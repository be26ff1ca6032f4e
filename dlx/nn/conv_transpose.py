"""Transposed convolution: `flax.linen.ConvTranspose` in forms that XLA compiles well on a CPU.

Reverse mode works to any order, and vmap; forward mode does not (jax.custom_vjp): `nn.plain()`.

Symbols: x (B, h.., I) input, k (K.., I, O) kernel, y (B, H.., O) output, s strides. In one
dimension

    y[p] = sum over i and t with p + t = s i + low of x[i] k[t]

that is, x with s - 1 zeros between its values, padded by low and high, convolved with k.
"""

from __future__ import annotations

import itertools
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax.linen.linear import canonicalize_padding
from jax import lax

from dlx.nn.conv import LAYOUTS, Pads, Sizes, kernel_gradient
from dlx.nn.lowering import fits, inherited, on_cpu
from dlx.nn.products import product


def conv_transpose(
    x: jax.Array,
    k: jax.Array,
    strides: Sizes,
    padding: Pads,
    dilation: Sizes,
    precision: Any = None,
) -> jax.Array:
    """(B, h.., I) and (K.., I, O) -> (B, H.., O); flax's is one convolution of the dilated x.

    Args:
      padding: (low, high) of each dimension.
      dilation: of the kernel.
    """
    n = len(strides)
    alone = all(size == 1 for size in x.shape[1:-1])
    overlap = any(s < K for K, s in zip(k.shape, strides, strict=False)) and not alone
    zeros = set(dilation) == {1} and (alone or set(strides) != {1})

    def plain(x: jax.Array, k: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, k, (1,) * n, padding, strides, dilation, LAYOUTS[n], precision=precision
        )

    def forward(x: jax.Array, k: jax.Array) -> jax.Array:
        return _subpixel(x, k, strides, padding, precision) if zeros else plain(x, k)

    def plain_backward(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(plain, x, k)[1](dy)

    def backward(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        if zeros and not overlap:  # two products
            return jax.vjp(forward, x, k)[1](dy)
        return _backward(x, k, dy, strides, padding, dilation, precision)

    if n not in LAYOUTS or not fits(x, k):
        return plain(x, k)
    conv = jax.custom_vjp(lambda x, k: on_cpu(forward, plain, x, k))
    conv.defvjp(
        lambda x, k: (conv(x, k), (x, k)),
        lambda saved, dy: on_cpu(backward, plain_backward, *saved, dy),
    )
    return conv(x, k)


def _subpixel(x: jax.Array, k: jax.Array, strides: Sizes, padding: Pads, precision: Any):
    """The forward pass without the zeros between the values of x.

    Outputs s m + r (phase r = 0 .. s - 1 of block m) are a convolution of x itself with every s-th
    value of the kernel: all phases are one convolution with s^n O outputs and ceil(K / s) places,
    whose channels then become places. Where kernels do not overlap (K <= s, or a single value
    of x as in the first layer of a DCGAN) it is a matrix product.
    """
    B, *sizes, I = x.shape  # noqa: E741
    *kernel, _, O = k.shape  # noqa: E741
    n = len(sizes)
    pads, front, blocks, phases, cuts = [], [], [], [], []
    for h, K, s, (low, high) in zip(sizes, kernel, strides, padding, strict=True):
        H = (h - 1) * s + 1 + low + high - (K - 1)
        s = K if h == 1 else s  # any stride of a single value is the same
        places, first = -(-K // s), K - 1 - low  # first: of the whole result, what padding keeps
        start, stop = first // s, -(-(first + H) // s)  # blocks that hold the outputs
        pads.append((places - 1 - start, stop - h))
        front.append((places * s - K, 0))
        blocks.append(places)
        phases.append(s)
        cuts.append(slice(first - start * s, first - start * s + H))
    # (K.., I, O) -> (J.., I, s.., O): at place j phase r has k[s j + s - 1 - r - (J s - K)].
    k = jnp.pad(k, (*front, (0, 0), (0, 0)))
    k = k.reshape(*itertools.chain(*zip(blocks, phases, strict=True)), I, O)
    k = jnp.flip(k, tuple(range(1, 2 * n, 2)))
    k = k.transpose(*range(0, 2 * n, 2), 2 * n, *range(1, 2 * n, 2), 2 * n + 1)
    k = k.reshape(*blocks, I, -1)
    if set(blocks) == {1}:
        x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))
        y = product(x.reshape(-1, I), k.reshape(I, -1), precision).reshape(*x.shape[:-1], -1)
    else:
        y = lax.conv_general_dilated(
            x, k, (1,) * n, pads, dimension_numbers=LAYOUTS[n], precision=precision
        )
    sizes = y.shape[1:-1]
    y = y.reshape(B, *sizes, *phases, O)  # (B, M.., s.., O)
    order = itertools.chain(*((i, n + i) for i in range(1, n + 1)))
    y = y.transpose(0, *order, 2 * n + 1)  # (B, M, s, .., O)
    y = y.reshape(B, *(m * s for m, s in zip(sizes, phases, strict=True)), O)
    return y[:, *cuts]  # (B, H.., O)


def _backward(
    x: jax.Array, k: jax.Array, dy: jax.Array, strides: Sizes, padding: Pads, dilation: Sizes,
    precision: Any,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The transpose of a transposed convolution is a strided one, with the kernel turned round:

        dx[i] = sum over t of k[t]^T dy[s i + low - t]
        dk[t] = sum over i of x[i] dy[s i + low - t]^T

    The first is a convolution as XLA's CPU library has them (NHWC, HWIO), the second the kernel's
    gradient of one from y to x. Left to itself XLA makes that a loop over single numbers, and
    within lax.scan any that is not written so: 70 % of the step of a convolutional autoencoder.
    The barrier keeps what made the operands out of the convolutions' strided reads. The products
    of `kernel_gradient` for 128 to 64 channels, 4 x 4, 128 images of 7 x 7: 24 -> 16 ms.
    """
    n = len(strides)
    pads = []
    for h, H, K, s, d, (low, _) in zip(
        x.shape[1:-1], dy.shape[1:-1], k.shape, strides, dilation, padding, strict=False
    ):
        extent = (K - 1) * d + 1
        before = extent - 1 - low
        pads.append((before, (h - 1) * s + extent - H - before))
    x, dy = lax.optimization_barrier((x, dy))
    turned = jnp.flip(k, tuple(range(n))).swapaxes(n, n + 1)  # (K.., O, I)
    dx = lax.conv_general_dilated(
        dy, turned, strides, pads, None, dilation, LAYOUTS[n], precision=precision
    )
    dk = kernel_gradient(dy, x, k.shape[:n], strides, tuple(pads), dilation)  # (K.., O, I)
    return dx, jnp.flip(dk, tuple(range(n))).swapaxes(n, n + 1)


class ConvTranspose(linen.ConvTranspose):
    """`flax.linen.ConvTranspose` on `conv_transpose` of this file.

    padding="CIRCULAR", a preferred_element_type and more than three dimensions are left to flax.
    """

    @linen.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """(batch.., h.., I) -> (batch.., H.., features)."""
        size = self.kernel_size
        size = (size,) if isinstance(size, int) else tuple(size)
        n = len(size)
        padding = canonicalize_padding(self.padding, n)
        known = padding in ("SAME", "VALID") or not isinstance(padding, str)
        if not known or n not in LAYOUTS or self.preferred_element_type or not fits(inputs):
            return inherited(linen.ConvTranspose)(self, inputs)

        def each(value: Any) -> Sizes:
            return (value or 1,) * n if isinstance(value, int | None) else tuple(value)

        strides, dilation = each(self.strides), each(self.kernel_dilation)
        channels = inputs.shape[-1], self.features
        shape = size + (channels[::-1] if self.transpose_kernel else channels)
        if self.mask is not None and self.mask.shape != shape:
            raise ValueError(f"mask of shape {self.mask.shape}: the kernel's is {shape}")
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.mask is not None:
            kernel *= self.mask
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        x, kernel, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        assert x is not None and kernel is not None
        if self.transpose_kernel:
            kernel = jnp.flip(kernel, tuple(range(n))).swapaxes(n, n + 1)
        if isinstance(padding, str):
            padding = [
                _pads(padding, K, s, d) for K, s, d in zip(size, strides, dilation, strict=True)
            ]
        batch = x.shape[: -n - 1]
        x = x.reshape(-1, *x.shape[-n - 1 :])  # (B, h.., I)
        y = conv_transpose(x, kernel, strides, tuple(padding), dilation, self.precision)
        if bias is not None:
            y += bias.reshape((1,) * (n + 1) + (-1,))
        return y.reshape(*batch, *y.shape[1:])


def _pads(padding: str, K: int, s: int, d: int) -> tuple[int, int]:
    """(low, high) of the dilated input by name: "SAME" gives s h outputs, "VALID" whatever the
    kernel touches (and s - K zeros behind it where the stride is larger)."""
    extent = (K - 1) * d + 1
    if padding == "VALID":
        return extent - 1, s - 1 + max(extent - s, 0)
    low = extent - 1 if s > extent - 1 else -(-(extent + s - 2) // 2)
    return low, extent + s - 2 - low
