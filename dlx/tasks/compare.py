"""Several experiments on the same batches: a comparison in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from dlx.experiment import Experiment


def side_by_side(members: Mapping[str, Experiment]) -> Experiment:
    """{name: experiment} -> one whose state is {name: state} and whose metrics are METRIC_NAME.

    All start from the same key and see the same batches, which are the first one's. "loss" is the
    sum of theirs: what it tells is that all of them still learn.

    >>> import jax.numpy as jnp
    >>> one = Experiment(lambda key, given: jnp.ones(()), lambda w, batch: (w, {"loss": w}))
    >>> step = side_by_side({"a": one, "b": one}).step
    >>> {k: float(v) for k, v in step({"a": jnp.ones(()), "b": jnp.ones(())}, {})[1].items()}
    {'loss_a': 1.0, 'loss_b': 1.0, 'loss': 2.0}
    """
    first = next(iter(members.values()))

    def init(key: jax.Array, given: Any) -> Any:
        return {name: member.init(key, given) for name, member in members.items()}

    def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        new, values = {}, {}
        for name, member in members.items():
            new[name], found = member.step(state[name], batch)
            values |= {f"{metric}_{name}": value for metric, value in found.items()}
        return new, values | {"loss": sum(values[f"loss_{name}"] for name in members)}

    def together(measures: Mapping[str, Callable[[Any], Mapping[str, float]]]) -> Any:
        def evaluate(state: Any) -> dict[str, float]:
            return {
                f"{metric}_{name}": value
                for name, measure in measures.items()
                for metric, value in measure(state[name]).items()
            }

        def names(state: Any) -> list[str]:
            return [
                f"{metric}_{name}"
                for name, measure in measures.items()
                for metric in measure.names(state[name])  # type: ignore[attr-defined]
            ]

        if all(hasattr(m, "names") for m in measures.values()):
            evaluate.names = names  # type: ignore[attr-defined]
        return evaluate

    tests = {name: member.test for name, member in members.items() if member.test}
    return Experiment(
        init=init,
        step=step,
        data=first.data,
        evals={k: together({n: m.evals[k] for n, m in members.items()}) for k in first.evals},
        test=together(tests) if tests else None,
    )
