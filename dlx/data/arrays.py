"""Data that fits in memory: checked when it is opened, then indexed by a pure function of
(seed, step)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dlx.errors import BadInput

Arrays = Mapping[str, np.ndarray]


def check(arrays: Arrays, name: str, classes: int | None = None) -> dict[str, np.ndarray]:
    """The arrays as they came, if a model can be trained on them.

    Wrong labels are silent in JAX: -1 wraps to the last class, and a label that is too large
    gives a NaN loss without a NaN gradient. Only a look at the data finds them.

    Args:
      arrays: {"image": (N, H, W, C), "label": (N,), ...}, all of one length.
      name: of the data set, for the message.
      classes: labels must be integers in [0, classes).

    Raises:
      BadInput: empty, ragged, no numbers, NaN or infinity, images or labels of another shape,
        float labels or labels out of range.
    """
    for key, values in arrays.items():
        if not values.ndim:
            raise BadInput(f"{name}: {key} is a scalar: it must have a row an example")
    lengths = {k: len(v) for k, v in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise BadInput(f"{name}: arrays differ in length ({lengths}): each needs a row an example")
    if not lengths or not next(iter(lengths.values())):
        raise BadInput(f"{name} is empty: it needs at least one example")
    for key, values in arrays.items():
        if values.dtype == object:
            raise BadInput(f"{name}: {key} has dtype object (ragged rows?): make it one array")
        if values.dtype.kind not in "biufcV":  # V: bfloat16 and its like
            raise BadInput(f"{name}: {key} has dtype {values.dtype}: it must be numbers")
        if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise BadInput(f"{name}: {key} is not finite in row {row}: remove or mend that row")
        if key == "image" and values.ndim != 4:
            raise BadInput(
                f"{name}: image has shape {values.shape}: it must be (N, height, width, channels)"
            )
    if classes is not None:
        if "label" not in arrays:
            raise BadInput(f"{name} has no 'label': it has {', '.join(arrays)}")
        labels = arrays["label"]
        if labels.ndim != 1:
            raise BadInput(f"{name}: label has shape {labels.shape}: it must be (N,)")
        if not np.issubdtype(labels.dtype, np.integer):
            raise BadInput(f"{name}: label has dtype {labels.dtype}: it must be integer")
        for extreme in (labels.min(), labels.max()):
            if not 0 <= extreme < classes:
                raise BadInput(
                    f"{name}: label {extreme} is out of range: labels go from 0 to {classes - 1}"
                )
    return dict(arrays)


def order(n: int, batch_size: int, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The one order of all data: positions in the stream (B,) -> which examples these are (B,).

    Epoch after epoch, each a permutation of its own, laid end to end.

    Args:
      n: how many examples there are.
      batch_size: of the global batch.
      seed: of the order.

    Raises:
      BadInput: batch_size is below 1 or above n.

    >>> sorted(order(4, 3, seed=0)(np.arange(4, 8)).tolist())
    [0, 1, 2, 3]
    """
    if not 1 <= batch_size <= n:
        raise BadInput(f"batch_size {batch_size} does not fit {n:,} examples: use 1 to {n}")

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)

    def indices(position: np.ndarray) -> np.ndarray:
        epochs, within = np.divmod(position, n)
        index = np.empty_like(position)
        for epoch in np.unique(epochs):
            index[epochs == epoch] = permutation(int(epoch))[within[epochs == epoch]]
        return index

    return indices


def batches(
    arrays: Arrays | Callable[[], Arrays], batch_size: int, seed: int
) -> Callable[[int, Callable[[int], Any]], Iterator[dict[str, np.ndarray]]]:
    """The `data` of an Experiment: shuffled batches of one size, for ever.

    Epoch after epoch, each a permutation of its own, laid end to end and cut into batches: every
    example comes exactly once an epoch, and a batch may straddle two. Batch t is a function of
    (seed, t) alone, so that resuming needs no more than the step.

    Args:
      arrays: {name: (N, ...)}, or a function that opens them when they are first needed.
      batch_size: of the global batch.
      seed: of the order.

    Raises:
      BadInput: batch_size is below 1 or above N.

    >>> data = batches({"x": np.arange(4)}, 3, seed=0)
    >>> stream = data(0, lambda n: slice(0, n))
    >>> sorted(np.concatenate([next(stream)["x"] for _ in range(4)]).tolist())
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    """

    def data(first_step: int, rows: Callable[[int], Any]) -> Iterator[dict[str, np.ndarray]]:
        opened = arrays() if callable(arrays) else arrays
        indices = order(len(next(iter(opened.values()))), batch_size, seed)

        def stream() -> Iterator[dict[str, np.ndarray]]:
            step = first_step
            while True:
                position = np.arange(step * batch_size, (step + 1) * batch_size)[rows(batch_size)]
                index = indices(position)
                yield {k: v[index] for k, v in opened.items()}
                step += 1

        return stream()

    return data
