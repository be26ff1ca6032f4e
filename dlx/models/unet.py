"""U-Net: an image in, a class for each of its pixels out.

O. Ronneberger, P. Fischer, T. Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", arXiv 1505.04597. A contracting path halves the image and doubles the features as
often as the network is deep, and so learns what is there; an expanding path doubles the size again,
and at every level joins the contracting path's features, which still know where.

`UNet` is the network of figure 1: its 3 x 3 convolutions are not padded, so that the output is
smaller than the image by a border, every pixel of it has seen real pixels only, and large images
are cut into overlapping tiles. `PaddedUNet` is the usual form today: convolutions padded with
zeros, output as large as the image, batch normalisation (S. Ioffe and C. Szegedy, 2015) before each
ReLU. Left out: the elastic deformations of section 3.1, which belong to the data.

Symbols: B batch, H and W height and width, C channels, K classes; h and w of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlx import nn
from dlx.errors import BadInput

# Section 3: deviation sqrt(2 / N), N the number of values that one output value is made of. Of an
# up-convolution's four places each output pixel sees one, hence four times the variance.
init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
up_init = nn.initializers.variance_scaling(8.0, "fan_in", "normal")


class Block(nn.Module):
    """Two 3 x 3 convolutions, each followed by (batch normalisation and) ReLU."""

    features: int
    padding: str
    norm: bool
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, C) -> (B, H, W, features), or (B, H - 4, W - 4, features) unpadded."""
        for i in (1, 2):
            x = nn.Conv(self.features, (3, 3), padding=self.padding, use_bias=not self.norm,
                        kernel_init=init, dtype=self.dtype, name=f"conv{i}")(x)  # fmt: skip
            if self.norm:
                x = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, name=f"norm{i}")(x)
            x = nn.relu(x)
        return x


class UNet(nn.Module):
    """Figure 1: 31,030,658 parameters for one channel and two classes.

    Attributes:
      features: of the first level; they double with each level down.
      depth: levels below the first.
      classes: logits of a pixel.
      padding: "VALID", the paper's, or "SAME".
      norm: batch normalisation before each ReLU (the paper has none), in place of the biases.
      dropout: rate at the bottom, the end of the contracting path.
      dtype: of the computation; parameters are float32 in any case.
    """

    features: int = 64
    depth: int = 4
    classes: int = 2
    padding: str = "VALID"
    norm: bool = False
    dropout: float = 0.5
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, C) -> logits (B, h, w, K); `output_size` tells h and w.

        Raises:
          BadInput: a size that `output_size` refuses.
        """
        for name, size in (("height", x.shape[1]), ("width", x.shape[2])):
            output_size(size, self.depth, self.padding, name)

        def block(x: jax.Array, level: int, name: str) -> jax.Array:
            features = self.features * 2**level
            return Block(features, self.padding, self.norm, self.dtype, name=name)(x, train=train)

        skips = []
        for i in range(self.depth):
            x = block(x, i, f"down{i}")  # (B, H / 2^i, W / 2^i, features 2^i)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), (2, 2))  # (B, H / 2^(i+1), W / 2^(i+1), features 2^i)
        x = block(x, self.depth, "bottom")  # (B, H / 2^depth, W / 2^depth, features 2^depth)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i in reversed(range(self.depth)):
            x = nn.ConvTranspose(self.features * 2**i, (2, 2), (2, 2), kernel_init=up_init,
                                 dtype=self.dtype, name=f"upconv{i}")(x)  # fmt: skip
            x = jnp.concatenate([crop(skips[i], x), x], -1)  # (B, h / 2^i, ..., features 2^(i+1))
            x = block(x, i, f"up{i}")  # (B, h / 2^i, w / 2^i, features 2^i)
        return nn.Conv(self.classes, (1, 1), dtype=self.dtype, name="head")(x)  # (B, h, w, K)


PaddedUNet = partial(UNet, padding="SAME", norm=True)


def crop(x: jax.Array, to: jax.Array) -> jax.Array:
    """The middle of (B, H, W, ...) in the size of `to`, (B, h, w, ...)."""
    (H, W), (h, w) = x.shape[1:3], to.shape[1:3]
    top, left = (H - h) // 2, (W - w) // 2
    return x[:, top : top + h, left : left + w]


def output_size(size: int, depth: int = 4, padding: str = "VALID", name: str = "size") -> int:
    """The output's height (or width) for an image's.

    Every maximum needs an even size. With b pixels at the bottom, an unpadded network has an image
    of 2^depth (b + 4) + 4 (2^depth - 1) and an output of 2^depth b - 4 (2^depth - 1) pixels.

    Raises:
      BadInput: no image of this size goes through, or no pixel would be left.

    >>> output_size(572), output_size(256, padding="SAME")
    (388, 256)
    """
    step = 2**depth
    border = 0 if padding == "SAME" else 4 * (step - 1)
    least = step if padding == "SAME" else step * (border // step + 5) + border
    below = least + (size - least) // step * step
    if size < least:
        fix = f"{least} is the least"
    elif size > below:
        fix = f"{below} and {below + step} do"
    else:
        return size - 2 * border - (0 if padding == "SAME" else 4 * step)
    raise BadInput(f"{name} {size} does not fit a U-Net of depth {depth} ({padding}): {fix}")


# ---- Loss (section 3) --------------------------------------------------------------------------


def segmentation(
    module: Any,
) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Cross-entropy of all pixels, each with its weight: for `dlx.make_step`.

        E = - mean over x of w(x) log p_label(x)(x)                              (equation 1)

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {"image": (B, H, W, C), "label": (B, H, W)
      integers, "weight": (B, H, W), ones if missing}; labels and weights may also have the
      output's size, (B, h, w). A label outside [0, K) counts nothing. Its metric is the accuracy
      of the pixels.
    """

    def loss_fn(params, model_state, batch, key):
        logits, model_state = module.apply(
            {"params": params, **model_state},
            batch["image"],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )  # (B, h, w, K)
        if logits.dtype != jnp.float64:
            logits = logits.astype(jnp.float32)  # a bfloat16 network's loss is summed in float32
        label = crop(batch["label"], logits)  # (B, h, w)
        target = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)  # (B, h, w, K)
        loss = optax.softmax_cross_entropy(logits, target)  # (B, h, w)
        if "weight" in batch:
            loss = loss * crop(batch["weight"], logits).astype(loss.dtype)
        hit = logits.argmax(-1).astype(label.dtype) == label
        return loss.mean(), (model_state, {"accuracy": hit.astype(jnp.float32).mean()})

    return loss_fn


