"""The contract: an experiment is a handful of pure functions; the loop knows nothing else."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from dlx.errors import BadInput

State = Any  # any pytree of arrays
Batch = Any  # any pytree of arrays; the leading dimension is the global batch
Metrics = Mapping[str, Any]  # {name: scalar or (sum, weight)}
Rows = Callable[[int], slice | np.ndarray]  # global batch size -> the rows this process feeds

_NONE: Mapping[str, Any] = types.MappingProxyType({})


class Experiment(NamedTuple):
    """What `dlx.fit` trains. Only `init` and `step` are needed.

    Write a function where something special is wanted; there is nothing to inherit from.
    """

    init: Callable[[Any, Any], State]
    """(key, given) -> state. Pure; jitted. `given` is an earlier phase's state, or None."""

    step: Callable[[State, Batch], tuple[State, Metrics]]
    """(state, batch) -> (state, metrics). Pure; jitted with the state donated. A metric is a
    scalar, or a pair (sum, weight); one that has nothing to report has weight 0."""

    data: Callable[[int, Rows], Iterator[Batch]] | None = None
    """(first step, rows) -> host batches from that step on, this process's rows only. A batch
    is a function of (seed, step) alone. None: the state is its own world (an environment)."""

    evals: Mapping[str, Callable[[State], Mapping[str, float]]] = _NONE
    """{name: state -> {metric: float}} on validation data; see `dlx.metrics.evaluator`."""

    test: Callable[[State], Mapping[str, float]] | None = None
    """state -> {metric: float}: once, at the end, on the state that validation chose."""

    pictures: Mapping[str, Callable[[State], np.ndarray]] = _NONE
    """{name: state -> (height, width, 3) uint8}: sample grids, confusion matrices."""

    rules: tuple[tuple[str, Any], ...] = ()
    """((path regex, PartitionSpec), ...): how the state shards; see `dlx.sharding`."""

    predict: Callable[[State, Any], Any] | None = None
    """(state, inputs) -> outputs: what `dlx.load` hands to people, jitted."""

    sample: Callable[[State, Any], Any] | None = None
    """(state, key) -> text, or an image (height, width, 3) uint8: the `sample` command."""

    check: Callable[[Any], Any] | None = None
    """inputs -> None, or raises BadInput: what people hand to `predict`, looked at before; a jitted
    function sees no values."""


@dataclasses.dataclass(frozen=True)
class Run:
    """How long a run is, and what happens when."""

    # A part of every configuration. `steps_per_call` and `keep` may change when a run is resumed.

    steps: int = 1000  # training steps
    seed: int = 0  # the one seed, of initialisation, data order and every random choice
    log_every: int = 50  # steps between rows of training metrics
    eval_every: int = 500  # steps between evaluations; the last step is always evaluated
    save_every: int = 500  # steps between checkpoints; the last step is always saved
    picture_every: int = 0  # steps between pictures; 0: only at the end
    keep: int = 3  # newest checkpoints kept, besides the best
    best: tuple[str, Literal["max", "min"]] | None = None  # the validation metric that chooses
    steps_per_call: int = 1  # training steps in one compiled call

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "save_every", "keep", "steps_per_call"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.picture_every < 0:
            raise BadInput(f"picture_every is {self.picture_every}: give 0 (at the end) or more")
        if self.best is not None and self.best[1] not in ("max", "min"):
            raise BadInput(f"best is {self.best}: its second word must be max or min")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"seed is {self.seed}: give a number from 0 to 4294967295")
        for name in ("log_every", "eval_every", "save_every", "picture_every"):
            if getattr(self, name) % self.steps_per_call:
                raise BadInput(
                    f"{name} {getattr(self, name)} is no multiple of steps_per_call "
                    f"{self.steps_per_call}: change either"
                )


def parameters(state: State) -> int:
    """How many numbers the state trains: the leaves below a "params", wherever it stands.

    >>> parameters({"gen": {"params": {"w": np.zeros((2, 3))}}, "step": np.zeros(())})
    6
    """
    return sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if "params" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    )


def best_step(table: Mapping[int, Mapping[str, float]], best: Any) -> int | None:
    """The evaluated step that `best` = (metric, "max" or "min") prefers; of equal ones the first.

    >>> best_step({10: {"validation/loss": 0.5}, 20: {"validation/loss": 0.3}},
    ...           ("validation/loss", "min"))
    20
    """
    if best is None:
        return None
    name, sign = best[0], 1 if best[1] == "max" else -1
    scores = {s: sign * row[name] for s, row in sorted(table.items()) if row[name] == row[name]}
    return max(scores, key=scores.__getitem__) if scores else None
