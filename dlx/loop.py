"""The only training loop. It sees `step(state, batch) -> (state, metrics)`: never a loss, an
optimizer or a model.

Read `fit`, then `_train`: the loop itself. Its order is fixed, and everything rests on it:
**evaluate (old state) -> save -> next batch -> step -> log**. Evaluations and saves see a state
before a step donates its buffers, and a save holds the window of metrics that is being summed, so
that a run that resumes writes the same rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlx import carry as carry_lib
from dlx import checkpoint, checks, feed, guard, metrics, processes, runs, sharding
from dlx import writers as writers_lib
from dlx.experiment import Experiment, Run, best_step, parameters

say = writers_lib.say


def fit(
    experiment: Experiment,
    run: Run,
    *,
    workdir: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    fresh: bool = False,
    given: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    writers: Sequence[writers_lib.Writer] | None = None,
    profile: bool = False,
) -> tuple[Any, list[dict[str, float]]]:
    """Trains an experiment, or goes on where its folder stands.

    Args:
      experiment: the functions.
      run: how long, and what happens when.
      workdir: the run folder; None keeps everything in memory.
      config: the whole configuration, nested plain values; a folder with another one is refused.
      fresh: starts over in a folder that is in use.
      given: handed to `experiment.init`: an earlier phase's state, pretrained weights.
      mesh: see `dlx.make_mesh`; None puts all devices on the data axis.
      writers: callables (step, {name: float}); None shows progress, [] is silent. The files of
        the run folder are written in any case. Of several processes only the first writes.
      profile: writes a trace of a few steps to the run folder.

    Returns:
      (state, history): the state that validation chose (`run.best`), or the last one; and the
      rows of metrics.jsonl. Ctrl-C saves, and returns the state and history so far.

    Raises:
      BadInput: something that cannot work, before anything compiles.
      FloatingPointError: a metric or the state is not finite; such a state is never saved.

    >>> import dlx, jax, jax.numpy as jnp
    >>> def init(key, given):
    ...     return jnp.zeros(())
    >>> def step(w, batch):
    ...     return w + 0.5 * (batch["x"].mean() - w), {"distance": abs(w - 3.0)}
    >>> def data(first_step, rows):
    ...     while True:
    ...         yield {"x": np.full(8, 3.0, np.float32)[rows(8)]}
    >>> w, history = dlx.fit(
    ...     dlx.Experiment(init, step, data), dlx.Run(steps=20, log_every=10), writers=[])
    >>> round(float(w), 3), [row["step"] for row in history]
    (3.0, [10, 20])
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    folder = None if workdir is None else Path(workdir)
    asked = {"run": dataclasses.asdict(run), "mesh": dict(mesh.shape),
             "workdir": folder and str(folder.absolute())}  # fmt: skip
    processes.alike(guard.flat({**(config or {}), **asked}))
    # Traced once, by the check: the calls that it becomes a part of find it traced.
    experiment = experiment._replace(step=jax.jit(functools.partial(experiment.step)))
    # Before a folder is taken or erased:
    checked = processes.agreed(lambda: checks.check(experiment, run, given, mesh))
    around = jax.sharding.get_mesh()
    try:
        with contextlib.ExitStack() as stack:

            def take() -> None:
                assert folder is not None
                stack.enter_context(guard.lock(folder))
                guard.check_config(folder, config or {"run": dataclasses.asdict(run)}, fresh)

            if folder is not None:
                processes.told(take)
            return _fit(experiment, run, folder, given, mesh, writers, profile, *checked)
    finally:
        if jax.sharding.get_mesh() != around:  # an interrupt came just where a `with` ended
            jax.set_mesh(around)


