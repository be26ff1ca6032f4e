"""A run folder read back: where to resume, and what to load for other uses."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dlx import checkpoint, guard, processes, sharding, writers
from dlx.errors import BadInput
from dlx.experiment import Experiment, Run, best_step

# ---- What the loop keeps in a checkpoint's record ----------------------------------------------


def record(folder: Path, table: Mapping[int, Any], window: Mapping[str, Any]) -> dict[str, Any]:
    """All that resuming needs besides the state: evaluations, log length, log window."""
    return {
        "evals": {str(step): row for step, row in table.items()},
        "log_bytes": (folder / "metrics.jsonl").stat().st_size
        if (folder / "metrics.jsonl").exists()
        else 0,
        "window": jax.tree.map(lambda x: x.item(), dict(window)),  # floats print exactly
    }


def evaluations(record: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """{step: evaluation} as the record has it."""
    return {int(step): row for step, row in record["evals"].items()}


def window_from(saved: Mapping[str, Any], like: Any) -> Any:
    """The log window of a record, with the shapes and dtypes of `like`."""
    leaves = jax.tree.leaves(dict(saved))
    shapes, treedef = jax.tree.flatten(like)
    if len(leaves) != len(shapes):
        raise BadInput("the metrics of this experiment changed since the checkpoint: use --fresh")
    return treedef.unflatten([np.asarray(x, s.dtype) for x, s in zip(leaves, shapes, strict=True)])


def keeper(run: Run) -> Callable[[list[int], Mapping[str, Any]], set[int]]:
    """Which checkpoints stay: the newest `run.keep` and the best. A function of what is on disk
    and the evaluations, so it does not matter when a process died."""

    def keep(on_disk: list[int], newest: Mapping[str, Any]) -> set[int]:
        return {*sorted(on_disk)[-run.keep :], best_step(evaluations(newest), run.best) or 0}

    return keep


def last_good(folder: Path | None) -> str:
    saved = checkpoint.steps(folder / "checkpoints") if folder is not None else []
    return f"the last good checkpoint is step {saved[-1]}" if saved else "no checkpoint was saved"


def find(folder: Path, run: Run) -> tuple[int, dict[str, Any] | None, dict[tuple[int, str], dict]]:
    """Where to resume -> (step, its record or None, the log's rows). Cuts the log back to there,
    and names every checkpoint that it passes over. Process 0 does it and tells the others.

    Raises:
      BadInput: the run is complete and its checkpoints are gone.
    """
    step, record, rows = processes.told(lambda: _find(folder, run))
    kinds = {}
    for row in rows:
        group = next((name.split("/")[0] for name in row if name != "step"), "")
        kinds[int(row["step"]), group if group in ("train", "test") else "eval"] = row
    return step, record, kinds


def _find(folder: Path, run: Run) -> tuple[int, dict[str, Any] | None, list[dict[str, Any]]]:
    saved, log = folder / "checkpoints", folder / "metrics.jsonl"
    checkpoint.sweep(saved, writers.say)
    length = log.stat().st_size if log.exists() else 0

    def usable(step: int, record: Mapping[str, Any]) -> bool:
        """A checkpoint needs its log, and the best one before it: that may become the result."""
        if record["log_bytes"] > length:
            writers.say(f"{log} is shorter than when step {step} was saved: the one before is used")
            return False
        best = best_step(evaluations(record), run.best)
        try:
            if best is not None and best != step:
                checkpoint.verify(saved, best)
        except checkpoint.Damaged as e:
            writers.say(f"{e}, the best so far: a checkpoint before it is used")
            return False
        return True

    found = checkpoint.newest(saved, usable, writers.say)
    if found is None and (folder / "result.json").exists():
        raise BadInput(f"{folder} is complete but no whole checkpoint is left: --fresh starts over")
    step, record = found or (0, None)
    checkpoint.discard_after(saved, step)
    if not (folder / "result.json").exists() or step < run.steps:
        (folder / "result.json").unlink(missing_ok=True)
        writers.cut(log, record["log_bytes"] if record else 0)
    return step, record, writers.read(log)


# ---- Loading -----------------------------------------------------------------------------------


class Loaded(NamedTuple):
    """A trained run."""

    config: Any  # the experiment's own dataclass
    variables: Any  # {"params": ..., ...}; the whole state where it is no TrainState
    predict: Callable[[Any], Any]  # inputs -> outputs, jitted
    state: Any
    step: int


def load(
    run_folder: str | Path,
    build: Callable[[Any], Any] | None = None,
    config_class: type | None = None,
) -> Loaded:
    """A run folder -> its configuration, variables and predict function.

    Args:
      run_folder: where a run was trained, finished or not.
      build, config_class: the experiment's; by default those of the experiment of this name in
        the `experiments` folder of the checkout.

    Returns:
      The checkpoint that validation chose so far, or the newest.

    Raises:
      BadInput: there is no such run, no whole checkpoint, or it belongs to another model.
    """
    folder = Path(run_folder)
    if folder.is_file():
        raise BadInput(f"{folder} is a file: dlx loads run folders, and never a pickle")
    stored = config_of(folder)
    if build is None or config_class is None:
        module = find_experiment(stored.get("experiment", ""))
        build, config_class = module.build, module.Config
    assert build is not None and config_class is not None
    config = structure(stored["config"], config_class, folder / "config.json")
    experiment, state, step = restore(build(config), config, folder)
    apply = None if experiment.predict is None else jax.jit(experiment.predict)

    def predict(inputs: Any) -> Any:
        if apply is None:
            raise BadInput(f"the experiment of {folder} defines no predict function")
        if experiment.check is not None:
            experiment.check(inputs)
        return apply(state, inputs)

    return Loaded(config, getattr(state, "variables", state), predict, state, step)


def phases(
    built: Experiment | Mapping[str, tuple[Run, Callable[[Any], Experiment]]],
    config: Any,
    folder: Path,
) -> list[tuple[Path, Run, Callable[[Any], Experiment]]]:
    """(folder, run, previous state -> experiment) of every phase of what `build` returned.

    An Experiment is one phase, in the run folder itself; a mapping {name: (run, function)} is
    several, each in a folder of its name.
    """
    if isinstance(built, Experiment):
        return [(folder, config.run, lambda previous: built)]
    return [(folder / name, run, make) for name, (run, make) in built.items()]


def restore(
    built: Any, config: Any, folder: Path, mesh: jax.sharding.Mesh | None = None
) -> tuple[Experiment, Any, int]:
    """(experiment, its state, step) of a trained run: of its last phase where it has several."""
    experiment: Any = None
    state, step = None, 0
    for place, run, make in phases(built, config, folder):
        experiment = make(state)
        state, step = chosen_state(place, experiment, run, given=state, mesh=mesh)
    return experiment, state, step


def chosen_state(
    folder: Path,
    experiment: Experiment,
    run: Run,
    *,
    given: Any = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Any, int]:
    """(state, step) that validation chose so far, or the newest. Reads only.

    Raises:
      BadInput: there is no whole checkpoint, or it belongs to another model.
    """
    step, record = processes.told(lambda: _chosen(folder, run))
    mesh = sharding.make_mesh() if mesh is None else mesh
    abstract = jax.eval_shape(experiment.init, jax.random.key(run.seed), given)
    abstract = sharding.place(abstract, mesh, experiment.rules)
    return checkpoint.restore(folder / "checkpoints", step, record, abstract), step


def _chosen(folder: Path, run: Run) -> tuple[int, dict[str, Any]]:
    """(step, verified record) of `chosen_state`."""
    found = checkpoint.newest(folder / "checkpoints", notify=writers.say)
    if found is None:
        raise BadInput(f"{folder} holds no whole checkpoint: train first, or anew with --fresh")
    step, record = found
    best = best_step(evaluations(record), run.best)
    if best is not None and best != step:
        try:
            step, record = best, checkpoint.verify(folder / "checkpoints", best)
        except checkpoint.Damaged as e:
            raise BadInput(f"{e}: the same train command makes it anew") from e
    return step, record


def config_of(folder: Path) -> dict[str, Any]:
    """config.json of a run folder.

    Raises:
      BadInput: there is no run, or the file is damaged.
    """
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} is no run folder (no config.json): train first, or correct it")
    stored = guard.read_json(folder / "config.json")
    if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
        path = folder / "config.json"
        raise BadInput(f"{path} is damaged (it has no 'config'): mend it, or use --fresh")
    return stored


def structure(values: Mapping[str, Any], config_class: type, source: Path) -> Any:
    """Plain values -> the dataclass."""
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=True)
    try:
        return converter.structure(values, config_class)
    except BadInput as e:
        raise BadInput(f"{source}: {e}; mend it, or use --fresh") from e
    except Exception as e:
        first = _innermost(e) or cattrs.transform_error(e)[0]
        raise BadInput(f"{source} does not fit: {first}; mend it, or use --fresh") from e


def _innermost(error: BaseException) -> str:
    """What a dataclass's own check said, from within cattrs' groups of errors."""
    if isinstance(error, BadInput):
        return str(error)
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return next((text for e in inner if (text := _innermost(e))), "")


def experiments() -> Sequence[str]:
    """The names in the `experiments` folder of the checkout: a closed set, no import path."""
    found = importlib.util.find_spec("experiments")
    places = found.submodule_search_locations if found else None
    files = [p for place in places or () for p in Path(place).glob("*.py")]
    return sorted(p.stem for p in files if "\nCARD = " in p.read_text())  # not the tools


def find_experiment(name: str) -> Any:
    """The module of an experiment by its name."""
    known = experiments()
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, 2, 0.5)
        hint = f" (is it {' or '.join(near)}?)" if near else ""
        raise BadInput(
            f"experiment {name!r} is not among the {len(known)} here"
            f"{hint}: start in the checkout, or pass build and config_class"
        )
    return importlib.import_module(f"experiments.{name}")
