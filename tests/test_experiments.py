"""Every experiment from one table, on small made-up data: its names are complete, its test preset
ends the same whatever happened to it, and its paper preset can be lowered for an accelerator."""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest

import dlx
from dlx import experiment as contract
from dlx import feed, metrics, runs, sharding, writers
from dlx.data import bpe, cifar10, mnist, multi30k, ptb, series, shakespeare, text, tfds
from tests.shapes import slow_but
from tests.test_contract import assert_same, recorded

EXPERIMENTS = runs.experiments()
KEYS = {
    "system", "paper", "data", "metric", "unit", "higher_is_better", "target", "bar", "reported",
    "time",
}  # fmt: skip


# ---- Data that is not there --------------------------------------------------------------------


def images(n, shape, seed):
    """Smooth ones: the whitening of cifar10_fast needs neighbours that are alike."""
    noise = np.random.default_rng(seed).normal(size=(n, *shape))
    smooth = noise.cumsum(1).cumsum(2)
    return (255 / (1 + np.exp(-smooth / 4))).astype(np.uint8)


@functools.cache
def splits(shape, train, classes=10):
    sizes = {"train": train, "validation": 64, "test": 64, "train+validation": train + 64}
    return {
        name: {
            "image": images(n, shape, seed),
            "label": np.random.default_rng(seed).integers(0, classes, n).astype(np.int32),
        }
        for seed, (name, n) in enumerate(sizes.items())
    }


def waves(name, train):
    """A day's wave with noise, hour by hour."""
    T, D = train + 128, 7 if name == "ett" else 1
    noise = np.random.default_rng(0).normal(size=(T, D))
    values = 3 + np.sin(np.arange(T) * 2 * np.pi / 24)[:, None] + 0.1 * noise
    time = np.datetime64("2012-01-01T00", "h") + np.arange(T)
    return series.Series(time, values, tuple("abcdefg"[:D]), (train, train + 64, T))


@functools.cache
def captions(train):
    """Sentences of numbers, in another order in the other language."""
    random, out = np.random.default_rng(0), {}
    for name, n in (("train", train), ("validation", 64), ("test", 64)):
        lines = [random.integers(0, 30, k).tolist() for k in random.integers(2, 8, n)]
        sides = {"en": lines, "de": [line[::-1] for line in lines]}
        out[name] = {k: tuple(" ".join(map(str, x)) for x in v) for k, v in sides.items()}
    return out


class Examples:
    """What `tfds.source` gives, n examples of different sizes."""

    def __init__(self, n, classes):
        self.n, self.classes = n, classes

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        random = np.random.default_rng(i)
        size = random.integers(34, 60, 2)
        return {"image": images(1, (*size, 3), i)[0], "label": i % self.classes}


@functools.cache
def words(tokens):
    """A text by chance in these tokens."""
    random = np.random.default_rng(0)
    parts = [random.integers(0, len(tokens), n).astype(np.int32) for n in (20_000, 700, 700)]
    return text.Text(text.Vocabulary(tokens, " "), *parts)


@pytest.fixture
def no_files(monkeypatch):
    """-> a function that puts `train` made-up examples in the place of every data set."""

    def put(train):
        monkeypatch.setattr(mnist, "load", lambda name="mnist": splits((28, 28, 1), train))
        monkeypatch.setattr(cifar10, "load", lambda: splits((32, 32, 3), train))
        monkeypatch.setattr(series, "load", lambda name: waves(name, train))
        monkeypatch.setattr(multi30k, "load", lambda: captions(train))
        monkeypatch.setattr(bpe.Vocabulary, "check", lambda self, digest, name: self)
        monkeypatch.setattr(tfds, "source", lambda *name: Examples(train, 10))
        monkeypatch.setattr(shakespeare, "load", lambda: words(tuple(shakespeare.CHARACTERS)))
        numbered = (ptb.EOS, *map(str, range(1, ptb.WORDS)))
        monkeypatch.setattr(ptb, "load", lambda: words(numbered))
        # No more rows to evaluate than there are.
        full = metrics.evaluator
        monkeypatch.setattr(metrics, "evaluator", lambda measure, data, n: full(measure, data, 64))
        # Matplotlib takes longer than these runs, and has tests of its own.
        monkeypatch.setattr(writers, "curves", lambda folder, rows: None)

    # Flax and optax promote, and so do experiments: on the command line nothing is strict.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield put


@pytest.fixture(params=EXPERIMENTS)
def module(request):
    return runs.find_experiment(request.param)


