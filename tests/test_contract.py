"""The loop's promises, kept for five shapes of training that it knows nothing of: a run that was
stopped, crashed or killed ends as one that was not, to the bit."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import carry, checkpoint, feed, guard, loop, metrics, runs, sharding, writers
from dlx.data import arrays, digits
from tests import shapes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_curves(monkeypatch):
    """Matplotlib takes longer than these runs, and has tests of its own."""
    monkeypatch.setattr(writers, "curves", lambda folder, rows: None)


# ---- Tools -------------------------------------------------------------------------------------


def numbers(tree):
    """{path: array} of a state; a PRNG key is the integers it is made of."""
    return {
        sharding.path_of(path): np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(a, b):
    """Every leaf of two states is the same to the bit."""
    a, b = numbers(a), numbers(b)
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert np.array_equal(a[name], b[name]), name


def saved(experiment, run, folder, steps, mesh, given=None):
    """{step: state} of these checkpoints in a run folder."""
    abstract = jax.eval_shape(experiment.init, jax.random.key(run.seed), given)
    abstract = sharding.place(abstract, mesh, experiment.rules)
    place = folder / "checkpoints"
    return {
        step: checkpoint.restore(place, step, checkpoint.verify(place, step), abstract)
        for step in steps
    }


def assert_same_run(shape, config, one, other, mesh):
    """Log, result, last and best checkpoint of two complete runs are the same to the bit, phase by
    phase."""
    given = None
    there = zip(*(runs.phases(shape.build(config), config, x) for x in (one, other)), strict=True)
    for (a, run, make), (b, _, _) in there:
        for name in ("metrics.jsonl", "result.json"):
            assert (a / name).read_bytes() == (b / name).read_bytes(), name
        experiment = make(given)
        chosen = guard.read_json(a / "result.json")["step"]
        steps = {chosen, run.steps}
        states, others = (saved(experiment, run, x, steps, mesh, given) for x in (a, b))
        for step in steps:
            assert_same(states[step], others[step])
        given = states[chosen]


def play(shape, config, folder, mesh, crash=None, last=False):
    """What the command line does, in this process; False where Ctrl-C stopped it.

    The writer `crash` is given to the first phase, or to the last.
    """
    state = None
    phases = runs.phases(shape.build(config), config, folder)
    for place, run, make in phases:
        mine = crash is not None and place == phases[-1 if last else 0][0]
        told = [crash] if mine else []
        state, _ = dlx.fit(make(state), run, workdir=place, given=state, mesh=mesh, writers=told)
        if not (place / "result.json").exists():
            return False
    return True


class Crash:
    """A writer that raises once: at the first row from a step on that has a name like this."""

    def __init__(self, step, error, name=""):
        self.step, self.error, self.name, self.raised = step, error, name, False

    def __call__(self, step, values):
        if step >= self.step and not self.raised and any(self.name in k for k in values):
            self.raised = True
            raise self.error("on purpose")


def recorded(experiment, seen, stop=None):
    """The experiment, with Ctrl-C in place of batch `stop`.

    Each time that data is asked for, `seen` gets a list of the batches, (step, batch); the last
    list is what was trained on.
    """

    def data(first_step, rows):
        seen.append([])
        for t, batch in enumerate(experiment.data(first_step, rows), first_step):
            if t == stop:
                raise KeyboardInterrupt
            seen[-1].append((t, batch))
            yield batch

    return experiment._replace(data=data)


# ---- Five shapes -------------------------------------------------------------------------------

CRASHES = [  # (row from which on, what, whether in the last phase)
    (5, RuntimeError, False),  # between two saves
    (30, KeyboardInterrupt, True),  # within the evaluation of a step that is to be saved
    (39, RuntimeError, True),  # in the last window
]


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("name", shapes.slow_but(shapes.SHAPES, "bn_dropout_ema", "bilevel"))
def test_crashes_leave_no_trace(name, tmp_path, mesh):
    """A run that died or was stopped again and again is the run that was not."""
    shape = shapes.SHAPES[name]
    config = shape.Config(run=dataclasses.replace(shape.Config().run, seed=5))
    assert play(shape, config, tmp_path / "whole", mesh)
    for step, error, last in CRASHES:
        try:
            assert not play(shape, config, tmp_path / "broken", mesh, Crash(step, error), last=last)
        except RuntimeError as e:
            assert str(e) == "on purpose"
    assert play(shape, config, tmp_path / "broken", mesh)
    assert_same_run(shape, config, tmp_path / "whole", tmp_path / "broken", mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", shapes.SHAPES)
def test_kill_9_leaves_no_trace(name, tmp_path, mesh):
    """As above with processes, which get no chance to tidy up."""
    shape = shapes.SHAPES[name]
    changes = ["--steps", "400"] + ["--pretrain-steps", "400"] * (name == "dbn")

    def start(folder):
        command = [sys.executable, "-m", "tests.shapes", name, "--workdir", str(folder), *changes]
        with open(tmp_path / "output", "a") as out:
            return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)

    def finish(folder):
        assert start(folder).wait(300) == 0, (tmp_path / "output").read_text()[-2000:]

    def kill(folder, place, beyond):
        """SIGKILL when a checkpoint after step `beyond` is there, and a log row after that."""
        process, deadline = start(folder), time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "not killed in time"
            newest = max(checkpoint.steps(place / "checkpoints"), default=0)
            rows = [int(row["step"]) for row in writers.read(place / "metrics.jsonl")]
            if newest > beyond and max(rows, default=0) > newest:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        assert not (folder / "result.json").exists()

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    config = runs.structure(runs.config_of(whole)["config"], shape.Config, whole)
    assert config.run.steps == 400
    places = [place for place, _, _ in runs.phases(shape.build(config), config, killed)]
    for place, beyond in ((places[0], 0), (places[0], 100), (places[-1], 200)):
        kill(killed, place, beyond)
    finish(killed)
    assert (whole / "result.json").read_bytes() == (killed / "result.json").read_bytes()
    assert_same_run(shape, config, whole, killed, mesh)


def learn(name, mesh, steps, every, **changes):
    """(history of each phase) of a run in memory that only has to learn."""
    shape = shapes.SHAPES[name]
    run = dataclasses.replace(
        shape.Config().run,
        **dict.fromkeys(("log_every", "eval_every", "save_every", "steps_per_call"), every),
        steps=steps,
    )
    config = shape.Config(run=run, **changes)
    state, histories = None, []
    for _, run, make in runs.phases(shape.build(config), config, Path()):
        state, history = dlx.fit(make(state), run, given=state, mesh=mesh, writers=[])
        histories.append(history)
    return histories


def test_gan_finds_all_modes(mesh):
    """At first all samples lie in the middle, 1.0 from every mode."""
    [history] = learn("gan", mesh, 1200, 100)
    last = history[-1]
    assert last["validation/modes"] == 8 and last["validation/distance"] < 0.25


def test_policy_gradient_keeps_the_pole_up(mesh):
    """A random policy holds it for 20 steps or so."""
    [history] = learn("policy_gradient", mesh, 120, 20)
    assert history[0]["train/return"] < 40
    assert max(row["train/return"] for row in history) > 90


def test_dbn_phases_build_on_each_other(mesh):
    """The machine learns to reconstruct (0.2 untrained, 0.07 the mean image), the classifier
    starts from it and learns to classify."""
    first, second = learn("dbn", mesh, 200, 50, pretrain_steps=200)
    assert first[-1]["test/reconstruction"] < 0.045
    assert second[-1]["test/accuracy"] > 0.9


def test_dbn_classifier_starts_from_the_machine():
    config = shapes.DBN()
    (_, machine), (_, classifier) = shapes.dbn(config).values()
    given = machine(None).init(jax.random.key(3), None)
    state = classifier(given).init(jax.random.key(4), given)
    assert np.array_equal(state.params[0]["w"], given.params["w"])


def test_bilevel_finds_the_operation(mesh):
    """The choice starts at 0.25 for each; the loss of an untrained network is 17."""
    [history] = learn("bilevel", mesh, 200, 50)
    assert history[-1]["validation/square"] > 0.5 and history[-1]["validation/loss"] < 0.1


def test_bn_dropout_ema_classifies(mesh):
    [history] = learn("bn_dropout_ema", mesh, 60, 20)
    assert history[-1]["test/accuracy"] > 0.85


# ---- A resume at every step --------------------------------------------------------------------

EPOCHS = shapes.Carried(  # three of 125 examples are 12 batches of 32: two straddle epochs
    examples=125,
    run=dlx.Run(
        steps=12,
        seed=5,
        log_every=4,
        eval_every=5,
        save_every=1,
        keep=12,
        best=("validation/accuracy", "max"),
    ),
)
SELDOM = dataclasses.replace(EPOCHS.run, save_every=100)  # saves are what costs these tests time
NAMED = {"what": "the same run, however often it saves"}


class Epochs(NamedTuple):
    """A run without an interruption that saves after every step."""

    experiment: dlx.Experiment  # traced for the first of many starts only
    folder: Path
    batches: list  # (step, batch)
    states: dict  # after every step
    final: Any
    history: list


@pytest.fixture(scope="module")
def epochs(mesh, tmp_path_factory):
    experiment = shapes.bn_dropout_ema(EPOCHS)
    experiment = experiment._replace(step=jax.jit(experiment.step))
    folder, seen, run = tmp_path_factory.mktemp("epochs"), [], EPOCHS.run
    final, history = dlx.fit(
        recorded(experiment, seen), run, workdir=folder, config=NAMED, mesh=mesh, writers=[]
    )
    states = saved(experiment, run, folder, range(1, run.steps + 1), mesh)
    return Epochs(experiment, folder, seen[-1], states, final, history)


def assert_as_uninterrupted(epochs, state, history, folder, mesh):
    """What fit returned and what lies in the folder is that of the one run, to the bit."""
    assert_same(state, epochs.final)
    assert history == epochs.history
    for name in ("metrics.jsonl", "result.json"):
        assert (folder / name).read_bytes() == (epochs.folder / name).read_bytes(), name
    last = saved(epochs.experiment, SELDOM, folder, [12], mesh)
    assert_same(last[12], epochs.states[12])


def assert_same_batches(some, others):
    assert [t for t, _ in some] == [t for t, _ in others]
    for (_, a), (_, b) in zip(some, others, strict=True):
        assert_same(a, b)


@pytest.mark.usefixtures("no_curves")
def test_ctrl_c_after_every_step(epochs, tmp_path, mesh):
    """Twelve starts of one step each: states, batches, log and result are those of one start."""
    batches = []
    for step in range(1, 13):
        seen = []
        one = recorded(epochs.experiment, seen, stop=step)
        state, rows = dlx.fit(one, SELDOM, workdir=tmp_path, mesh=mesh, writers=[])
        batches += seen[-1]
        assert rows == writers.read(tmp_path / "metrics.jsonl")
        if step < 12:
            assert_same(state, epochs.states[step])
    assert_as_uninterrupted(epochs, state, rows, tmp_path, mesh)
    assert_same_batches(batches, epochs.batches)
    assert [t for t, _ in batches] == list(range(12))


@pytest.mark.usefixtures("no_curves")
def test_death_after_every_save(epochs, tmp_path, mesh):
    """A folder as it was right after any save, whose log went on and broke off within a row, is
    completed to the same run from the same batches."""
    for step in range(1, 12):
        folder, seen = tmp_path / str(step), []
        shutil.copytree(epochs.folder, folder)
        (folder / "result.json").unlink()
        for later in range(step + 1, 13):
            (folder / "checkpoints" / f"{later}.json").unlink()
            shutil.rmtree(folder / "checkpoints" / str(later))
        log, record = folder / "metrics.jsonl", checkpoint.verify(folder / "checkpoints", step)
        beyond = b'{"step": 99, "train/loss": 1.0}\n{"step": 100, "tra'
        log.write_bytes(log.read_bytes()[: record["log_bytes"]] + beyond)
        one = recorded(epochs.experiment, seen)
        state, rows = dlx.fit(one, SELDOM, workdir=folder, config=NAMED, mesh=mesh, writers=[])
        assert_as_uninterrupted(epochs, state, rows, folder, mesh)
        assert_same_batches(seen[-1], epochs.batches[step:])


# ---- Several steps in one call -----------------------------------------------------------------


def perceptron(run):
    """64 -> 32 -> 10 with Adam, on digits."""
    tx = shapes.adam(1e-3)

    def init(key, given):
        return dlx.train_state(key, {"params": shapes.mlp(key, 64, 32, 10)}, tx)

    def loss_fn(params, model_state, batch, key):
        logits = shapes.apply_mlp(params, batch["image"].reshape(-1, 64), jnp.tanh)
        target = jax.nn.one_hot(batch["label"], 10, dtype=logits.dtype)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        return loss, (model_state, {"accuracy": metrics.correct(logits, batch["label"]).mean()})

    data = arrays.batches(lambda: digits.load()["train"], 32, run.seed)
    return dlx.Experiment(init, dlx.make_step(loss_fn, tx), data)


def convolutional(run):
    return shapes.bn_dropout_ema(shapes.Carried(run=run))._replace(evals={}, test=None)


def in_dtype(experiment, dtype):
    """The experiment with every floating leaf of its state and its batches in `dtype`."""

    def cast(tree):
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
        )

    return experiment._replace(
        init=lambda key, given: cast(experiment.init(key, given)),
        data=lambda first_step, rows: map(cast, experiment.data(first_step, rows)),
    )


def assert_close(a, b, tolerance):
    """No leaf is further from its counterpart than `tolerance` times its largest value."""
    a, b = numbers(a), numbers(b)
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        assert x.dtype == y.dtype, name
        if np.issubdtype(x.dtype, np.floating):
            assert abs(x - y).max() <= tolerance * abs(y).max(), name
        else:
            assert np.array_equal(x, y), name


def check_several(make, dtype, tolerance, folder, mesh):
    run = dlx.Run(steps=42, log_every=4, eval_every=8, save_every=12)
    experiment = in_dtype(make(run), dtype)
    expected, history = dlx.fit(experiment, run, mesh=mesh, writers=[])
    assert any(np.asarray(x).dtype == dtype for x in jax.tree.leaves(expected.params))
    assert [row["step"] for row in history] == [*range(4, 41, 4), 42]

    def fit(k, stop=None):
        several = dataclasses.replace(run, steps_per_call=k)
        one = recorded(experiment, [], stop)
        return dlx.fit(one, several, workdir=folder / str(first), mesh=mesh, writers=[])

    # Batch 18 never comes: steps of four get to 16, from where single ones can go on.
    for first, second, reached in ((4, 1, 16), (1, 4, 18)):
        stopped, _ = fit(first, stop=18)
        assert int(stopped.step) == reached
        state, rows = fit(second)
        assert_close(state, expected, tolerance)
        assert [row.keys() for row in rows] == [row.keys() for row in history]
        for row, wanted in zip(rows, history, strict=True):
            for name, value in wanted.items():
                assert abs(row[name] - value) <= tolerance * abs(value), (wanted["step"], name)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("make", shapes.slow_but([perceptron, convolutional], perceptron))
def test_steps_per_call_float32(make, tmp_path, mesh):
    """How many steps a call takes is a matter of speed, and may change on the way."""
    check_several(make, jnp.float32, 1e-5, tmp_path, mesh)


@pytest.mark.usefixtures("no_curves", "x64")
@pytest.mark.parametrize("make", shapes.slow_but([perceptron, convolutional], perceptron))
def test_steps_per_call_float64(make, tmp_path, mesh):
    with jax.numpy_dtype_promotion("standard"):  # flax mixes float32 in
        check_several(make, jnp.float64, 1e-12, tmp_path, mesh)


@pytest.mark.parametrize("cadence", ["log_every", "eval_every", "save_every", "picture_every"])
def test_cadences_are_multiples_of_steps_per_call(cadence):
    good = dict(log_every=4, eval_every=8, save_every=8, picture_every=4, steps_per_call=4)
    assert dlx.Run(**good).steps_per_call == 4
    with pytest.raises(dlx.BadInput, match=f"{cadence} 6 is no multiple of steps_per_call 4"):
        dlx.Run(**good | {cadence: 6})


# ---- The loop against a pencil -----------------------------------------------------------------


def init(key, given):
    return {"params": {"w": jnp.float32(0)}, "n": jnp.int32(0)}


def step(state, batch):
    """Metrics of batch t: its mean t + 2, the same with weight t, and one in a step of four."""
    x, n = batch["x"].mean(), state["n"]
    t = n.astype(jnp.float32)
    values = {
        "mean": x,
        "pair": (t * x, t),
        "rare": (jnp.where(n % 4 == 3, 10 * t, 0), jnp.where(n % 4 == 3, 1.0, 0.0)),
    }
    return {"params": {"w": 0.9 * state["params"]["w"] + x}, "n": n + 1}, values


def data(first_step, rows):
    for t in itertools.count(first_step):
        yield {"x": np.array([t, t + 1, t + 2, t + 5], np.float32)[rows(4)]}


def validation(state):
    return {"n": state["n"], "score": SCORES.get(int(state["n"]), 0.0)}


SCORES = {4: 1.0, 5: 3.0, 8: 3.0, 10: 3.0}
PENCIL = dlx.Experiment(
    init, step, data, {"validation": validation}, lambda state: {"n": state["n"]}
)
RUN = dlx.Run(steps=8, log_every=3, eval_every=5, save_every=4)
ROWS = [
    {"step": 3, "train/mean": 3.0, "train/pair": (1 * 3 + 2 * 4) / 3},
    {"step": 5, "validation/n": 5.0, "validation/score": 3.0},
    {"step": 6, "train/mean": 6.0, "train/pair": (3 * 5 + 4 * 6 + 5 * 7) / 12, "train/rare": 30.0},
    {"step": 8, "train/mean": 8.5, "train/pair": (6 * 8 + 7 * 9) / 13, "train/rare": 70.0},
    {"step": 8, "validation/n": 8.0, "validation/score": 3.0},
    {"step": 8, "test/n": 8.0},
]
pencil = pytest.mark.usefixtures("no_curves")


def on_disk(folder):
    """The steps in a checkpoints folder, which holds nothing else."""
    steps = checkpoint.steps(folder / "checkpoints")
    wanted = {f"{s}{end}" for s in steps for end in ("", ".json")}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == wanted
    return steps


@pencil
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows(in_memory, tmp_path, mesh):
    """Rows are means over their window, in the order of steps, and every writer is told of them:
    train, then validation, then test."""
    told = []

    def writer(step, values):
        kept = {k: v for k, v in values.items() if not writers.is_timing(k)}
        told.extend([{"step": step, **kept}] if kept else [])

    folder = None if in_memory else tmp_path
    state, history = dlx.fit(PENCIL, RUN, workdir=folder, mesh=mesh, writers=[writer])
    assert history == told == ROWS
    assert int(state["n"]) == 8
    if folder is not None:
        assert writers.read(folder / "metrics.jsonl") == ROWS
        assert on_disk(folder) == [4, 8]
        assert guard.read_json(folder / "result.json") == {
            "step": 8,
            "steps": 8,
            "seed": 0,
            "parameters": 1,
            "validation": {"validation/n": 8.0, "validation/score": 3.0},
            "test": {"n": 8.0},
        }


@pencil
def test_timings_stay_out_of_the_log(tmp_path, mesh):
    """timing.jsonl has a row a log window and one at the end; metrics.jsonl has none."""
    dlx.fit(PENCIL, RUN, workdir=tmp_path, mesh=mesh, writers=[])
    rows = writers.read(tmp_path / "timing.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 8, 8]
    assert all(name == "step" or writers.is_timing(name) for row in rows for name in row)


@pencil
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize(
    "direction, scores, best",
    [
        ("max", {2: 1.0, 4: 3.0, 6: 2.0}, 4),
        ("max", {2: 1.0, 4: 3.0, 6: 3.0, 10: 3.0}, 4),
        ("min", {2: 1.0, 4: -3.0, 6: 2.0}, 4),
        ("min", {2: 1.0, 4: -3.0, 6: -3.0, 10: -3.0}, 4),
        ("max", {4: -3.0, 2: -1.0, 6: -1.0, 8: -1.0, 10: -1.0}, 2),
        ("max", {10: 1.0}, 10),
    ],
)
def test_validation_chooses(direction, scores, best, in_memory, tmp_path, mesh):
    """The highest or the lowest, of equal ones the earlier."""
    run = dlx.Run(
        steps=10, log_every=5, eval_every=2, save_every=5, keep=1, best=("validation/s", direction)
    )
    experiment = PENCIL._replace(
        evals={"validation": lambda state: {"s": scores.get(int(state["n"]), 0.0)}}
    )
    folder = None if in_memory else tmp_path
    state, history = dlx.fit(experiment, run, workdir=folder, mesh=mesh, writers=[])
    assert int(state["n"]) == best
    assert history[-1] == {"step": 10, "test/n": best}
    if folder is not None:
        assert guard.read_json(folder / "result.json")["step"] == best
        assert on_disk(folder) == sorted({best, 10})


@pencil
def test_newest_and_best_stay(tmp_path, mesh):
    """Two of seven saves are the newest; the best is kept beside them, though a later one ties."""
    run = dlx.Run(
        steps=13, log_every=3, eval_every=5, save_every=2, keep=2, best=("validation/score", "max")
    )
    dlx.fit(PENCIL, run, workdir=tmp_path, mesh=mesh, writers=[])
    assert on_disk(tmp_path) == [5, 12, 13]


@pytest.fixture(scope="module")
def uninterrupted(mesh, tmp_path_factory):
    """run -> (state, history, {file: bytes}) of the pencil experiment."""

    @functools.cache
    def of(run):
        folder = tmp_path_factory.mktemp("whole")
        state, history = dlx.fit(PENCIL, run, workdir=folder, mesh=mesh, writers=[])
        files = ("metrics.jsonl", "result.json")
        return state, history, {name: (folder / name).read_bytes() for name in files}

    return of


def ctrl_c(where):
    """(experiment, writers) that raise KeyboardInterrupt once, there."""
    left = [None]

    def interrupt(state=None):
        if left and (state is None or int(state["n"]) == 5):
            left.pop()
            raise KeyboardInterrupt

    def evaluate(state):
        interrupt(state)
        return validation(state)

    if where == "evaluation":
        return PENCIL._replace(evals={"validation": evaluate}), []
    if where == "data":
        return recorded(PENCIL, [], stop=6), []
    name, at = where.split()
    return PENCIL, [Crash(int(at), KeyboardInterrupt, name)]


@pencil
@pytest.mark.parametrize("log_every, save_every", [(1, 4), (3, 100)])
@pytest.mark.parametrize(
    "where", ["evaluation", "data", "train 1", "train 5", "validation 5", "train 8", "validation 8"]
)
def test_ctrl_c_saves_and_returns(where, log_every, save_every, uninterrupted, tmp_path, mesh):
    """Wherever Ctrl-C comes, the state is saved, the rows so far are in the file, and a later call
    ends as if nothing had been."""
    run = dlx.Run(steps=8, log_every=log_every, eval_every=5, save_every=save_every, keep=9)
    expected, history, files = uninterrupted(run)
    experiment, told = ctrl_c(where)
    state, rows = dlx.fit(experiment, run, workdir=tmp_path, mesh=mesh, writers=told)
    stopped = int(state["n"])
    assert 0 < stopped <= 8 and not (tmp_path / "result.json").exists()
    assert on_disk(tmp_path)[-1] == stopped
    assert_same(saved(PENCIL, run, tmp_path, [stopped], mesh)[stopped], state)
    assert rows == writers.read(tmp_path / "metrics.jsonl")
    assert rows == history[: len(rows)]
    state, rows = dlx.fit(PENCIL, run, workdir=tmp_path, mesh=mesh, writers=[])
    assert_same(state, expected)
    assert rows == history
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


@pencil
def test_ctrl_c_in_memory_returns(mesh):
    """Without a folder there is nothing to save; the state and the rows are handed over."""
    experiment, _ = ctrl_c("data")
    state, history = dlx.fit(experiment, RUN, mesh=mesh, writers=[])
    assert int(state["n"]) == 6
    assert history == ROWS[: len(history)] and history[:2] == ROWS[:2]


@pencil
def test_evaluation_after_a_resume_amends_the_record(tmp_path, mesh):
    """Stopped before the evaluation, step 5 is saved without; evaluated, its record has both the
    evaluation and the longer log."""
    run = dataclasses.replace(RUN, keep=9, best=("validation/score", "max"))
    experiment, _ = ctrl_c("evaluation")
    dlx.fit(experiment, run, workdir=tmp_path, mesh=mesh, writers=[])
    assert on_disk(tmp_path) == [4, 5]
    before = checkpoint.verify(tmp_path / "checkpoints", 5)
    assert before["evals"] == {}
    state, _ = dlx.fit(PENCIL, run, workdir=tmp_path, mesh=mesh, writers=[])
    after = checkpoint.verify(tmp_path / "checkpoints", 5)
    assert after["evals"] == {"5": {"validation/n": 5.0, "validation/score": 3.0}}
    assert after["files"] == before["files"]
    log = (tmp_path / "metrics.jsonl").read_bytes()[: after["log_bytes"]]
    assert [json.loads(line) for line in log.splitlines()] == ROWS[:2]
    assert int(state["n"]) == 5  # 8 ties, later


@pencil
@pytest.mark.parametrize("saves", [True, False])
def test_a_complete_run_stays_as_it_is(saves, tmp_path, mesh):
    """Another call returns what the first returned, and changes neither log nor result."""
    run = dataclasses.replace(RUN, best=("validation/score", "max") if saves else None)
    first, history = dlx.fit(PENCIL, run, workdir=tmp_path, mesh=mesh, writers=[])
    before = {n: (tmp_path / n).read_bytes() for n in ("metrics.jsonl", "result.json")}
    disk = on_disk(tmp_path)
    told = []
    second, again = dlx.fit(
        PENCIL, run, workdir=tmp_path, mesh=mesh, writers=[lambda *row: told.append(row)]
    )
    assert_same(first, second)
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    assert again == history
    assert on_disk(tmp_path) == disk and told == []


@pencil
@pytest.mark.parametrize("k", [1, 3])
def test_a_metric_that_is_not_finite_is_named(k, tmp_path, mesh):
    """The seventh step is the first bad one: it is named, though the device was never waited for;
    nothing of it is saved, and the checkpoint before it is named too."""

    def bad(state, batch):
        state, values = step(state, batch)
        return state, values | {"bad": jnp.where(state["n"] >= 7, jnp.nan, 1.0)}

    run = dlx.Run(steps=30, log_every=9, eval_every=15, save_every=3, keep=99, steps_per_call=k)
    for _ in range(2):  # going on meets it again
        with pytest.raises(FloatingPointError) as e:
            dlx.fit(PENCIL._replace(step=bad), run, workdir=tmp_path, mesh=mesh, writers=[])
        assert str(e.value) == "bad not finite at step 7; the last good checkpoint is step 6"
        assert on_disk(tmp_path) == [3, 6]
        assert writers.read(tmp_path / "metrics.jsonl") == []
    with pytest.raises(FloatingPointError, match="bad not finite at step 7; no checkpoint"):
        dlx.fit(PENCIL._replace(step=bad), run, mesh=mesh, writers=[])


@pencil
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_evaluation_that_is_not_finite_is_named(value, tmp_path, mesh):
    """It is in no file (JSON has no such number), and its step is not saved."""
    scores = {"validation": lambda state: {"s": value if int(state["n"]) > 5 else 1.0}}
    with pytest.raises(FloatingPointError) as e:
        dlx.fit(PENCIL._replace(evals=scores), RUN, workdir=tmp_path, mesh=mesh, writers=[])
    expected = "validation/s not finite at step 8; the last good checkpoint is step 4"
    assert str(e.value) == expected
    assert on_disk(tmp_path) == [4]
    assert [row["step"] for row in writers.read(tmp_path / "metrics.jsonl")] == [3, 5, 6, 8]

    bad = PENCIL._replace(test=lambda state: {"n": value})
    with pytest.raises(FloatingPointError, match="test/n not finite at step 8"):
        dlx.fit(bad, RUN, workdir=tmp_path, mesh=mesh, writers=[])
    assert on_disk(tmp_path)[-1] == 8 and not (tmp_path / "result.json").exists()


@pencil
def test_ctrl_c_within_the_test(uninterrupted, tmp_path, mesh):
    """Training is saved by then: fit returns, and a later call tests."""
    expected, history, files = uninterrupted(RUN)

    def impatient(state):
        raise KeyboardInterrupt

    again = PENCIL._replace(test=impatient)
    state, rows = dlx.fit(again, RUN, workdir=tmp_path, mesh=mesh, writers=[])
    assert rows == history[:-1] and not (tmp_path / "result.json").exists()
    assert_same(state, expected)
    state, rows = dlx.fit(PENCIL, RUN, workdir=tmp_path, mesh=mesh, writers=[])
    assert rows == history
    assert_same(state, expected)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files


@pencil
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, mesh):
    """No metric shows it: the save does."""

    def bad(state, batch):
        new, values = step(state, batch)
        w = jnp.where(new["n"] == 7, jnp.inf, new["params"]["w"])
        return new | {"params": {"w": w}}, values

    with pytest.raises(FloatingPointError) as e:
        dlx.fit(PENCIL._replace(step=bad), RUN, workdir=tmp_path, mesh=mesh, writers=[])
    expected = "the state is not finite at step 8; the last good checkpoint is step 4"
    assert str(e.value) == expected
    assert on_disk(tmp_path) == [4]


@pencil
def test_one_process_a_folder(tmp_path, mesh):
    """A second fit of a folder that is being trained in is refused; afterwards it is free."""
    refused = []

    def evaluate(state):
        with pytest.raises(dlx.BadInput, match=f"{tmp_path} is in use by process {os.getpid()}"):
            dlx.fit(PENCIL, RUN, workdir=tmp_path, mesh=mesh, writers=[])
        refused.append(int(state["n"]))
        return validation(state)

    experiment = PENCIL._replace(evals={"validation": evaluate})
    _, history = dlx.fit(experiment, RUN, workdir=tmp_path, mesh=mesh, writers=[])
    assert refused == [5, 8] and history == ROWS
    dlx.fit(PENCIL, RUN, workdir=tmp_path, mesh=mesh, writers=[])


@pencil
@pytest.mark.parametrize("ends", [None, RuntimeError, KeyboardInterrupt])
def test_fit_leaves_nothing_open(ends, tmp_path, mesh):
    """However it ends: a notebook that trains a hundred times keeps neither threads nor files."""

    def fit(folder):
        told = [] if ends is None else [Crash(3, ends)]
        with contextlib.suppress(RuntimeError):
            dlx.fit(PENCIL, RUN, workdir=tmp_path / folder, mesh=mesh, writers=told)

    def left():
        return {t.name for t in threading.enumerate()}, len(os.listdir("/dev/fd"))

    fit("first")  # what libraries open once
    time.sleep(0.5)  # threads of tests before this one may be on their way out
    before = left()
    for i in range(3):
        fit(str(i))
    deadline = time.monotonic() + 10
    while left() != before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert left() == before


@pencil
def test_a_state_that_drifts_is_named(tmp_path, mesh):
    """Another dtype or shape after a step is an error before anything compiles."""

    def bad(change):
        def drifting(state, batch):
            state, values = step(state, batch)
            return state | {"params": {"w": change(state["params"]["w"])}}, values

        return PENCIL._replace(step=drifting)

    for change, now in (
        (lambda w: w.astype(jnp.bfloat16), r"bfloat16\[\]"),
        (lambda w: w[None], r"float32\[1\]"),
    ):
        with pytest.raises(dlx.BadInput, match=rf"params/w from float32\[\] into {now}"):
            dlx.fit(bad(change), RUN, workdir=tmp_path, mesh=mesh, writers=[])


@pytest.mark.parametrize("name", ["train", "test", "timing"])
def test_evaluations_leave_the_names_of_other_rows_alone(name, mesh):
    """The log tells kinds of rows by their names: a resume would take one for the other."""
    with pytest.raises(dlx.BadInput, match=name):
        dlx.fit(PENCIL._replace(evals={name: validation}), RUN, mesh=mesh, writers=[])


@pencil
@pytest.mark.parametrize("k", [1, 3])
def test_data_that_ends(k, tmp_path, mesh):
    """Too few batches are an error; as many as steps are enough, also for a call that finds the
    run complete but for its result."""

    def of(n):
        return PENCIL._replace(
            data=lambda first_step, rows: itertools.islice(data(first_step, rows), n - first_step)
        )

    run = dlx.Run(steps=8, log_every=3, eval_every=6, save_every=3, steps_per_call=k)
    for n in (0, 4, 7):
        with pytest.raises(dlx.BadInput, match="the data ended before the run did"):
            dlx.fit(of(n), run, workdir=tmp_path, mesh=mesh, writers=[])
    first, history = dlx.fit(of(8), run, workdir=tmp_path, mesh=mesh, writers=[])
    (tmp_path / "result.json").unlink()
    second, again = dlx.fit(of(8), run, workdir=tmp_path, mesh=mesh, writers=[])
    assert_same(first, second)
    assert again == history and (tmp_path / "result.json").exists()


@dataclasses.dataclass(frozen=True)
class TwoPhases:
    """Two phases with a pencil."""

    run: dlx.Run = RUN


@pencil
def test_fresh_starts_every_phase_over(tmp_path):
    """--fresh died in the first phase: the same command without it must not take up the second
    phase of the run before."""
    trained, dies = [], []

    def phase(name):
        def noted(state):
            trained.append(name)
            return validation(state)

        experiment = PENCIL._replace(evals={"validation": noted})
        return experiment._replace(step=dies[0]) if dies and name == "first" else experiment

    def main(*flags):
        del trained[:]
        names = ("first", "second")
        phases = {name: (RUN, lambda previous, name=name: phase(name)) for name in names}
        args = ["--workdir", str(tmp_path / "run"), "--mesh", "tensor=8", *flags]
        with pytest.raises(SystemExit) as e:
            dlx.main(TwoPhases, lambda config: phases, {"test": TwoPhases()}, args)
        return e.value.code

    def bad(state, batch):
        state, values = step(state, batch)
        return state, values | {"mean": jnp.float32(jnp.nan)}

    both = ["first", "first", "second", "second"]  # evaluated at 5 and at 8
    assert main() == 0 and trained == both
    dies.append(bad)
    assert main("--fresh") == 1 and trained == []
    dies.clear()
    assert main() == 0 and trained == both


@pencil
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
def test_ctrl_c_at_every_line(tmp_path, mesh):
    """An interrupt before any line of the loop and the log, on its first, its middle and its last
    way through, costs nothing: real signals come between any two."""
    run = dataclasses.replace(RUN, best=("validation/score", "max"))
    ours = {loop.__file__, writers.__file__, carry.__file__, feed.__file__}
    names = {"_train", "save", "evaluate", "_finish", "emit", "later", "flush", "write", "paused"}
    names |= {"unpack", "given"}

    def fit(folder, at=None):
        """Lines as they ran; Ctrl-C before number `at`."""
        lines = []

        def line(frame, event, arg):
            if event == "line":
                lines.append((frame.f_code, frame.f_lineno))
                if len(lines) - 1 == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return line

        before = sys.gettrace()
        sys.settrace(lambda frame, *_: line if frame.f_code.co_filename in ours else None)
        try:
            state, history = dlx.fit(PENCIL, run, workdir=folder, mesh=mesh, writers=[])
        except KeyboardInterrupt:  # before the first step, or after the last
            state, history = None, []
        finally:
            sys.settrace(before)
        return state, history, lines

    expected, history, lines = fit(tmp_path / "whole")
    chosen = set()
    for place in set(lines):
        if place[0].co_name in names:
            found = [i for i, x in enumerate(lines) if x == place]
            chosen |= {found[0], found[len(found) // 2], found[-1]}
    wrong = []
    for i in sorted(chosen):
        folder = tmp_path / "broken"
        fit(folder, i)
        state, rows, _ = fit(folder)
        try:
            assert_same(state, expected)
            assert rows == history
            for name in ("metrics.jsonl", "result.json"):
                assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        except AssertionError:
            code, number = lines[i]
            wrong.append(f"{Path(code.co_filename).name}:{number}, {i} of {len(lines)}")
        shutil.rmtree(folder)
    assert not wrong


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("K", [1, 2])
def test_data_that_fills_the_same_array_anew(devices, K, tmp_path):
    """Batches wait while the next ones are read: each is what it was when it was given."""

    def data(first_step, rows):
        buffer = np.zeros(8, np.float32)
        for t in itertools.count(first_step):
            buffer[:] = t
            yield {"x": buffer[rows(8)]}

    def step(state, batch):
        return {"n": state["n"] + 1}, {"x": batch["x"].mean()}

    e = dlx.Experiment(init=lambda key, given: {"n": jnp.zeros(())}, step=step, data=data)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    run = dlx.Run(steps=20, log_every=2, steps_per_call=K)
    _, history = dlx.fit(e, run, mesh=mesh, writers=[])
    means = [row["train/x"] for row in history if "train/x" in row]
    assert means == [2 * i + 0.5 for i in range(10)]


@pytest.mark.parametrize("change", [lambda x: x[:1], lambda x: x.astype(np.float64)])
def test_batches_of_one_call_are_alike(change, mesh):
    """Several steps in a call take their batches as one array: nothing is broadcast into it."""

    def changing(first_step, rows):
        for t, batch in enumerate(data(first_step, rows)):
            yield {"x": change(batch["x"])} if t == 3 else batch

    run = dlx.Run(steps=8, log_every=4, steps_per_call=2)
    with pytest.raises(dlx.BadInput, match=r"where an earlier one held float32\[4\]"):
        dlx.fit(PENCIL._replace(data=changing), run, mesh=mesh, writers=[])
