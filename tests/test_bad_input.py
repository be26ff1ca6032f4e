"""Whatever a user gets wrong ends in one line that names the value and the fix, before anything
is compiled."""

import collections
import fcntl
import json
import os
import shutil
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import checkpoint, metrics, runs
from dlx.data import arrays, stream
from dlx.tasks import classifier
from experiments import digits_cnn

SMALL = "--preset test --steps 4 --log-every 2 --eval-every 2 --save-every 2"
TRAIN = f"--workdir run {SMALL}"


@pytest.fixture(scope="module", autouse=True)
def entry():
    """The name that `python -m experiments.digits_cnn` gives; no classical baselines, which take
    longer than all of this; optax as it comes."""
    spec = types.SimpleNamespace(name="experiments.digits_cnn")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(sys.modules["__main__"], "__spec__", spec)
        patch.setattr(digits_cnn, "baselines", dict)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, entry):
    """The folder of a complete run."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.raises(SystemExit) as end:
        main(*SMALL.split(), "--workdir", str(folder))
    assert end.value.code == 0
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLX_DATA_DIR", "")


@pytest.fixture
def compiled():
    """The names of the programs that are compiled meanwhile."""
    names = []

    def listen(event, seconds, fun_name=None, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.random.key(0)  # the seed itself is a program, and a part of none
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_listener_hears_compilations(compiled):
    """Or the table below would show nothing."""
    jax.jit(lambda x: x * 3.25)(np.ones(7))
    assert len(compiled) == 1


def main(*args, build=digits_cnn.build):
    dlx.main(digits_cnn.Config, build, digits_cnn.PRESETS, list(args))


# ---- What a folder may look like ---------------------------------------------------------------


def file_in_the_way(folder, trained):
    folder.write_text("mine")


def read_only(folder, trained):
    folder.mkdir()
    folder.chmod(0o500)


def strangers(folder, trained):
    folder.mkdir()
    (folder / "thesis.tex").write_text("mine")


def complete(folder, trained):
    shutil.copytree(trained, folder)


def unfinished(folder, trained):
    complete(folder, trained)
    (folder / "result.json").unlink()


def config_text(text):
    def make(folder, trained):
        complete(folder, trained)
        (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def config_with(**changes):
    """config.json with other values; run__steps is the field `steps` of `run`."""

    def make(folder, trained):
        complete(folder, trained)
        stored = json.loads((folder / "config.json").read_text())
        for name, value in changes.items():
            *path, last = name.split("__")
            inner = stored if last == "experiment" else stored["config"]
            for key in path:
                inner = inner[key]
            inner[last] = value
        (folder / "config.json").write_text(json.dumps(stored))

    return make


def damaged(then=complete):
    """Every checkpoint has lost the end of a file."""

    def make(folder, trained):
        then(folder, trained)
        for step in checkpoint.steps(folder / "checkpoints"):
            largest = max(
                (p for p in (folder / "checkpoints" / str(step)).rglob("*") if p.is_file()),
                key=lambda p: p.stat().st_size,
            )
            os.truncate(largest, largest.stat().st_size - 1)

    return make


def locked(folder, trained):
    complete(folder, trained)
    with open(folder / ".lock", "w") as f:
        f.write("process 123 on atlantis")
    holder = os.open(folder / ".lock", os.O_RDWR)  # closed by the end of the process
    fcntl.flock(holder, fcntl.LOCK_EX)


def a_file(folder, trained):
    Path("model.pkl").write_bytes(b"\x80\x04N.")


# ---- Calls that need no command line ------------------------------------------------------------


def batch(**changes):
    image = np.zeros((6, 4, 4, 1), np.float32)
    return {"image": image, "label": np.arange(6) % 3} | changes


def spoiled(value):
    image = batch()["image"].copy()
    image[4, 0, 0, 0] = value
    return image


def check(classes=3, **changes):
    return lambda: arrays.check(batch(**changes), "digits (train)", classes)


def first_batch(batch_size, given=None, **changes):
    given = batch(**changes) if given is None else given
    return lambda: next(arrays.batches(given, batch_size, 0)(0, lambda n: slice(0, n)))


def labelled(classes, **changes):
    """arrays.batches that knows the classes."""
    data = arrays.batches(lambda: batch(**changes), 2, 0, classes)
    return lambda: next(data(0, lambda n: slice(0, n)))


def classified(**changes):
    """The classifier of experiments, on data that its reader has not checked."""
    made = classifier.experiment(
        None, optax.sgd(0.1), lambda: {"train": batch(**changes)}, shape=(4, 4, 1), names="abc",
        batch_size=2, seed=0,
    )  # fmt: skip
    return lambda: next(made.data(0, lambda n: slice(0, n)))


def streamed(classes=None, **changes):
    """Example 1 of three is another one."""
    source = [{"x": 0.5, "label": i} | (changes if i == 1 else {}) for i in range(3)]
    data = stream.batches(source, 3, 0, threads=0, classes=classes)
    return lambda: next(data(0, lambda n: slice(0, n)))


def measured(given, batch_size=4):
    """An evaluation of `given`."""
    return lambda: metrics.evaluator(lambda state, b: {"x": b["x"]}, given, batch_size)(None)


def fit(run=None, step=None, **changes):
    """Training that would work but for `changes`."""

    def data(first_step, rows):
        while True:
            yield {"x": np.ones((8, 3), np.float32)}

    def good(w, batch):
        return w, {"loss": jnp.mean(batch["x"] @ w)}

    experiment = dlx.Experiment(lambda key, given: jnp.zeros(3), step or good, data)
    run = {"steps": 10} | (run or {})
    return lambda: dlx.fit(experiment._replace(**changes), dlx.Run(**run), writers=[])


def evaluation(**changes):
    def measure(state, batch):
        return {"loss": batch["x"] - state[0]}

    return {"validation": metrics.evaluator(measure, {"x": np.ones(8, np.float32)} | changes, 4)}


def trains(batch_size=8, average=False, **kwargs):
    """make_step with `kwargs`, one step of it."""

    def loss_fn(params, model_state, batch, key):
        return jnp.mean(batch["x"] @ params["w"]), (model_state, {})

    def call():
        tx = optax.sgd(0.1)
        params = {"params": {"w": np.zeros(3, np.float32)}}

        def init(key, given):
            return dlx.train_state(key, params, tx, ema=average)

        def data(first_step, rows):
            while True:
                yield {"x": np.ones((batch_size, 3), np.float32)}

        step = dlx.make_step(loss_fn, tx, **kwargs)
        dlx.fit(dlx.Experiment(init, step, data), dlx.Run(steps=1), writers=[])

    return call


def load(path="run"):
    return lambda: dlx.load(path)


# ---- The table ---------------------------------------------------------------------------------

Case = collections.namedtuple("Case", ["do", "words", "folder", "patch"])


def case(do, *words, folder=None, patch=()):
    """`do`: arguments of the command line, or a call. `words`: what the line must hold, the value
    and the fix. `folder`: makes what lies at ./run before."""
    return Case(do, words, folder, patch)


DISK = collections.namedtuple("usage", ["total", "used", "free"])(10, 9, 1)

CASES = {
    # The command line
    "a letter too many": case("--stepz 10", "--stepz", "did you mean --steps?"),
    "a letter too few": case("--learning-rat 1", "--learning-rat:", "--learning-rate?"),
    "initials": case("--lr 0.1", "--lr", "did you mean --learning-rate?"),
    "letters swapped": case("--bacth-size 8", "--bacth-size", "did you mean --batch-size?"),
    "no such flag": case("--widht 3", "unknown flag --widht"),
    "two of them": case("--stepz 1 --learning-rat 2", "--steps?", "--learning-rate?"),
    "a flag like none": case("--xyzzy 3", "--xyzzy", "--help"),
    "the flag of a part": case("--run.steps 10", "--run.steps", "did you mean --steps?"),
    "a word for a number": case("--steps x", "--steps", "'x'", "INT"),
    "half a step": case("--steps 1.5", "--steps", "'1.5'", "INT"),
    "a word for a rate": case("--learning_rate fast", "--learning-rate", "'fast'", "FLOAT"),
    "a word for a switch": case(f"{TRAIN} --fresh yes", "'yes'", "--help"),
    "no steps": case("--steps 0", "steps is 0", "at least 1"),
    "dropout of 1.5": case("--dropout 1.5", "dropout is 1.5", "[0, 1)"),
    "batch of nothing": case("--batch-size 0", "batch_size is 0", "positive"),
    "descent upwards": case("--learning-rate -1e-3", "learning_rate is -0.001", "positive"),
    "rate of nan": case(f"{TRAIN} --learning-rate nan", "learning_rate is nan", "positive"),
    "rate of inf": case(f"{TRAIN} --learning-rate inf", "learning_rate is inf"),
    "decay of nan": case(f"{TRAIN} --weight-decay nan", "weight_decay is nan"),
    "turned by inf": case(f"{TRAIN} --degrees inf", "degrees is inf"),
    "no channels": case(f"{TRAIN} --channels 0 8 8", "channels", "0"),
    "seed below 0": case("--seed -1", "seed is -1", "from 0 to 4294967295"),
    "seed too large": case("--seed 4294967296", "seed is 4294967296", "from 0 to 4294967295"),
    "log never": case("--log-every 0", "log_every is 0", "at least 1"),
    "keep nothing": case("--keep 0", "keep is 0", "at least 1"),
    "pictures before": case("--picture-every -5", "picture_every is -5", "give 0"),
    "value missing": case("--learning-rate 1e-3 --steps", "--steps", "value"),
    "preset missing": case("--steps 3 --preset", "--preset needs a value"),
    "preset empty": case(f"{TRAIN} --preset=", "preset ''", "laptop, paper, test"),
    "preset unknown": case("--preset big", "'big'", "laptop, paper, test"),
    "no dashes": case("steps=10", "'steps=10'", "write --steps 10"),
    "no dashes later": case("train --keep 2 steps=10", "'steps=10'", "write --steps 10"),
    "one dash": case("-steps 10", "'-steps'", "--steps"),
    "no such command": case("trian", "'trian'", "did you mean train?"),
    "a command after its flags": case(f"{TRAIN} --keep 2 eval", "'eval'", "first"),
    "steps a call": case("--steps-per-call 7", "log_every 25", "steps_per_call 7", "change"),
    "layers that differ": case("--channels 4 8", "channels has 2", "pool 3", "one value a layer"),
    "nothing left": case("--pool True True True", "8 x 8", "a pool less"),
    "no such padding": case("--padding SAME SAME VALUE", "--padding", "'VALUE'", "VALID"),
    "seeds with a dash": case(f"{TRAIN} --seeds 0-4", "'0-4'", "0..4 or 0,2,5"),
    "seeds backwards": case(f"{TRAIN} --seeds 4..0", "'4..0'", "0..4 or 0,2,5"),
    "seeds by name": case(f"{TRAIN} --seeds all", "'all'", "0..4 or 0,2,5"),
    "seeds without end": case(f"{TRAIN} --seeds 0..99999999999", "0..99999999999", "0,2,5"),
    "a split that is none": case(
        "eval --workdir run --split train", "'train'", "'validation', 'test'", folder=complete
    ),
    # What is best
    "best of what": case("--best validation/loss", "--best", "{max,min}"),
    "best is mean": case("--best validation/loss mean", "--best", "mean", "{max,min}"),
    "best of no evaluation": case(
        f"{TRAIN} --best valid/loss min", "'valid/loss'", "validation", "EVALUATION/METRIC"
    ),
    "best of no metric": case(
        f"{TRAIN} --best validation/acc max", "'validation/acc'", "validation/accuracy"
    ),
    # Devices and data
    "no such axis": case(f"{TRAIN} --mesh dat=8", "'dat'", "data, fsdp, tensor"),
    "axes of 6": case(
        f"{TRAIN} --mesh data=3,fsdp=2", "data=3 x fsdp=2", "6 devices", "8 (cpu)", "--mesh"
    ),
    "a mesh of nothing": case(f"{TRAIN} --mesh ,", "','", "names no axis", "data=4,fsdp=2"),
    "a summary of a batch that does not divide": case(
        "summary --preset test --batch-size 30", "batch of 30", "data x fsdp = 8", "multiple of 8"
    ),
    "batch that does not divide": case(
        f"{TRAIN} --mesh data=8 --batch-size 30", "batch of 30", "data x fsdp = 8", "multiple of 8"
    ),
    "axis of x": case(f"{TRAIN} --mesh data=x", "'data=x'", "write data=2"),
    "axis of 0": case(f"{TRAIN} --mesh data=0,fsdp=8", "'data=0'", "write data=2"),
    "axis of nothing": case(f"{TRAIN} --mesh data", "'data'", "write data=2"),
    "a coordinator alone": case(
        f"{TRAIN} --coordinator localhost:1234", "'localhost:1234'", "processes 0", "all three"
    ),
    "processes alone": case(f"{TRAIN} --processes 2", "processes 2", "process -1", "all three"),
    "a coordinator of no port": case(
        f"{TRAIN} --coordinator host:99999 --processes 2 --process 0", "99999", "1 to 65535"
    ),
    "a coordinator without a port": case(
        f"{TRAIN} --coordinator host --processes 2 --process 0", "'host'", "HOST:PORT"
    ),
    "a process too many": case(
        f"{TRAIN} --coordinator host:12 --processes 2 --process 2", "process is 2", "0 to 1"
    ),
    "fewer than no processes": case(
        f"{TRAIN} --coordinator host:12 --processes -1 --process 0", "processes is -1", "at least 1"
    ),
    "an axis twice": case(f"{TRAIN} --mesh data=2,data=8", "data", "twice"),
    "batch in 8 parts": case(f"{TRAIN} --batch-size 12", "12", "8 devices", "multiple of 8"),
    "batch above the data": case(f"{TRAIN} --batch-size 1264", "1264", "1,257", "use 1 to 1257"),
    "data folder missing": case(f"{TRAIN} --data-dir /no/data", "/no/data", "no folder"),
    # Run folders
    "workdir is a file": case(TRAIN, "cannot write to run", "--workdir", folder=file_in_the_way),
    "workdir is read-only": case(TRAIN, "cannot write to run", "--workdir", folder=read_only),
    "workdir of the system": case(
        f"--workdir /proc/run {SMALL}", "cannot write to /proc/run", "--workdir"
    ),
    "workdir of somebody": case(TRAIN, "'thesis.tex'", "--workdir", folder=strangers),
    "fresh in a folder of somebody": case(
        f"{TRAIN} --fresh", "'thesis.tex'", "--workdir", folder=strangers
    ),
    "another configuration": case(
        f"{TRAIN} --dropout 0.1 --seed 3 --label-smoothing 0 --ema 0.5",
        "dropout 0.3 -> 0.1", "and 1 more", "--fresh", "--workdir", folder=complete,
    ),
    "another configuration in many words": case(
        f"{TRAIN} --channels 16 32 64 64 128 128 --pool True False True False True False "
        "--padding SAME SAME SAME SAME SAME SAME --best validation/accuracy max",
        "channels [4, 8, 16] -> [16, 32", "--fresh", "--workdir", folder=complete,
    ),
    "another configuration, unfinished": case(
        f"{TRAIN} --steps 6", "run.steps 4 -> 6", "--fresh", "--workdir", folder=unfinished
    ),
    "another configuration for eval": case(
        "eval --workdir run --dropout 0.1", "dropout 0.3 -> 0.1", "--workdir", folder=complete
    ),
    "config.json cut off": case(
        TRAIN, "config.json", "line 2, column 10", "--fresh", folder=config_text('{\n "config"')
    ),
    "config.json cut off for eval": case(
        "eval --workdir run", "config.json", "line 2, column 10", folder=config_text('{\n "config"')
    ),
    "config.json empty": case(TRAIN, "config.json", "line 1", "--fresh", folder=config_text("")),
    "config.json of bytes": case(
        TRAIN, "config.json is damaged", "--fresh", folder=config_text(b"\xff\xfe\x00")
    ),
    "config.json a list": case(
        "eval --workdir run", "config.json", "damaged", "--fresh", folder=config_text("[]")
    ),
    "config.json without a config": case(
        "eval --workdir run", "config.json", "'config'", "--fresh", folder=config_text("{}")
    ),
    "config.json without end": case(
        TRAIN, "config.json", "damaged", "--fresh", folder=config_text("[" * 200_000)
    ),
    "config.json with another key": case(
        "eval --workdir run", "config.json", "momentum", "mend",
        folder=config_with(momentum=0.9),
    ),
    "config.json with another type": case(
        "eval --workdir run", "config.json", "int", "batch_size", "mend",
        folder=config_with(batch_size="many"),
    ),
    "config.json out of range": case(
        "eval --workdir run", "config.json", "steps is 0", "at least 1",
        folder=config_with(run__steps=0),
    ),
    "config.json out of range too": case(
        "eval --workdir run", "config.json", "dropout is 2", "[0, 1)",
        folder=config_with(dropout=2.0),
    ),
    "eval of nothing": case("eval --workdir run", "run", "no config.json", "train first"),
    "sample of nothing": case("sample --workdir run", "run", "no config.json", "train first"),
    "sample of a classifier": case(
        "sample --workdir run", "digits_cnn makes no samples", "use eval", folder=complete
    ),
    "locked": case(TRAIN, "process 123 on atlantis", "--workdir", folder=locked),
    "disk full": case(TRAIN, "run has 1 bytes free", "kB", "free some", "--workdir",
                      patch=[(shutil, "disk_usage", lambda path: DISK)]),
    # Checkpoints
    "other shapes": case(
        "eval --workdir run", "run/checkpoints", "another model", "conv3/kernel",
        "float32[3, 3, 8, 16]", "float32[3, 3, 8, 6]", "folder",
        folder=config_with(channels=[4, 8, 6]),
    ),
    "other layers": case(
        "eval --workdir run", "another model", "conv4/kernel", "absent", "choose another folder",
        folder=config_with(channels=[4, 8, 16, 8], pool=[False, True] * 2, padding=["SAME"] * 4),
    ),
    "of a newer dlx": case(
        "eval --workdir run", "format 1", "up to 0", "update dlx",
        folder=complete, patch=[(checkpoint, "FORMAT", 0)],
    ),
    "to be resumed, of a newer dlx": case(
        TRAIN, "format 1", "up to 0", "update dlx", "--workdir",
        folder=unfinished, patch=[(checkpoint, "FORMAT", 0)],
    ),
    "all damaged, for eval": case(
        "eval --workdir run", "no whole checkpoint", "--fresh", folder=damaged()
    ),
    "all damaged, unfinished, for eval": case(
        "eval --workdir run", "no whole checkpoint", "train first", folder=damaged(unfinished)
    ),
    "all damaged, for fit": case(
        lambda: runs.find(Path("run"), dlx.Run()), "complete", "no whole checkpoint", "--fresh",
        folder=damaged(),
    ),
    # dlx.load
    "load nothing": case(load("nowhere"), "nowhere", "no run folder", "train first"),
    "load a pickle": case(load("model.pkl"), "model.pkl", "never a pickle", folder=a_file),
    "load an unknown experiment": case(
        load(), "'digits'", "digits_cnn", "config_class",
        folder=config_with(experiment="digits"),
    ),
    **{
        f"load {name!r}": case(
            load(), repr(name), "config_class", folder=config_with(experiment=name)
        )
        for name in ("os", "os.system", "../x", "..", "digits_cnn.py", "", 7, ["os"], None)
    },
    "load a list": case(load(), "config.json", "damaged", folder=config_text("[1]")),
    "load without a config": case(
        load(), "config.json", "'config'", folder=config_text('{"experiment": "digits_cnn"}')
    ),
    "load what is damaged": case(load(), "no whole checkpoint", folder=damaged()),
    # Data
    "no data": case(
        check(image=np.zeros((0, 4, 4, 1)), label=np.zeros(0, int)), "digits (train)", "empty",
        "at least one",
    ),
    "nothing at all": case(lambda: arrays.check({}, "digits (train)"), "digits (train)", "empty"),
    "fewer than a batch": case(first_batch(7), "batch_size 7", "6 examples", "use 1 to 6"),
    "a batch of none": case(first_batch(0), "batch_size 0", "use 1 to 6"),
    "label too large": case(
        check(label=np.array([0, 1, 2, 3, 0, 1])), "label 3", "from 0 to 2"
    ),
    "label -1": case(check(label=np.array([0, 1, 2, -1, 0, 1])), "label -1", "from 0 to 2"),
    "labels as floats": case(check(label=np.zeros(6, np.float32)), "float32", "must be integer"),
    "no labels": case(
        lambda: arrays.check({"image": batch()["image"]}, "digits (train)", 3), "label",
        "digits (train)",
    ),
    "nan": case(check(image=spoiled(np.nan)), "image", "row 4", "remove or mend"),
    "inf": case(check(image=spoiled(-np.inf)), "image", "row 4", "remove or mend"),
    "ragged": case(
        check(image=np.array([np.zeros(2)] * 5 + [None], object)), "image", "object", "one array"
    ),
    "images without channels": case(
        check(image=np.zeros((6, 4, 4))), "(6, 4, 4)", "(N, height, width, channels)"
    ),
    "lengths that differ": case(
        check(label=np.zeros(5, int)), "'image': 6", "'label': 5", "row an example"
    ),
    "images without pixels": case(
        check(image=np.zeros((6, 0, 0, 1))), "(6, 0, 0, 1)", "(N, height, width, channels)"
    ),
    **{
        f"nan in {np.dtype(dtype)}": case(
            check(image=spoiled(np.nan).astype(dtype)), "image", "row 4", "remove or mend"
        )
        for dtype in (jnp.bfloat16, np.float16, np.complex64)
    },
    **{
        f"rows of {kind}": case(
            check(extra=np.zeros(6, dtype)), "extra has dtype", "must be numbers"
        )
        for kind, dtype in {
            "records": [("a", "i4"), ("b", "f4")], "bytes": "V5", "text": "U3", "dates": "M8[D]",
            "hours": "m8[h]",
        }.items()
    },
    "lists that differ in length": case(
        lambda: arrays.check({"x": [1, 2], "y": [1]}, "mine"), "'x': 2", "'y': 1", "mine"
    ),
    "ragged lists": case(lambda: arrays.check({"x": [[1], [1, 2]]}, "mine"), "mine: x", "ragged"),
    "a split too many": case(
        lambda: arrays.check({"train": batch()}, "mine"), "train is a dict", "row an example"
    ),
    "batches of nothing at all": case(first_batch(2, {}), "data is empty", "at least one"),
    "batches of no examples": case(
        first_batch(2, {"x": np.zeros((0, 3))}), "data is empty", "at least one"
    ),
    "batches of an array": case(first_batch(2, np.zeros(6)), "a ndarray", "give {name: array}"),
    "batches of a tuple": case(first_batch(2, (1, 2)), "a tuple", "give {name: array}"),
    "batches of None": case(first_batch(2, lambda: None), "a NoneType", "{name: array}"),
    "batches, the first array short": case(
        first_batch(2, label=np.zeros(9, int)), "'image': 6", "'label': 9", "row an example"
    ),
    "batches, the first array long": case(
        first_batch(2, label=np.zeros(5, int)), "'image': 6", "'label': 5", "row an example"
    ),
    "batches of objects": case(
        first_batch(2, label=np.array([None] * 6)), "label", "object", "one array"
    ),
    "batches of text": case(first_batch(2, label=["cat"] * 6), "label", "<U3", "must be numbers"),
    "batches of nan": case(first_batch(2, image=spoiled(np.nan)), "image", "row 4", "mend"),
    "batches of label -1": case(
        first_batch(2, label=np.arange(6) - 1), "label -1", "labels begin at 0"
    ),
    "half an example a batch": case(first_batch(2.5), "batch_size is 2.5", "whole number"),
    "a batch of 2.0": case(first_batch(2.0), "batch_size is 2.0", "whole number"),
    "batches of label 3": case(labelled(3, label=np.arange(6) % 4), "label 3", "from 0 to 2"),
    "batches of float labels": case(labelled(3, label=np.zeros(6)), "float64", "must be integer"),
    "batches of a column of labels": case(
        labelled(3, label=np.zeros((6, 1), int)), "(6, 1)", "(N,)"
    ),
    "a classifier of label 3": case(
        classified(label=np.arange(6) % 4), "label 3", "from 0 to 2"
    ),
    "a stream of nan": case(streamed(x=np.nan), "example 1,", "x is not finite", "mend"),
    "a stream of label -1": case(streamed(label=-1), "example 1,", "label -1", "begin at 0"),
    "a stream of label 3": case(streamed(3, label=3), "example 1,", "label 3", "from 0 to 2"),
    "a stream of float labels": case(
        streamed(3, label=1.0), "example 1,", "float32", "must be integer"
    ),
    "a stream of one-hot labels": case(streamed(3, label=[0, 1, 0]), "example 1,", "(3,)", "()"),
    "an empty evaluation": case(
        lambda: evaluation(x=np.zeros(0))["validation"](np.zeros(3)), "evaluation set is empty"
    ),
    "an evaluation of no examples": case(measured([]), "evaluation set is empty"),
    "an evaluation of a number": case(measured(7), "evaluation set is a int", "len(source)"),
    "an evaluation, the first array short": case(
        measured({"x": np.zeros(5), "y": np.zeros(9)}), "'x': 5", "'y': 9", "row an example"
    ),
    "an evaluation, the first array long": case(
        measured({"x": np.zeros(9), "y": np.zeros(5)}), "'x': 9", "'y': 5", "row an example"
    ),
    "an evaluation of text": case(
        measured([{"x": 1.0, "text": "a cat"}] * 3), "example 0: text", "no number", "leave it out"
    ),
    "an evaluation of unlike examples": case(
        measured([{"x": 1.0}, {"x": [1.0]}]), "example 1: x", "float32[1]", "make them alike"
    ),
    "an evaluation in batches of none": case(
        measured({"x": np.zeros(9)}, 0), "batch_size is 0", "1 or more"
    ),
    "an evaluation in batches of 2.5": case(
        measured({"x": np.zeros(9)}, 2.5), "batch_size is 2.5", "whole number"
    ),
    # dlx.Run
    **{
        f"Run({name}={value!r})": case(
            lambda kw={name: value}: dlx.Run(**kw), name, str(value), fix
        )
        for name, value, fix in [
            ("steps", 0, "at least 1"),
            ("steps", -5, "at least 1"),
            ("eval_every", 0, "at least 1"),
            ("save_every", 0, "at least 1"),
            ("keep", 0, "at least 1"),
            ("steps_per_call", 0, "at least 1"),
            ("picture_every", -1, "or more"),
            ("seed", -1, "from 0 to"),
            ("seed", 2**32, "from 0 to"),
            ("best", ("validation/loss", "mean"), "min"),
        ]
    },
    "Run of uneven calls": case(
        lambda: dlx.Run(log_every=6, eval_every=10, save_every=12, steps_per_call=6),
        "eval_every 10", "steps_per_call 6", "change",
    ),
    # dlx.fit
    "no batch": case(fit(data=lambda first_step, rows: iter([])), "data ended", "must go on"),
    "a scalar in a batch": case(
        fit(data=lambda first_step, rows: iter([{"x": np.float32(1)}])), "x is a scalar", "batch"
    ),
    "a batch of two sizes": case(
        fit(data=lambda *_: iter([{"x": np.zeros((8, 3)), "y": np.zeros(16)}])),
        "'x': (8, 3)", "'y': (16,)",
    ),
    "a batch of 12": case(
        fit(data=lambda *_: iter([{"x": np.zeros((12, 3), np.float32)}])), "12", "multiple of 8"
    ),
    "a state that changes its shape": case(
        fit(step=lambda w, batch: (w[:2], {})), "state from float32[3]", "float32[2]", "must agree"
    ),
    "a state that changes its dtype": case(
        fit(step=lambda w, batch: (w.astype(jnp.bfloat16), {})), "float32[3]", "bfloat16[3]"
    ),
    "a state that grows": case(
        fit(
            init=lambda key, given: {"w": jnp.zeros(3)},
            step=lambda s, batch: ({**s, "step": jnp.zeros(())}, {}),
        ),
        "step", "absent", "must agree",
    ),
    "a metric that is no scalar": case(
        fit(step=lambda w, batch: (w, {"norm": w})), "'norm'", "(3,)", "scalar"
    ),
    "best of no group": case(
        fit(run={"best": ("loss", "min")}, evals=evaluation()), "'loss'", "EVALUATION/METRIC"
    ),
    "best where there is no evaluation": case(
        fit(run={"best": ("validation/loss", "min")}), "'validation/loss'", "none"
    ),
    "best of a metric that is not measured": case(
        fit(run={"best": ("validation/accuracy", "max")}, evals=evaluation()),
        "'validation/accuracy'", "validation/loss",
    ),
    "an evaluation that gives a mean": case(
        fit(
            run={"best": ("validation/loss", "min")},
            evals={"validation": metrics.evaluator(
                lambda state, batch: {"loss": batch["x"].mean()}, {"x": np.ones(8)}, 4
            )},
        ),
        "'loss'", "()", "example",
    ),
    "a rule that matches nothing": case(
        fit(rules=(("dense/kernel", jax.sharding.PartitionSpec("fsdp")),)),
        "'dense/kernel'", "matches no leaf", "correct",
    ),
    # dlx.make_step
    "accumulate 0": case(trains(accumulate=0), "accumulate is 0", "1 (none) or more"),
    "accumulate 3 of 8": case(trains(accumulate=3), "accumulate 3", "batch of 8", "change"),
    "clip at 0": case(trains(clip_norm=0.0), "clip_norm is 0.0", "positive"),
    "clip below 0": case(trains(clip_norm=-1.0), "clip_norm is -1.0", "positive"),
    "ema of 1.5": case(trains(ema=1.5, average=True), "ema is 1.5", "[0, 1)"),
    "ema without an average": case(trains(ema=0.9), "ema", "train_state(..., ema=True)"),
    "compute in integers": case(trains(compute_dtype=jnp.int32), "compute_dtype", "int32", "float"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_line_names_the_value_and_the_fix(name, request, compiled, monkeypatch, capsys):
    do, words, make, patches = CASES[name]
    if make is read_only and os.getuid() == 0:
        pytest.skip("root may write anywhere")
    if make is not None:
        make(Path("run"), request.getfixturevalue("trained"))
    for target in patches:
        monkeypatch.setattr(*target)
    capsys.readouterr()
    del compiled[:]
    with pytest.raises(SystemExit) as end:
        if callable(do):
            main("summary", build=lambda config: pytest.fail(f"it was taken: {do()}"))
        else:
            main(*do.split())
    line = capsys.readouterr().err
    print(name, "->", line.strip(), file=sys.stderr)
    assert end.value.code == 2
    assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1
    assert len(line) <= 200
    for word in words:
        assert word in line
    assert compiled == []


# ---- A mistake costs nothing --------------------------------------------------------------------

MISTAKES = {
    "--batch-size 1264": "1,257 examples",
    "--batch-size 12": "multiple of 8",
    "--best valid/loss min": "'valid/loss'",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_does_not_take_the_folder(mistake, capsys):
    """The command as corrected must not be refused for what the mistake left behind."""
    for other in [mistake, *MISTAKES]:
        with pytest.raises(SystemExit) as end:
            main(*TRAIN.split(), *other.split())
        assert end.value.code == 2
        assert MISTAKES[other] in capsys.readouterr().err
        assert not Path("run/config.json").exists()


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("then", [complete, unfinished])
def test_a_mistake_with_fresh_erases_nothing(mistake, then, trained, capsys):
    then(Path("run"), trained)
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as end:
        main(*TRAIN.split(), "--fresh", *mistake.split())
    assert end.value.code == 2 and MISTAKES[mistake] in capsys.readouterr().err
    after = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}
    lock = Path("run/.lock")
    assert {**before, lock: b""} == {**after, lock: b""}


def test_debug_shows_where_it_came_from():
    with pytest.raises(dlx.BadInput, match="steps is 0"):
        main("--steps", "0", "--debug")


def test_in_a_notebook_it_is_a_value_error():
    with pytest.raises(ValueError, match="steps is 0"):
        dlx.Run(steps=0)
