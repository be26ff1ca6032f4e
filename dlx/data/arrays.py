"""Data that fits in memory: checked when it is opened, then indexed by a pure function of
(seed, step)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlx.errors import BadInput
from dlx.examples import opened, table

Arrays = Mapping[str, np.ndarray]


def check(arrays: Arrays, name: str, classes: int | None = None) -> dict[str, np.ndarray]:
    """The arrays as they came, if a model can be trained on them; lists become arrays.

    Args:
      arrays: {"image": (N, H, W, C), "label": (N,), ...}, all of one length.
      name: of the data set, for the message.
      classes: labels must be integers in [0, classes); None: not negative.

    Raises:
      BadInput: empty, ragged, no numbers, NaN or infinity, images or labels of another shape,
        float labels or labels out of range.
    """
    found = _sound(arrays, name, classes)
    image = found.get("image")
    if image is not None and (image.ndim != 4 or not image.size):
        raise BadInput(
            f"{name}: image has shape {image.shape}: it must be (N, height, width, channels)"
        )
    return found


def _sound(arrays: Any, name: str, classes: int | None) -> dict[str, np.ndarray]:
    found = table(arrays, name)
    for key, values in found.items():
        for at in range(0, len(values), 1024):  # of a large file no more than that at a time
            if not finite(values[at : at + 1024]):
                row = at + next(i for i, x in enumerate(values[at:]) if not finite(x))
                raise BadInput(f"{name}: {key} is not finite in row {row}: remove or mend that row")
    check_labels(found, name, classes, axes=1)
    return found


def finite(values: np.ndarray) -> bool:
    """Whether there is no NaN and no infinity."""
    return not jnp.issubdtype(values.dtype, jnp.inexact) or bool(np.isfinite(values).all())


def check_labels(found: Arrays, name: str, classes: int | None, axes: int) -> None:
    """Wrong labels are silent in JAX: -1 wraps to the last class, and a label that is too large
    gives a NaN loss without a NaN gradient. Only a look at the data finds them.

    Args:
      found: an example, or arrays of them.
      name: of it, for the message.
      classes: as of `check`.
      axes: of the label, where there are classes.

    Raises:
      BadInput: no label, or one of another shape, no integer or out of range.
    """
    label = found.get("label")
    if classes is not None:
        if label is None:
            raise BadInput(f"{name} has no 'label': it has {', '.join(map(str, found))}")
        if label.ndim != axes:
            wanted = "(N,)" if axes else "()"
            raise BadInput(f"{name}: label has shape {label.shape}: it must be {wanted}")
        if not np.issubdtype(label.dtype, np.integer):
            raise BadInput(f"{name}: label has dtype {label.dtype}: it must be integer")
    if label is None or not np.issubdtype(label.dtype, np.integer) or not label.size:
        return
    limits = "begin at 0" if classes is None else f"go from 0 to {classes - 1}"
    for extreme in (label.min(), label.max()):
        if extreme < 0 or (classes is not None and extreme >= classes):
            raise BadInput(f"{name}: label {extreme} is out of range: labels {limits}")


def order(n: int, batch_size: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The one order of all data: positions in the stream (B,) -> which examples these are (B,).

    Epoch after epoch, each a permutation of its own, laid end to end.

    Args:
      n: how many examples there are.
      batch_size: of the global batch.
      seed: of the order.

    Raises:
      BadInput: batch_size is no whole number, below 1 or above n.

    >>> sorted(order(4, 3, seed=0)(np.arange(4, 8)).tolist())
    [0, 1, 2, 3]
    """
    if not isinstance(batch_size, int | np.integer):
        raise BadInput(f"batch_size is {batch_size!r}: give a whole number")
    if not 1 <= batch_size <= n:
        raise BadInput(f"batch_size {batch_size} does not fit {n:,} examples: use 1 to {n}")

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)

    def indices(position: np.ndarray) -> np.ndarray:
        epochs = position // n
        within = position - epochs * n
        if len(epochs) and (epochs == epochs[0]).all():  # nearly always: half the time
            return permutation(int(epochs[0]))[within]
        index = np.empty_like(position)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permutation(int(epoch))[within[epochs == epoch]]
        return index

    return indices


def batches(
    arrays: Arrays | Callable[[], Arrays], batch_size: int, seed: int, classes: int | None = None
) -> Callable[[int, Callable[[int], Any]], Iterator[dict[str, np.ndarray]]]:
    """The `data` of an Experiment: shuffled batches of one size, for ever.

    Epoch after epoch, each a permutation of its own, laid end to end and cut into batches: every
    example comes exactly once an epoch, and a batch may straddle two. Batch t is a function of
    (seed, t) alone, so that resuming needs no more than the step.

    Args:
      arrays: {name: (N, ...)}, or a function that opens them when they are first needed.
      batch_size: of the global batch.
      seed: of the order.
      classes: labels must be (N,) integers in [0, classes); None: not negative.

    Raises:
      BadInput: batch_size is below 1 or above N; empty, ragged, no numbers, NaN or infinity, labels
        that are no classes.

    >>> data = batches({"x": np.arange(4)}, 3, seed=0)
    >>> stream = data(0, lambda n: slice(0, n))
    >>> sorted(np.concatenate([next(stream)["x"] for _ in range(4)]).tolist())
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    """

    def data(first_step: int, rows: Callable[[int], Any]) -> Iterator[dict[str, np.ndarray]]:
        found = _sound(opened(arrays), "data", classes)
        indices = order(len(next(iter(found.values()))), batch_size, seed)

        def stream() -> Iterator[dict[str, np.ndarray]]:
            step = first_step
            while True:
                position = np.arange(step * batch_size, (step + 1) * batch_size)[rows(batch_size)]
                index = indices(position)
                yield {k: v[index] for k, v in found.items()}
                step += 1

        return stream()

    return data
