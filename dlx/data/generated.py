"""Data that is made up as it is needed: a batch is a pure function of (seed, step)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Make = Callable[[np.random.Generator, int], dict[str, np.ndarray]]


def batches(
    make: Make, batch_size: int, seed: int
) -> Callable[[int, Callable[[int], Any]], Iterator[dict[str, np.ndarray]]]:
    """The `data` of an Experiment: new examples for ever.

    Args:
      make: (generator, B) -> {name: (B, ...)}.
      batch_size: of the global batch.
      seed: of the examples.

    >>> data = batches(lambda random, n: {"x": random.integers(0, 99, n)}, 4, seed=0)
    >>> five = [next(data(step, lambda n: slice(0, n)))["x"].tolist() for step in range(5)]
    >>> stream = data(3, lambda n: slice(0, n))
    >>> [next(stream)["x"].tolist(), next(stream)["x"].tolist()] == five[3:]
    True
    """

    def data(first_step: int, rows: Callable[[int], Any]) -> Iterator[dict[str, np.ndarray]]:
        for step in itertools.count(first_step):
            # All rows, and then those of this process: who makes them changes none.
            whole = make(np.random.Generator(np.random.Philox(key=[seed, step])), batch_size)
            mine = rows(batch_size)
            yield {name: values[mine] for name, values in whole.items()}

    return data


def held_out(make: Make, n: int, which: int) -> dict[str, np.ndarray]:
    """n examples, always the same, that no training step sees.

    Args:
      which: 1 for validation, 2 for the test.
    """
    # The counter keeps them apart from those of all seeds and steps.
    return make(np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, 0, which])), n)
