"""Data beyond memory: batches from any random-access source, read ahead in threads by Grain.

A source has a length and gives example i as `source[i]`: a prepared set of tensorflow-datasets
(`dlx.data.tfds`), a `datasets.Dataset` of Hugging Face, a list. The order of batches is that of
`dlx.data.arrays`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dlx.data import arrays
from dlx.errors import BadInput

_NARROW = {  # as JAX does
    np.dtype(wide): np.dtype(narrow)
    for wide, narrow in (("int64", "int32"), ("uint64", "uint32"), ("float64", "float32"))
}


def batches(
    source: Any,
    batch_size: int,
    seed: int,
    transform: Callable[[Any, np.random.Generator], Mapping[str, Any]] | None = None,
    threads: int | None = None,
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

    Raises:
      BadInput: the source is empty or has no length, batch_size or threads is out of range, an
        example is no dict of numbers or has other names, shapes or dtypes than the first.

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
        opened = _open(source)
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
            return numbers(example, name)

        first = first_step * batch_size  # the same example in every process
        like = read(first, int(indices(np.array([first]))[0]))

        def batch(step: int) -> dict[str, np.ndarray]:
            position = np.arange(step * batch_size, (step + 1) * batch_size)[mine]
            out = empty(len(position), like)
            for row, (p, i) in enumerate(zip(position.tolist(), indices(position), strict=True)):
                if stop.is_set():  # nobody waits for this batch any more
                    break
                put(out, row, read(p, int(i)), f"example {i}, position {p} of the stream")
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


def stack(examples: Iterable[Any], n: int, name: str) -> dict[str, np.ndarray]:
    """n examples, each as in `numbers`, as arrays {name: (n, ...)}.

    Raises:
      BadInput: an example is no dict of numbers, or differs from the first.

    >>> stack(iter([{"x": 1}, {"x": 2}]), 2, "two")
    {'x': array([1, 2], dtype=int32)}
    """
    out: dict[str, np.ndarray] = {}
    for row, example in enumerate(examples):
        found = numbers(example, f"{name}: example {row}")
        out = out or empty(n, found)
        put(out, row, found, f"{name}: example {row}")
    return out


def empty(n: int, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Room for n examples like this one: {name: (n, ...)}."""
    return {key: np.empty((n, *value.shape), value.dtype) for key, value in like.items()}


def put(out: dict[str, np.ndarray], row: int, example: Mapping[str, np.ndarray], name: str) -> None:
    """Writes an example into a row of `out`.

    Raises:
      BadInput: it has other names, shapes or dtypes than the rows.
    """
    if example.keys() != out.keys():
        raise BadInput(
            f"{name}, has {', '.join(map(str, example))} and the first example has "
            f"{', '.join(map(str, out))}: give all the same names"
        )
    for key, value in example.items():
        rows = out[key]
        if value.shape != rows.shape[1:] or value.dtype != rows.dtype:
            raise BadInput(
                f"{name}: {key} is {value.dtype}{list(value.shape)} and in the first example "
                f"{rows.dtype}{list(rows.shape[1:])}: make them alike in a transform"
            )
        rows[row] = value


def numbers(example: Any, name: str) -> dict[str, np.ndarray]:
    """An example as arrays that JAX takes as they are.

    Images of Pillow become (height, width, channels), numbers and lists arrays, and 64 bits 32.

    Args:
      example: {name: array, image, number or list of numbers}.
      name: of the example, for the message.

    Raises:
      BadInput: it is no dict, or a value is ragged, no number or too large for 32 bits.

    >>> numbers({"x": [1, 2], "y": 0.5}, "it")
    {'x': array([1, 2], dtype=int32), 'y': array(0.5, dtype=float32)}
    """
    if not isinstance(example, Mapping) or not example:
        what = "an empty dict" if isinstance(example, Mapping) else f"a {type(example).__name__}"
        raise BadInput(f"{name}, is {what}: give a transform that returns {{name: array}}")
    return {key: _array(value, f"{name}: {key}") for key, value in example.items()}


def _array(value: Any, name: str) -> np.ndarray:
    picture = hasattr(value, "getbands")  # an image of Pillow
    if picture and value.mode == "P":
        value = value.convert("RGB")  # else indices into a palette
    try:
        array = np.asarray(value)
    except ValueError as e:
        raise BadInput(f"{name} is ragged: make it one shape in a transform") from e
    if picture and array.ndim == 2:
        array = array[..., None]
    if array.dtype.kind in "OSUMm" or array.dtype.names:
        kind = type(value).__name__ if array.dtype == object else array.dtype
        raise BadInput(f"{name} is {kind}, no number: leave it out or encode it in a transform")
    narrow = _NARROW.get(array.dtype)
    if narrow is None:
        return array
    if array.dtype.kind != "f" and array.size:
        limits = np.iinfo(narrow)
        if array.min() < limits.min or array.max() > limits.max:
            raise BadInput(f"{name} does not fit {narrow}: make it smaller in a transform")
    return array.astype(narrow)


def _open(source: Any) -> Any:
    """The source itself, opened where it is a function."""
    opened: Any = source() if callable(source) and not hasattr(source, "__getitem__") else source
    kind = type(opened).__name__
    if isinstance(opened, Mapping):
        keys = ", ".join(map(str, opened))[:60]
        raise BadInput(f"source is a {kind} of {keys}: give one split, or arrays to arrays.batches")
    if not (hasattr(opened, "__getitem__") and hasattr(opened, "__len__")):
        raise BadInput(f"source is a {kind}: it needs len(source) and source[i]")
    if not len(opened):
        raise BadInput("source is empty: it needs at least one example")
    return opened
