"""Convolution: `flax.linen.Conv` with forms that XLA compiles well on a CPU.

XLA's CPU backend computes a convolution itself well, at two thirds of a matrix product's speed, but
its gradient for the kernel at a tenth to a third, and one with fewer than 16 outputs at less still.
What is written here as matrix products instead is told at each form, with what it gains (2 cores
of an Intel Xeon at 2.5 GHz, float32, jax 0.12). Of lines (B, W, C) and dilated kernels the
gradients alone are written anew; volumes and groups are left to XLA. Forms are jitted, so that
layers of one shape are traced once.

Reverse mode works to any order, and vmap; forward mode does not (jax.custom_vjp): `nn.plain()`.

Symbols: x (B, H, W, C), k (h, w, C, O), y (B, H', W', O), s strides, d dilation of the kernel, pads
of zeros at each side.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
from jax import lax

from dlx.nn import winograd
from dlx.nn.lowering import fits, on_cpu
from dlx.nn.products import EXACT, Pads, Pair, Sizes, at_a_time, over_rows, product, side_by_side

LAYOUT = ("NHWC", "HWIO", "NHWC")
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: LAYOUT, 3: ("NDHWC", "DHWIO", "NDHWC")}
FEW = 16  # output channels: a vector of float32


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Any, padding: Any, **kwargs: Any
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, for ``nn.Conv(conv_general_dilated=...)``."""

    def plain(x: jax.Array, k: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, k, window_strides, padding, **kwargs)

    def plain_backward(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(plain, x, k)[1](dy)

    if not fits(lhs, rhs):
        return plain(lhs, rhs)
    n = lhs.ndim - 2
    d = tuple(kwargs.get("rhs_dilation") or (1,) * n)
    ordinary = (
        n in (1, 2)
        and lhs.dtype in EXACT
        and kwargs.get("feature_group_count", 1) == kwargs.get("batch_group_count", 1) == 1
        and set(kwargs.get("lhs_dilation") or (1,)) == {1}
        and kwargs.get("precision") is kwargs.get("preferred_element_type") is None
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, kwargs.get("dimension_numbers"))
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUTS[n])
    )
    forward, s, pads = plain, (1,) * n, ((0, 0),) * n
    if ordinary:
        seen = tuple((size - 1) * step + 1 for size, step in zip(rhs.shape[:n], d, strict=True))
        if isinstance(padding, str):
            padding = lax.padtype_to_pads(lhs.shape[1:-1], seen, window_strides, padding)
        s = tuple(int(step) for step in window_strides)
        pads = tuple((int(low), int(high)) for low, high in padding)
        ordinary = (
            min(map(min, pads)) >= 0
            and all(  # or there is no output
                size + sum(pad) >= window
                for size, pad, window in zip(lhs.shape[1:-1], pads, seen, strict=True)
            )
        )
    image = ordinary and n == 2 and set(d) == {1}
    places = jax.eval_shape(plain, lhs, rhs).size // rhs.shape[-1] if image else 0  # B H' W'
    if ordinary and set(rhs.shape[:n]) == {1} and not any(map(any, pads)):

        def forward(x: jax.Array, k: jax.Array) -> jax.Array:
            return _pointwise(x, k, s)
    elif image and rhs.shape[2] <= FEW > rhs.shape[3]:

        def forward(x: jax.Array, k: jax.Array) -> jax.Array:
            return _banded(x, k, s, pads)
    elif image and (few := winograd.at_once(lhs, rhs.shape, s, pads)):

        def forward(x: jax.Array, k: jax.Array) -> jax.Array:
            return winograd.conv(x, k, pads, few)
    elif image and s != (1, 1) and rhs.size > 512 * places:

        def forward(x: jax.Array, k: jax.Array) -> jax.Array:
            return _columns(x, k, s, pads)

    def backward(x: jax.Array, k: jax.Array, dy: jax.Array) -> Any:
        # Without the barrier XLA recomputes what made them (normalisation, ReLU) at each of the
        # strided reads of the gradients: 1.2 to 1.4 times faster for whole networks.
        x, k, dy = lax.optimization_barrier((x, k, dy))
        if not ordinary:
            return plain_backward(x, k, dy)
        if forward is not plain and not image:
            return jax.vjp(forward, x, k)[1](dy)
        dk = kernel_gradient(x, dy, k.shape[:n], s, pads, d)
        return _input_gradient(x, k, dy, s, pads, d), dk

    conv = jax.custom_vjp(lambda x, k: on_cpu(forward, plain, x, k))
    conv.defvjp(
        lambda x, k: (conv(x, k), (x, k)),
        lambda saved, dy: on_cpu(backward, plain_backward, *saved, dy),
    )
    return conv(lhs, rhs)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _input_gradient(
    x: jax.Array, k: jax.Array, dy: jax.Array, s: Sizes, pads: Pads, d: Sizes
) -> jax.Array:
    """A convolution of dy, spread by the strides, with the turned kernel.

    It is written with the kernel transposed before a barrier: within `lax.scan` XLA compiles
    the transposition within the convolution to a loop that is 16 times slower.
    """
    n, (C, O) = len(s), k.shape[-2:]  # noqa: E741
    image = n == 2 and set(d) == {1}
    if image and k.shape[:2] == (1, 1) and not any(pads[0] + pads[1]):
        return jax.vjp(lambda x: _pointwise(x, k, s), x)[1](dy)[0]
    if image and O <= FEW > C:
        return jax.vjp(lambda x: _banded(x, k, s, pads), x)[1](dy)[0]
    turned = lax.optimization_barrier(lax.rev(k, range(n)).swapaxes(-1, -2))  # (h, w, O, C)
    if image and s != (1, 1) and k.size <= 32 * dy[..., 0].size:
        return _phase_by_phase(dy, turned, x.shape[1:3], s, pads)
    sides = tuple(
        ((size - 1) * apart - low, whole + low - (places - 1) * step - 1)
        for size, apart, whole, places, step, (low, _) in zip(
            k.shape[:n], d, x.shape[1:-1], dy.shape[1:-1], s, pads, strict=True
        )
    )
    if image and (few := winograd.at_once(dy, turned.shape, s, sides)):
        return winograd.conv(dy, turned, sides, few)
    return lax.conv_general_dilated(
        dy, turned, (1,) * n, sides, lhs_dilation=s, rhs_dilation=d, dimension_numbers=LAYOUTS[n]
    )