def border_weights(
    cells: np.ndarray,
    class_weights: tuple[float, float] = (1.0, 1.0),
    w0: float = 10.0,
    sigma: float = 5.0,
) -> np.ndarray:
    """(H, W) weights that make the network learn the narrow gaps between touching cells.

        w(x) = w_c(x) + w_0 exp(-(d_1(x) + d_2(x))^2 / (2 sigma^2))              (equation 2)

    with d_1 and d_2 the distances to the nearest and the second nearest cell. As in figure 3d the
    second term is the background's alone, and zero where there are fewer than two cells.

    Args:
      cells: (H, W) integers: 0 background, each cell a number of its own.
      class_weights: w_c of background and cells, which balance their frequencies.
      w0: weight in a gap of no width.
      sigma: in pixels.
    """
    weights = np.where(cells == 0, *class_weights).astype(np.float32)  # (H, W)
    numbers = np.unique(cells[cells != 0])
    if len(numbers) < 2:
        return weights
    nearest = np.full((2, *cells.shape), np.inf)  # d_1 and d_2 so far
    for number in numbers:
        nearest = np.sort([*nearest, distance(cells == number)], axis=0)[:2]
    border = w0 * np.exp(-(nearest.sum(0) ** 2) / (2 * sigma**2))
    return weights + np.where(cells == 0, border, 0).astype(np.float32)


def distance(cell: np.ndarray) -> np.ndarray:
    """(H, W) booleans -> (H, W) Euclidean distances to the nearest that is true: first down the
    cell's columns, then across."""
    rows, columns = np.flatnonzero(cell.any(1)), np.flatnonzero(cell.any(0))
    y = (np.arange(cell.shape[0])[:, None] - rows) ** 2  # (H, R)
    x = (np.arange(cell.shape[1])[:, None] - columns) ** 2  # (W, C)
    inside = cell[np.ix_(rows, columns)]  # (R, C)
    down = np.where(inside, y[:, :, None], np.inf).min(1)  # (H, C)
    return np.sqrt(np.stack([(row + x).min(1) for row in down]))
