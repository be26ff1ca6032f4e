"""What can be wrong with an experiment is found from shapes, before anything compiles."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from dlx import checkpoint, feed, metrics, sharding
from dlx.errors import BadInput
from dlx.experiment import Experiment, Run


def check(experiment: Experiment, run: Run, given: Any, mesh: Any) -> tuple[Any, int, Any]:
    """-> (the state's shapes, each with its sharding; examples in a batch; an empty log window)"""
    if run.best is not None and run.best[0].split("/")[0] not in experiment.evals:
        raise BadInput(
            f"best names {run.best[0]!r} and the evaluations are "
            f"{', '.join(experiment.evals) or 'none'}: write EVALUATION/METRIC max or min"
        )
    abstract = jax.eval_shape(experiment.init, jax.random.key(run.seed), given)
    abstract = sharding.place(abstract, mesh, experiment.rules)
    batch = sharding.whole(feed.first(experiment, mesh), mesh)
    size = sharding.check_batch(batch, mesh)
    batch = sharding.placed(batch, mesh)
    empty = _check_step(experiment, abstract, batch)
    for name, measure in experiment.evals.items():
        if name in ("train", "test", "timing"):
            raise BadInput(f"an evaluation is named {name!r}, as other rows are: rename it")
        if names := getattr(measure, "names", None):  # an evaluator tells its metrics early
            found = [f"{name}/{k}" for k in names(abstract)]
            if run.best is not None and run.best[0].split("/")[0] == name:
                check_best(run, found)
    return abstract, size, empty


def check_best(run: Run, found: Any) -> None:
    if run.best is not None and run.best[0] not in found:
        names = ", ".join(found)
        raise BadInput(f"best names {run.best[0]!r} and the evaluations give {names}: use one")


def _check_step(experiment: Experiment, abstract: Any, batch: Any) -> Any:
    """An empty log window; a state that would change shape or dtype is named."""
    after, values = jax.eval_shape(experiment.step, abstract, batch)
    before, now = checkpoint.spec(abstract), checkpoint.spec(after)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise BadInput(
                f"one step turns the state{name and ' at ' + name} from "
                f"{before.get(name, 'absent')} into {now.get(name, 'absent')}: "
                "init and step must agree"
            )
    empty = jax.eval_shape(metrics.empty_window, values)
    for name, pair in empty["sums"].items():
        if pair[0].shape or pair[1].shape:
            raise BadInput(f"metric {name!r} has shape {pair[0].shape}: it must be a scalar")
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty)
