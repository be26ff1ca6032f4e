"""Data beyond memory: batches from any random-access source, read ahead in threads by Grain.

A source has a length and gives example i as `source[i]`: a prepared set of tensorflow-datasets
(`dlx.data.tfds`), a `datasets.Dataset` of Hugging Face, a list. The order of batches is that of
`dlx.data.arrays`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from dlx import examples
from dlx.data import arrays
from dlx.errors import BadInput


def batches(
    source: Any,
    batch_size: int,
    seed: int,
    transform: Callable[[Any, np.random.Generator], Mapping[str, Any]] | None = None,
    threads: int | None = None,
    classes: int | None = None,
) -> Callable[[int, Callable[[int], Any]], Iterator[dict[str, np.ndarray]]]:
    """The `data` of an Experiment, as `dlx.data.arrays.batches` gives it and in the same order.

    Batch t is a function of (seed, t) alone, random transforms included, whatever the number of
    threads and of processes. A thread reads a batch at a time, and one batch a thread is read
    ahead. Closing the iterator ends the threads.

    Args:
      source: `len(source)` and `source[i]` -> example, asked by several threads at a time; or a
        function that opens one when it is first needed.
      batch_size: of the global batch.
      seed: of the order and of the generators.
      transform: (example, generator) -> {name: array or number}. The generator is made of the
        seed and of the example's position in the stream. None: the example as it is.
      threads: that read ahead; 0 reads when asked. None: one a core, at most eight.
      classes: a label must be an integer in [0, classes); None: not negative.

    Raises:
      BadInput: the source is empty or has no length, batch_size or threads is out of range, an
        example is no dict of numbers, is not finite, has a label that is no class, or has other
        names, shapes or dtypes than the first.

    >>> source = [{"x": i, "y": [i, -i]} for i in range(4)]
    >>> stream = batches(source, 2, seed=0)(0, lambda n: slice(0, n))
    >>> batch = next(stream)
    >>> batch["y"].shape, batch["y"].dtype, (batch["y"][:, 0] == batch["x"]).all().item()
    ((2, 2), dtype('int32'), True)
    >>> stream.close()
    """
    workers = min(8, os.cpu_count() or 1) if threads is None else threads

    def data(first_step: int, rows: Callable[[int], Any]) -> Iterator[dict[str, np.ndarray]]:
        if workers < 0:
            raise BadInput(f"threads is {threads}: give 0 or more")
        opened = examples.source(examples.opened(source), "source")
        indices = arrays.order(len(opened), batch_size, seed)
        mine = rows(batch_size)
        stop = threading.Event()

        def read(position: int, index: int) -> dict[str, np.ndarray]:
            name = f"example {index}, position {position} of the stream"
            try:
                example = opened[index]
                if transform is not None:
                    # The counter keeps these numbers apart from those of the permutations.
                    philox = np.random.Philox(key=[seed, position], counter=[0, 0, 0, 1])
                    example = transform(example, np.random.Generator(philox))
            except Exception as e:
                e.add_note(f"(in {name})")
                raise
            found = examples.numbers(example, name)
            for key, value in found.items():
                if not arrays.finite(value):
                    raise BadInput(f"{name}: {key} is not finite: remove or mend that example")
            arrays.check_labels(found, name, classes, axes=0)
            return found

        first = first_step * batch_size  # the same example in every process
        like = read(first, int(indices(np.array([first]))[0]))

        def batch(step: int) -> dict[str, np.ndarray]:
            position = np.arange(step * batch_size, (step + 1) * batch_size)[mine]
            out = examples.empty(len(position), like)
            for row, (p, i) in enumerate(zip(position.tolist(), indices(position), strict=True)):
                if stop.is_set():  # nobody waits for this batch any more
                    break
                examples.put(out, row, read(p, int(i)), f"example {i}, position {p} of the stream")
            return out

        def stream() -> Iterator[dict[str, np.ndarray]]:
            import grain

            steps = grain.MapDataset.range(first_step, 2**62).map(batch)
            options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers)
            iterator = iter(steps.to_iter_dataset(options))
            try:
                yield from iterator
            finally:
                stop.set()
                iterator.close()
                # It tells its threads to end and does not wait for them.
                if executor := getattr(iterator, "_executor", None):
                    executor.shutdown()

        return stream()

    return data