def _fit(
    experiment: Experiment, run: Run, folder: Any, given, mesh, writers, profile, abstract, size,
    empty,
):  # fmt: skip
    # ---- Restore: the newest whole checkpoint, and the log cut back to it ----
    start, record, rows = 0, None, {}
    if folder is not None:
        start, record, rows = runs.find(folder, run)

    # ---- State ----
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    if folder is not None:
        processes.told(lambda: guard.check_disk(folder, abstract))
        if processes.first():
            environment = guard.environment() | {"mesh": dict(mesh.shape)}
            guard.write_json(folder / "environment.json", environment)
    if folder is not None and record is not None:
        say(f"resuming {folder} at step {start}")
        state = checkpoint.restore(folder / "checkpoints", start, record, abstract)
        window = runs.window_from(record["window"], empty)
    else:
        places = jax.tree.map(lambda x: x.sharding, abstract)
        key = jax.random.key(run.seed)
        state = jax.jit(experiment.init, out_shardings=places)(key, given)
        window = empty
    carry = (state, *jax.device_put((window, np.int32(start)), replicated))

    # ---- Train, then test what validation chose ----
    if not processes.first():
        writers = []
    elif writers is None:
        writers = [writers_lib.progress(run.steps, start)]
    if folder is not None and processes.first():
        writers = [*writers, *writers_lib.files(folder, start)]
    log = writers_lib.Log(rows, list(writers), size)
    table = {} if record is None else runs.evaluations(record)
    try:
        with feed.batches(experiment, start, run, mesh) as batches:
            state, best, complete = _train(
                experiment, run, folder, mesh, log, table, carry, batches, profile
            )
        if complete:
            state = _finish(experiment, run, folder, mesh, log, table, state, best, abstract)
            processes.wait()  # for the files, which the first may still be writing
    except KeyboardInterrupt as stop:  # within the test or the pictures: training is saved
        if isinstance(stop, guard.Stopped):
            raise
        say("stopped after the last step: the same command goes on")
    finally:
        log.close()
    return state, log.history


# ---- The loop ----------------------------------------------------------------------------------


def _train(
    experiment: Experiment, run: Run, folder: Any, mesh, log, table, carry,
    batches: Iterator[tuple[int, Any]], profile,
):  # fmt: skip
    """Steps until `run.steps` or Ctrl-C -> (state, best state where there is no folder, whether
    the run is complete). Fills `table`, {step: evaluation}, and `log`."""
    arrays, pack, unpack = carry_lib.packed(carry)
    box = [arrays]  # state, log window, position: one consistent set, whenever an interrupt comes
    done: int = int(carry[2])
    ahead = [carry[2]] * feed.AHEAD
    saved: int = done
    best_state = None
    saver: Any = None
    if folder is not None:
        saver = checkpoint.Saver(folder / "checkpoints", runs.keeper(run), say)

    def save(amend: bool = False) -> None:
        nonlocal saved
        assert folder is not None
        state, window, _ = unpack(box[0])
        log.flush()  # first: the record knows how long the log is
        window = jax.device_get(window)
        metrics.check_window(window)
        if not bool(guard.all_finite(state)):
            raise FloatingPointError(f"the state is not finite at step {done}")
        record = runs.record(folder, table, window)
        if amend:
            saver.amend(done, record)
        else:
            saver.save(done, state, record)
        saved = done

    single, several = carry_lib.compiled(experiment.step, run, arrays, pack, unpack)
    traced = folder if profile and processes.first() else None
    trace = writers_lib.Profile(None if traced is None else traced / "profile")
    straight = sharding.straight(mesh)
    nothing_from_the_host = contextlib.nullcontext if straight else _nothing_from_the_host
    try:
        while True:
            with log.paused():
                # 1. Evaluate the state as it stands.
                due = done == run.steps or (done > 0 and done % run.eval_every == 0)
                if evaluated := due and done not in table:
                    log.flush()
                    with jax.set_mesh(mesh):
                        results = evaluate(experiment, unpack(box[0])[0])
                    _check_finite(done, results)
                    checks.check_best(run, results)
                    table[done] = results
                    log.emit(done, "eval", results)
                best = best_step(table, run.best)

                # 2. Save it; an evaluation that came after the save goes into its record.
                if saver is not None and done > 0:
                    if done != saved and (done % run.save_every == 0 or done in (run.steps, best)):
                        save()
                    elif done == saved and evaluated:
                        save(amend=True)
                elif evaluated and done == best:
                    best_state = jax.tree.map(jnp.copy, unpack(box[0])[0])
                if run.picture_every and done > 0 and done % run.picture_every == 0:
                    _draw(experiment, unpack(box[0])[0], mesh, folder, f"_{done:07d}")
            if done >= run.steps:
                break
            if processes.stopping():
                raise guard.Stopped

            # 3. The next batch, or the next K in one. The host goes a few calls ahead, no further:
            # a signal is heard soon, batches do not pile up on the devices, and several CPU devices
            # never have the 32 programs in flight at which XLA lets them wait for each other.
            jax.block_until_ready(ahead[0])
            k, batch = next(batches)

            # 4. Step. An interrupt between the call and the assignment of its result would lose
            # the donated state; `map` into a slice stays within C, where no interrupt comes, as
            # long as what goes in and out is lists of arrays.
            guard.unsaved.set()
            with trace, nothing_from_the_host():
                box[:] = map(several if k > 1 else single, *((x,) for x in box[0]), (batch,))
            ahead = [*ahead[1:], box[0][1][-1]]  # the position after each: it is not donated
            done += k

            # 5. Log, one window late: so the device is never waited for.
            if done % run.log_every == 0 or done == run.steps:
                log.flush()
                log.later(done, unpack(box[0])[1])
        log.flush()
        if saver is not None:
            saver.wait()
        return unpack(box[0])[0], best_state, True
    except KeyboardInterrupt as stop:
        # It may have come between any two lines above: the rows of this step are told again, and
        # what the log has already it leaves out.
        guard.heard.set()
        if jax.process_count() > 1 and not isinstance(stop, guard.Stopped):
            raise  # nobody knows at which step the other processes are
        state, window, position = unpack(box[0])
        if any(x.is_deleted() for x in box[0][0]):  # only in a call that compiles
            say("stopped within a step: the last checkpoint stands")
        elif saver is not None and folder is not None:
            done = int(position)
            if done % run.log_every == 0 or done == run.steps:
                log.later(done, window)
            log.flush()
            if done in table:
                log.emit(done, "eval", table[done])
            if processes.first():
                log.rewrite(folder / "metrics.jsonl")
            if done != saved:
                save()
            saver.wait()
            say(f"stopped at step {done}, saved in {folder}: the same command goes on")
        if isinstance(stop, guard.Stopped):
            guard.leave()
            raise
        return state, None, False
    except FloatingPointError as e:
        if saver is not None:
            saver.wait()
        raise FloatingPointError(f"{e}; {runs.last_good(folder)}") from None
    finally:
        trace.stop()
        if saver is not None:
            saver.close()
        guard.unsaved.clear()


