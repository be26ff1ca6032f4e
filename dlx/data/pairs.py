"""Pairs of sequences: padded arrays of them, and batches of pairs of about one length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dlx.errors import BadInput

Arrays = Mapping[str, np.ndarray]
SIDES = ("source", "target")


def pad(
    source: Sequence[Sequence[int]],
    target: Sequence[Sequence[int]],
    *,
    end: int,
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """{"source", "target"}: (N, L) int32, each sequence with its end and then zeros, and
    {"source_length", "target_length"}: (N,) int32, the end counted.

    Args:
      source, target: tokens, pair by pair.
      end: the token behind the last of both.
      limit: L of both sides; pairs of which one is longer are left out. None: the longest of each.

    >>> pad([[5, 6]], [[7]], end=2)["target"].tolist()
    [[7, 2]]
    """
    both = list(zip(source, target, strict=True))
    if limit is not None:
        both = [pair for pair in both if max(map(len, pair)) < limit]
    out = {}
    for i, side in enumerate(SIDES):
        rows = [[*pair[i], end] for pair in both]
        lengths = np.array([len(row) for row in rows], np.int32)
        out[side] = np.zeros((len(rows), limit or max(lengths, default=0)), np.int32)
        for row, tokens in zip(out[side], rows, strict=True):
            row[: len(tokens)] = tokens
        out[f"{side}_length"] = lengths
    return out


def check(arrays: Arrays, name: str, sizes: tuple[int, int]) -> dict[str, np.ndarray]:
    """The arrays of `pad`, if a model can be trained on them: JAX would take another row of an
    embedding for a token that it has not, and say nothing.

    Args:
      name: of the data, for the message.
      sizes: of the vocabularies of source and target.

    Raises:
      BadInput: no pairs, a token out of its vocabulary, lengths that are no integers, 0 or beyond
        the array.
    """
    for side, size in zip(SIDES, sizes, strict=True):
        tokens, lengths = arrays[side], arrays[f"{side}_length"]
        if not len(tokens):
            raise BadInput(f"{name}: no pair is left: give more, or a higher limit")
        for what, values in ((side, tokens), (f"{side}_length", lengths)):
            if not np.issubdtype(values.dtype, np.integer):
                raise BadInput(f"{name}: {what} has dtype {values.dtype}: it must be integer")
        if lengths.shape != tokens.shape[:1]:
            raise BadInput(
                f"{name}: {side}_length has shape {lengths.shape}: it must be ({len(tokens)},)"
            )
        for n in (lengths.min(), lengths.max()):
            if not 1 <= n <= tokens.shape[1]:
                raise BadInput(f"{name}: a {side}_length is {n}: they go from 1 to "
                               f"{tokens.shape[1]}, the width of {side}")  # fmt: skip
        for token in (tokens.min(), tokens.max()):
            if not 0 <= token < size:
                raise BadInput(f"{name}: {side} has token {token} and its vocabulary {size}: they "
                               f"go from 0 to {size - 1}")  # fmt: skip
    return dict(arrays)


def batches(
    arrays: Arrays | Callable[[], Arrays], batch_size: int, seed: int
) -> Callable[[int, Callable[[int], Any]], Iterator[dict[str, np.ndarray]]]:
    """The `data` of an Experiment: batches of pairs of about one length, in any order, for ever.

    An epoch is a permutation of the pairs without the last few that fill no batch, sorted by the
    longer of their two sides (equal ones stay in the order of the permutation), cut into batches,
    and these are permuted. Batch t is a function of (seed, t) alone, and all have one shape: what
    the short ones save, the step must not compute.

    Args:
      arrays: of `pad`, or a function that opens them when they are first needed.
      batch_size: of the global batch.
      seed: of the order.

    Raises:
      BadInput: batch_size is below 1 or above the pairs there are.
    """

    def data(first_step: int, rows: Callable[[int], Any]) -> Iterator[dict[str, np.ndarray]]:
        opened = arrays() if callable(arrays) else arrays
        longer = np.maximum(opened["source_length"], opened["target_length"])
        N = len(longer)
        if not 1 <= batch_size <= N:
            raise BadInput(f"batch_size {batch_size} does not fit {N:,} pairs: use 1 to {N}")
        count = N // batch_size

        @functools.lru_cache(maxsize=2)
        def epoch(number: int) -> np.ndarray:
            random = np.random.Generator(np.random.Philox(key=[seed, number]))
            kept = random.permutation(N)[: count * batch_size]
            kept = kept[np.argsort(longer[kept], kind="stable")]
            return random.permutation(kept.reshape(count, batch_size))  # of its rows

        def stream() -> Iterator[dict[str, np.ndarray]]:
            step = first_step
            while True:
                index = epoch(step // count)[step % count][rows(batch_size)]
                yield {k: v[index] for k, v in opened.items()}
                step += 1

        return stream()

    return data