def _phase_by_phase(
    dy: jax.Array, turned: jax.Array, size: Sizes, s: Sizes, pads: Pads
) -> jax.Array:
    """dx[s m + r] for each r below s: a convolution of dy with every s-th place of the kernel.

    dy is then read as it is, without zeros between its values. 64 to 128 channels, 64 images of
    32 x 32, 3 x 3 with stride 2: 25 -> 15 ms; 16 to 32, 128 images: 11.6 -> 3.9; 128 to 128, 8 of
    56 x 56: 15 -> 10. Not where kernels are larger than images: 256 to 512, 64 images of 8 x 8:
    14 -> 16.
    """
    blocks = tuple(-(-whole // step) for whole, step in zip(size, s, strict=True))  # of m
    phases = []
    for r in itertools.product(*map(range, s)):
        cuts, sides = [], []
        for i in range(2):
            K, first, moved = turned.shape[i], *divmod(r[i] + pads[i][0], s[i])[::-1]
            # dx[s m + r] = sum over u of dy[m + moved - u] k[first + s u]
            cuts.append(slice((K - 1 - first) % s[i], max(0, K - first), s[i]))
            places = len(range(first, K, s[i]))
            sides.append((places - 1 - moved, blocks[i] + moved - dy.shape[1 + i]))
        part = turned[*cuts]
        phases.append(
            lax.conv_general_dilated(dy, part, (1, 1), sides, dimension_numbers=LAYOUT)
            if part.size
            else jnp.zeros((len(dy), *blocks, turned.shape[3]), dy.dtype)
        )
    dx = jnp.stack(phases, 3).reshape(len(dy), *blocks, *s, -1)
    dx = dx.transpose(0, 1, 3, 2, 4, 5).reshape(len(dy), blocks[0] * s[0], blocks[1] * s[1], -1)
    return dx[:, : size[0], : size[1]]


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def kernel_gradient(
    x: jax.Array, dy: jax.Array, size: Sizes, s: Sizes, pads: Pads, d: Sizes
) -> jax.Array:
    """dk[i, j] = sum over b, p, q of x[b, s p + i, s q + j] dy[b, p, q]: as matrix products.

    XLA's is a convolution whose window is the whole image. The images are taken a few at a time,
    so that what is copied for the products stays in the cache.
    """
    B, C, O = len(x), x.shape[-1], dy.shape[-1]  # noqa: E741
    image = len(s) == 2 and set(d) == {1} and x.dtype in EXACT and min(map(min, pads)) >= 0
    pointwise = image and size == (1, 1) and not any(pads[0] + pads[1])
    if not image or (O < FEW <= C and not pointwise):
        return _image_as_window(x, dy, size, s, pads, d)
    h, w = size
    k = jnp.zeros((h, w, C, O), x.dtype)  # any: y is linear in it
    if pointwise:
        return jax.vjp(lambda k: _pointwise(x, k, s), k)[1](dy)[0]

    if C < FEW:
        r = _block(k.shape, s)  # numbers, an image:
        copied = h * ((r - 1) * s[1] + w) * C * dy[0, ..., 0].size // r

        def part(x: jax.Array, dy: jax.Array) -> jax.Array:
            return jax.vjp(lambda k: _banded(x, k, s, pads), k)[1](dy)[0]
    elif s == (1, 1):
        copied = w * x[0].size + h * dy[0].size

        def part(x: jax.Array, dy: jax.Array) -> jax.Array:
            return _rows_by_columns(x, dy, (h, w), pads)
    else:
        copied = x[0].size + dy[0].size

        def part(x: jax.Array, dy: jax.Array) -> jax.Array:
            return _place_by_place(x, dy, (h, w), s, pads)

    # Every turn of the loop reads and writes all of dk.
    few = at_a_time(x, copied * x.dtype.itemsize, k.nbytes)
    if few == B:
        dk = part(x, dy)
    else:
        turns = tuple(a.reshape(B // few, few, *a.shape[1:]) for a in (x, dy))
        none = jnp.zeros_like(jax.eval_shape(part, *(a[0] for a in turns)))
        dk = lax.scan(lambda dk, both: (dk + part(*both), None), none, turns)[0]
    if s == (1, 1) and C >= FEW:  # as `_rows_by_columns` has it
        dk = dk.reshape(w, C, h, O).transpose(2, 0, 1, 3)
    return dk.reshape(k.shape)


@functools.partial(jax.jit, static_argnums=(2,))
def _pointwise(x: jax.Array, k: jax.Array, s: Sizes) -> jax.Array:
    """1 x 1: one matrix product. Its gradients are too: that of the kernel 78 -> 9 ms for 256 to
    1,024 channels on 8 images of 14 x 14, 228 -> 20 ms with stride 2; itself 12 -> 8 ms."""
    x = x[:, *(slice(None, None, step) for step in s)]  # (B, H', W', C)
    return product(x.reshape(-1, x.shape[-1]), k.reshape(k.shape[-2:])).reshape(*x.shape[:-1], -1)


def _rows_by_columns(x: jax.Array, dy: jax.Array, size: Pair, pads: Pads) -> jax.Array:
    """All places of the kernel's gradient in one product: w copies of x, moved along the row, by
    h copies of dy, moved along the column. No product is wasted, and both sides are wide.

    64 to 64 channels, 64 images of 32 x 32: 150 -> 42 ms; 128 to 128 at 16 x 16: 105 -> 30 ms; 16
    to 16, 128 images of 32 x 32: 22 -> 9.6 ms.
    """
    (h, w), (low, _) = size, pads[0]
    (_, H, _, C), (_, H_, W_, O) = x.shape, dy.shape  # noqa: E741
    x = jnp.pad(x, ((0, 0), (0, 0), pads[1], (0, 0)))
    # Row p of x meets row p + low - i of dy at place i.
    dy = jnp.pad(dy, ((0, 0), (h - 1, h - 1 + max(0, H - H_)), (0, 0), (0, 0)))
    x, dy = lax.optimization_barrier((x, dy))
    wide = side_by_side([x[:, :, j : j + W_] for j in range(w)])  # (B, H, W', w C)
    rows = (h - 1 + low - i for i in range(h))
    high = side_by_side([dy[:, row : row + H] for row in rows])  # (B, H, W', h O)
    wide, high = lax.optimization_barrier((wide, high))
    return over_rows(wide.reshape(-1, w * C), high.reshape(-1, h * O))  # (w C, h O)


def _place_by_place(x: jax.Array, dy: jax.Array, size: Pair, s: Sizes, pads: Pads) -> jax.Array:
    """A product for each place of the kernel, for strides.

    64 to 128 channels, 64 images of 32 x 32, stride 2: 168 -> 50 ms; 16 to 32, 128 images: 12 -> 7.
    """
    (h, w), (_, H, W, O) = size, dy.shape  # noqa: E741
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    flat = dy.reshape(-1, O)  # (B H' W', O)

    def place(i: int, j: int) -> jax.Array:
        part = x[:, i : i + (H - 1) * s[0] + 1 : s[0], j : j + (W - 1) * s[1] + 1 : s[1]]
        return over_rows(part.reshape(-1, x.shape[3]), flat)  # (C, O)

    return jnp.stack([place(i, j) for i in range(h) for j in range(w)])  # (h w, C, O)


def _image_as_window(
    x: jax.Array, dy: jax.Array, size: Sizes, s: Sizes, pads: Pads, d: Sizes
) -> jax.Array:
    """XLA's own form: the channels of x are the batch, its batch the channels, dy the kernel.

    Written with the transpositions before a barrier, for the reason that `_input_gradient` has. It
    is what dilated kernels and lines have, for the sake of `lax.scan`: the gradients of 64 to 128
    channels, 4 lines of 4,096, take 2,600 ms there as XLA has them, and 31 so.
    """
    n = len(s)
    images, window = _batch_last(x, dy)  # (C, H, W, B), (H', W', B, O)
    sides = [
        (low, (places - 1) * apart + (outs - 1) * step + 1 - whole - low)
        for places, apart, whole, outs, step, (low, _) in zip(
            size, d, x.shape[1:-1], dy.shape[1:-1], s, pads, strict=True
        )
    ]
    dk = lax.conv_general_dilated(
        images, window, d, sides, rhs_dilation=s, dimension_numbers=LAYOUTS[n]
    )  # (C, h, w, O)
    return jnp.moveaxis(dk, 0, -2)


def _batch_last(x: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(B, H.., C) -> (C, H.., B) and (B, h.., O) -> (h.., B, O), in memory before they are read.

    The barrier stands at a flat form. At the transposed one itself XLA copies twice: once to what
    is the same in memory, by a slow loop, then as asked. A kernel's gradient for 16 channels, 128
    images of 32 x 32: 25 -> 18 ms.
    """
    images = jnp.moveaxis(jnp.moveaxis(x, -1, 0), 1, -1)  # (C, H.., B)
    window = jnp.moveaxis(k, 0, -2)  # (h.., B, O)
    flat = images.reshape(-1, images.shape[-1]), window.reshape(-1, *window.shape[-2:])
    a, b = lax.optimization_barrier(flat)
    return a.reshape(images.shape), b.reshape(window.shape)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _columns(x: jax.Array, k: jax.Array, s: Sizes, pads: Pads) -> jax.Array:
    """A large kernel with strides on small images: one product with all places side by side.

    256 to 512 channels, 64 images of 8 x 8, 3 x 3 with stride 2: 24 -> 11 ms; 512 to 512, 8 images
    of 14 x 14: 17 -> 8. With larger images the copies cost more than they save.
    """
    h, w, C, O = k.shape  # noqa: E741
    x = lax.optimization_barrier(jnp.pad(x, ((0, 0), *pads, (0, 0))))
    _, H, W, _ = x.shape
    parts = [
        x[:, i : H - h + i + 1 : s[0], j : W - w + j + 1 : s[1]] for i in range(h) for j in range(w)
    ]
    columns = lax.optimization_barrier(side_by_side(parts))  # (B, H', W', h w C)
    y = product(columns.reshape(-1, h * w * C), k.reshape(-1, O))
    return y.reshape(*columns.shape[:-1], O)


def _block(k: tuple[int, ...], s: Sizes) -> int:
    """Outputs of a row that one product makes: about a vector's worth of numbers, no more."""
    return max(1, 2 * FEW // k[3]) if k[3] < FEW else 2


@functools.partial(jax.jit, static_argnums=(2, 3))
def _banded(x: jax.Array, k: jax.Array, s: Sizes, pads: Pads) -> jax.Array:
    """Few channels: r outputs of a row from all the inputs that they see, by one product with the
    kernel written r times into a banded matrix, each time moved by a stride.

    The product has r times the width and zeros that cost less. 5 x 5, 1 to 6 channels, 128 images
    of 28 x 28: 22 -> 3.4 ms, the kernel's gradient 9 -> 3.5; the input's gradient for 6 to 16
    channels 9 -> 2.1; the kernel's gradient for 3 x 3, 1 to 32 channels, 14 -> 4.
    """
    (B, _, W, _), (h, w, C, O) = x.shape, k.shape  # noqa: E741
    r = _block(k.shape, s)
    H_ = (x.shape[1] + sum(pads[0]) - h) // s[0] + 1
    W_ = (W + sum(pads[1]) - w) // s[1] + 1
    n, seen = -(-W_ // r), (r - 1) * s[1] + w  # blocks in a row, inputs that a block sees
    more = max(0, (n - 1) * r * s[1] + seen - W - sum(pads[1]))
    x = jnp.pad(x, ((0, 0), pads[0], (pads[1][0], pads[1][1] + more), (0, 0)))
    x = lax.optimization_barrier(x).reshape(B, x.shape[1], -1)  # (B, H + pads, (W + pads) C)
    blocks = [
        lax.slice_in_dim(x, b * r * s[1] * C, (b * r * s[1] + seen) * C, axis=2) for b in range(n)
    ]
    x = lax.optimization_barrier(jnp.stack(blocks, 2))  # (B, H + pads, n, seen C)
    rows = [x[:, i : i + (H_ - 1) * s[0] + 1 : s[0]] for i in range(h)]
    x = jnp.concatenate(rows, -1).reshape(-1, h * seen * C)  # (B H' n, h seen C)
    moved = [
        jnp.pad(k, ((0, 0), (q * s[1], seen - w - q * s[1]), (0, 0), (0, 0))) for q in range(r)
    ]
    matrix = jnp.stack(moved, 3).reshape(h * seen * C, r * O)
    y = product(lax.optimization_barrier(x), matrix)  # (B H' n, r O)
    return y.reshape(B, H_, n * r, O)[:, :, :W_]


class Conv(linen.Conv):
    """`flax.linen.Conv` on `conv_general_dilated` of this file."""

    conv_general_dilated: Any = conv_general_dilated