@contextlib.contextmanager
def _nothing_from_the_host() -> Iterator[None]:
    """What a step takes is on the devices, or it is an error. A generator, so that the guard ends
    with it where an interrupt comes just as the `with` does."""
    with jax.transfer_guard_host_to_device("disallow"):
        yield


# ---- Before and after --------------------------------------------------------------------------


def evaluate(experiment: Experiment, state: Any) -> dict[str, float]:
    """All evaluations of a state: {"validation/accuracy": 0.99, ...}."""
    return {
        f"{name}/{k}": float(v)
        for name, measure in experiment.evals.items()
        for k, v in measure(state).items()
    }


def _check_finite(step: int, values: Mapping[str, float]) -> None:
    if bad := [k for k, v in values.items() if not math.isfinite(v)]:
        raise FloatingPointError(f"{' and '.join(bad)} not finite at step {step}")


def _draw(experiment: Experiment, state: Any, mesh: Any, folder: Path | None, suffix: str) -> None:
    if folder is not None:
        with jax.set_mesh(mesh):
            for name, draw in experiment.pictures.items():
                image = draw(state)
                if processes.first():
                    writers_lib.png(folder / "pictures" / f"{name}{suffix}.png", image)


def _finish(experiment, run, folder, mesh, log, table, state, best_state, abstract):
    """The state that validation chose; its test, its pictures and result.json, once."""
    chosen = best_step(table, run.best) or run.steps
    if chosen != run.steps and folder is None:
        state = best_state
    elif chosen != run.steps:
        record = processes.told(lambda: checkpoint.verify(folder / "checkpoints", chosen))
        state = checkpoint.restore(folder / "checkpoints", chosen, record, abstract)
    if folder is not None and processes.told((folder / "result.json").exists):
        return state
    tested = {}
    if experiment.test is not None:
        with jax.set_mesh(mesh):
            tested = {f"test/{k}": float(v) for k, v in experiment.test(state).items()}
        _check_finite(run.steps, tested)
        log.emit(run.steps, "test", tested)
    if folder is not None:
        _draw(experiment, state, mesh, folder, "")
    if folder is not None and processes.first():
        writers_lib.curves(folder, log.history)
        log.end(run.steps)
        result = {
            "step": chosen,
            "steps": run.steps,
            "seed": run.seed,
            "parameters": parameters(abstract),
            "validation": table[chosen],
            "test": {k.removeprefix("test/"): v for k, v in tested.items()},
        }
        guard.write_json(folder / "result.json", result)
    return state