def play(module, config, folder, mesh, stop=None):
    """[(state, rows)] of each phase, the last one stopped at a step by Ctrl-C."""
    state, ends = None, []
    phases = runs.phases(module.build(config), config, folder)
    for i, (place, run, make) in enumerate(phases, 1):
        made = make(state)._replace(pictures={})
        made = recorded(made, [], stop if i == len(phases) else None) if made.data else made
        state, rows = dlx.fit(made, run, workdir=place, given=state, mesh=mesh, writers=[])
        ends.append((state, rows))
    return ends


# ---- The table ---------------------------------------------------------------------------------


def test_names(module):
    assert module.CARD.keys() >= KEYS
    assert next(iter(module.PRESETS)) == "laptop"
    assert {"laptop", "paper", "test"} <= module.PRESETS.keys()
    assert set(module.CARD.get("presets", {})) <= module.PRESETS.keys()
    for config in module.PRESETS.values():
        assert type(config) is module.Config and isinstance(config.run, dlx.Run)
    assert module.__doc__ and module.Config.__doc__
    assert "noqa" not in inspect.getsource(module.Config)  # comments are what --help prints
    for word in ("Paper ", "Command ", "Hardware ", "Expected "):
        assert f"\n{word}" in module.__doc__


@pytest.mark.parametrize("module", slow_but(EXPERIMENTS, "digits_cnn", "mnist_mlp"), indirect=True)
def test_a_stop_leaves_no_trace(module, tmp_path, mesh, no_files):
    """Ctrl-C in the last phase, between two saves."""
    no_files(256)
    config = module.PRESETS["test"]
    whole = play(module, config, tmp_path / "whole", mesh)
    *_, (_, run, _) = phases = runs.phases(module.build(config), config, tmp_path / "stopped")
    stop = run.steps // 2 + 1
    *_, (_, rows) = play(module, config, tmp_path / "stopped", mesh, stop)
    assert rows[-1]["step"] <= stop < run.steps
    resumed = play(module, config, tmp_path / "stopped", mesh)
    for (place, _, _), (a, _), (b, _) in zip(phases, whole, resumed, strict=True):
        assert_same(a, b)
        other = tmp_path / "whole" / place.relative_to(tmp_path / "stopped")
        for name in ("metrics.jsonl", "result.json"):
            assert (place / name).read_bytes() == (other / name).read_bytes(), name
    assert any(k.startswith("test/") for k in whole[-1][1][-1])


@pytest.mark.slow
def test_eight_devices_compute_as_one(module, mesh, no_files, cached):
    """The losses of the first three steps."""
    cached(False)  # as the command line has it for several CPU devices
    no_files(256)
    config, losses = module.PRESETS["test"], []
    for devices in (mesh, dlx.make_mesh("data=2,fsdp=2,tensor=2")):
        state, lines = None, []
        for _, run, make in runs.phases(module.build(config), config, None):
            made, few = make(state), dataclasses.replace(run, log_every=1, eval_every=run.steps)
            few = dataclasses.replace(few, steps=3, eval_every=3, save_every=3, best=None)
            made = made._replace(evals={}, test=None, pictures={})
            state, rows = dlx.fit(made, few, given=state, mesh=devices, writers=[])
            lines += [row["train/loss"] for row in rows if "train/loss" in row]
        losses.append(lines)
    assert len(losses[0]) >= 3
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_the_paper_s_step_for_a_tpu(module, no_files):
    """Init, step and lowering by shapes alone, on a mesh."""
    no_files(1024)
    config, mesh = module.PRESETS["paper"], dlx.make_mesh("data=4,fsdp=2")
    if getattr(config, "batch_size", 8) % 8:  # 20 rows, as a paper has them, go to four devices
        mesh = dlx.make_mesh("data=2,fsdp=2", jax.devices()[:4])
    given = None
    for _, run, make in runs.phases(module.build(config), config, None):
        made = make(given)
        made = made._replace(step=jax.jit(made.step))  # traced once
        state = jax.eval_shape(made.init, jax.random.key(run.seed), given)
        assert contract.parameters(state) > 0
        batch = feed.first(made, mesh)
        after, values = jax.eval_shape(made.step, state, batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), state
        )
        assert values
        batch = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            batch,
            jax.tree.map(lambda x: x.sharding, sharding.put(batch, mesh)),
        )
        placed = sharding.place(state, mesh, made.rules)
        lowered = made.step.trace(placed, batch).lower(lowering_platforms=("tpu",))
        assert "stablehlo" in lowered.as_text()
        given = state
