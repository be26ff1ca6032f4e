"""dlx: the canon of deep-learning architectures in JAX, as pure functions.

>>> import dlx
>>> dlx.Run(steps=10).steps
10
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dlx import memory

if TYPE_CHECKING:
    from dlx.cli import main as main
    from dlx.errors import BadInput as BadInput
    from dlx.experiment import Experiment as Experiment
    from dlx.experiment import Run as Run
    from dlx.loop import fit as fit
    from dlx.metrics import evaluator as evaluator
    from dlx.runs import load as load
    from dlx.sharding import make_mesh as make_mesh
    from dlx.step import TrainState as TrainState
    from dlx.step import make_step as make_step
    from dlx.step import train_state as train_state

__version__ = "0.1.0"

memory.keep()

# Opened when first used: `import dlx` costs little more than `import jax`.
_HOME = {
    "BadInput": "errors",
    "Experiment": "experiment",
    "Run": "experiment",
    "TrainState": "step",
    "evaluator": "metrics",
    "fit": "loop",
    "load": "runs",
    "main": "cli",
    "make_mesh": "sharding",
    "make_step": "step",
    "train_state": "step",
}
__all__ = [
    "BadInput",
    "Experiment",
    "Run",
    "TrainState",
    "__version__",
    "evaluator",
    "fit",
    "load",
    "main",
    "make_mesh",
    "make_step",
    "train_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dlx' has no attribute {name!r}")
    memory.at_once()
    value = getattr(importlib.import_module(f"dlx.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
