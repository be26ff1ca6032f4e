"""Metrics are sums and weights: a padded last batch and many hosts change nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dlx import examples, sharding
from dlx.errors import BadInput


class Source(Protocol):
    """Examples by their number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...


Examples = Mapping[str, np.ndarray] | Source


def correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1.0 where the largest of `logits` (..., C) is at `labels` (...), else 0.0; (...) float32.

    >>> correct(jnp.array([[0., 1.], [2., 1.]]), jnp.array([1, 1])).tolist()
    [1.0, 0.0]
    """
    return (logits.argmax(-1).astype(labels.dtype) == labels).astype(jnp.float32)


def wide(dtype: Any) -> Any:
    """The dtype that sums are made in: a sum over many steps in bfloat16 would lose its digits."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def pairs(metrics: Mapping[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Every metric as (sum, weight): a scalar counts once."""
    out = {}
    for name, value in metrics.items():
        total, weight = value if isinstance(value, tuple) else (value, 1.0)
        total = jnp.asarray(total)
        dtype = wide(total.dtype)
        out[name] = (total.astype(dtype), jnp.asarray(weight).astype(dtype))
    return out


def means(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """{name: sum / weight}; a metric of weight 0 has nothing to report and is left out.

    >>> means({"loss": (6.0, 4.0), "reward": (0.0, 0.0)})
    {'loss': 1.5}
    """
    return {k: float(s) / float(w) for k, (s, w) in sums.items() if float(w) != 0}


def empty_window(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `accumulate` sums into; for shapes, under ``jax.eval_shape``."""
    return {"sums": jax.tree.map(jnp.zeros_like, pairs(values)), "bad": jnp.int32(0)}


def accumulate(
    window: Mapping[str, Any], values: Mapping[str, Any], position: jax.Array, length: int
) -> dict[str, Any]:
    """A log window after one more step; it begins anew every `length` steps.

    "bad" keeps the first step whose metrics were not finite (steps count from 1), which a sum
    alone could not name.
    """
    new = pairs(values)
    begins = position % length == 0
    sums = jax.tree.map(lambda old, x: jnp.where(begins, 0, old) + x, window["sums"], new)
    finite = jnp.stack([jnp.isfinite(x) for x in jax.tree.leaves(new)] + [jnp.bool_(True)]).all()
    bad = jnp.where(finite | (window["bad"] > 0), window["bad"], position + 1)
    return {"sums": sums, "bad": bad}


def check_window(window: Mapping[str, Any]) -> None:
    """Raises FloatingPointError naming the step and the metrics of a window that went bad."""
    if int(window["bad"]) > 0:
        names = [k for k, v in window["sums"].items() if not np.isfinite(v).all()]
        raise FloatingPointError(
            f"{' and '.join(names) or 'a metric'} not finite at step {int(window['bad'])}"
        )


def evaluator(
    measure: Callable[[Any, Any], Mapping[str, Any]],
    arrays: Examples | Callable[[], Examples],
    batch_size: int,
) -> Callable[[Any], dict[str, float]]:
    """state -> {metric: mean over all examples}, exact whatever the batch size.

    Args:
      measure: (state, batch) -> {name: (B,) values, or ((B,) values, (B,) weights)}; pure.
      arrays: {name: (N, ...)}; or, of what does not fit in memory, a source whose `source[i]` is
        {name: (...)}, read by threads; or a function that opens either when it is first needed.
      batch_size: B, rounded up to a multiple of the devices; the last batch is padded with its
        first row and masked.

    Raises:
      BadInput: batch_size is no whole number or below 1; when it is called, what `padded` refuses.

    >>> mean = evaluator(lambda state, batch: {"x": batch["x"]}, {"x": np.arange(5.0)}, 2)
    >>> mean(None)
    {'x': 2.0}
    """

    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise BadInput(f"batch_size is {batch_size!r}: give a whole number, 1 or more")

    @jax.jit
    def sums(state, batch, mask):
        out = {}
        for name, value in measure(state, batch).items():
            value, weight = value if isinstance(value, tuple) else (value, jnp.ones_like(value))
            if value.shape != mask.shape or weight.shape != mask.shape:
                raise BadInput(
                    f"measure gives {name!r} the shape {value.shape} (weights {weight.shape}): "
                    f"it must be {mask.shape}, a value an example"
                )
            value, weight = value.astype(wide(value.dtype)), weight.astype(wide(value.dtype))
            # where, not a product: a padded row may hold NaN and NaN x 0 is NaN.
            weight = jnp.where(mask > 0, weight, jnp.zeros_like(weight))
            value = jnp.where(weight != 0, value, jnp.zeros_like(value))
            out[name] = ((value * weight).sum(), weight.sum())
        return out

    def evaluate(state: Any) -> dict[str, float]:
        total: dict[str, tuple[float, float]] = {}
        mesh = jax.sharding.get_mesh()  # set by fit: unsharded, every device would do all the work
        shares = 1 if mesh.empty else sharding.shares(mesh)
        size = -(-batch_size // shares) * shares
        for batch, mask in padded(examples.opened(arrays), size):
            if not mesh.empty:
                held = sharding.rows(mesh)(size)
                mine = {k: v[held] for k, v in batch.items()}
                batch, mask = sharding.put((mine, mask[held]), mesh)
            for name, (s, w) in jax.device_get(sums(state, batch, mask)).items():
                a, b = total.get(name, (0.0, 0.0))
                total[name] = (a + float(s), b + float(w))
        return means(total)

    def names(state: Any) -> list[str]:
        """The metrics, from the state's shapes alone: opens the data, compiles nothing."""
        one = next(padded(examples.opened(arrays), 1))
        batch, mask = jax.tree.map(lambda x: np.broadcast_to(x, (batch_size, *x.shape[1:])), one)
        return list(jax.eval_shape(sums, state, batch, mask))

    evaluate.names = names  # type: ignore[attr-defined]
    return evaluate


def padded(arrays: Examples, batch_size: int) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Batches of one fixed size in order, each with its (B,) float32 mask: 0 where padded.

    Of a source the next batch is read while this one is used; its examples become the numbers that
    training gets of them.

    Raises:
      BadInput: empty, ragged, no numbers, or examples that differ.
    """
    name = "the evaluation set"
    table = isinstance(arrays, Mapping)
    found: Any = examples.table(arrays, name) if table else examples.source(arrays, name)
    n = len(next(iter(found.values())) if table else found)
    indices = (np.arange(at, min(at + batch_size, n)) for at in range(0, n, batch_size))
    if table:
        batches: Any = ({k: v[index] for k, v in found.items()} for index in indices)
    else:
        batches = _read(found, indices)
    with contextlib.closing(batches):
        for batch in batches:
            count = len(next(iter(batch.values())))
            rows = np.r_[:count, np.zeros(batch_size - count, int)]
            mask = (np.arange(batch_size) < count).astype(np.float32)
            yield batch if count == batch_size else {k: v[rows] for k, v in batch.items()}, mask


def _read(source: Source, indices: Iterator[np.ndarray]) -> Generator[dict[str, Any], None, None]:
    pool = ThreadPoolExecutor(os.cpu_count())

    def number(i: int) -> dict[str, np.ndarray]:
        return examples.numbers(source[i], f"example {i}")

    def ask(index: np.ndarray) -> list[Any]:
        return [(f"example {i}", pool.submit(number, i)) for i in index.tolist()]

    def stacked(asked: list[Any]) -> dict[str, np.ndarray]:
        out = examples.empty(len(asked), asked[0][1].result())
        for row, (name, found) in enumerate(asked):
            examples.put(out, row, found.result(), name)
        return out

    try:
        asked = ask(next(indices))
        for index in indices:
            batch, asked = stacked(asked), ask(index)
            yield batch
        yield stacked(asked)
    finally:
        pool.shutdown(cancel_futures=True)
