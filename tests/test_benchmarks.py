"""The benchmark's own honesty: the sides compute the same, and where they do not, it says so."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from dlx.data import images
from experiments.benchmarks import __main__ as benchmarks
from experiments.benchmarks import overhead, report, worker

HAVE_TORCH = importlib.util.find_spec("torch") is not None


def measured(row, *sides):
    config = benchmarks.Config(sides=sides, rounds=2, seconds=0.01)
    return benchmarks.measure(row, config, tqdm(disable=True))


@pytest.mark.slow
def test_a_row():
    found = measured("mlp", "scan", "fit")
    assert set(found["sides"]) == {"flax", "dlx", "scan", "fit"}
    assert found["end_to_end"]["median"] > 0
    for name, side in found["sides"].items():
        if name == "fit":
            continue
        np.testing.assert_allclose(
            side["losses"][0], found["sides"]["flax"]["losses"][0], rtol=1e-6
        )
        assert len(side["all"]) == 2 and side["seconds"] > 0 and side["compile_seconds"] > 0
    assert found["ratios"]["dlx"] == {"median": 1, "low": 1, "high": 1}
    json.dumps(found)


@pytest.mark.slow
def test_a_row_whose_sides_differ_is_refused(monkeypatch):
    def answer(side):
        said = answers(side)
        if "losses" in said and next(turn) == 1:
            said["losses"][0] *= 1.001
        return said

    answers, turn = benchmarks.Side.answer, iter(range(99))
    monkeypatch.setattr(benchmarks.Side, "answer", answer)
    found = measured("mlp")
    assert "first losses" in found["refused"] and not found["ratios"]


@pytest.mark.slow
def test_a_side_that_fails_is_named():
    config = benchmarks.Config(sides=("eager",), rounds=2, seconds=0.01, torch_python="/bin/false")
    found = benchmarks.measure("mlp", config, tqdm(disable=True))
    assert found["sides"]["eager"] == {"failed": "it ended"} and "dlx" in found["ratios"]


@pytest.mark.parametrize("words", [["--rows", "none"], ["--sides", "slow"]])
def test_what_there_is_not(words, monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    with pytest.raises(SystemExit, match=f"{words[1]!r} is none of"):
        benchmarks.main()


@pytest.mark.parametrize("row", ["mlp", "lenet", "resnet50", "rbm"])
def test_the_loop_reads_and_has_one_batch_in_turn(row):
    case = worker.rows()[row].ours(row)
    _, _, data = worker.in_turn(case, 2)
    stream = data(0, lambda n: slice(0, n))
    read, again, one, same, later = (next(stream) for _ in range(5))
    stream.close()
    assert one is same
    for k, x in read.items():
        assert x.shape == case.batch[k].shape
        assert not any(np.array_equal(x, y[k]) for y in (again, one, later))
    assert set(read) == ({"visible"} if row == "rbm" else {"image", "label"})
    image = next(iter(read.values()))
    assert image.dtype == (np.float32 if row == "resnet50" else np.uint8)
    assert row == "rbm" or read["label"].dtype == case.batch["label"].dtype


@pytest.mark.parametrize("row", ["mlp", "lenet", "cnn", "resnet18"])
def test_the_side_fit_augments_anew_each_step(row):
    """As the model's experiment does, while it reads. The model is put aside: its "metrics" are
    what it sees."""
    case = worker.rows()[row].ours(row)
    case = case._replace(init=lambda key: (), step=lambda state, batch: (state, batch["image"]))
    init, step, data = worker.in_turn(case, 2)
    state, step = init(jax.random.key(0)), jax.jit(step)
    batch = next(data(0, lambda n: slice(0, n)))
    seen = []
    for _ in range(4):
        state, image = step(state, batch)
        seen.append(np.asarray(image))
    assert all(x.shape == case.batch["image"].shape and x.dtype == np.float32 for x in seen)
    read, again, one, same = seen
    assert np.array_equal(one, batch["image"]) and np.array_equal(one, same)
    augmented = row != "mlp"
    assert np.allclose(read, images.normalise(batch["image"]), atol=1e-6) != augmented
    assert np.array_equal(read, again) != augmented


def test_a_turn_of_the_side_fit(monkeypatch):
    """What reading costs is seen; what the change between the two costs is not counted."""
    monkeypatch.setattr(worker, "in_turn", lambda case, stretch: ())
    found = []

    def asks(steps):
        found.append(steps)
        taken = np.where(np.arange(steps) // (overhead.FIRST + 10) % 2, 0.8, 1.0)
        taken[:: overhead.FIRST + 10] += 5.0  # when the two change
        return np.cumsum(taken).tolist()

    monkeypatch.setattr(overhead, "asks", asks)
    told = worker.end_to_end(None, 40)
    assert told == {"seconds": pytest.approx(1.0), "share": pytest.approx(0.8)}
    assert found == [2 * worker.PAIRS * (overhead.FIRST + 10)]


def test_seconds_of_the_loop():
    """They are counted when it has compiled: from the ask for one batch to that for another."""
    compiled, asked = [], []

    def step(w, batch):
        compiled.append(len(asked))  # when it is traced
        return w + batch["x"].mean(), {"w": w}

    def data(first_step, rows):
        while True:
            asked.append(1)
            yield {"x": np.ones(8, np.float32)}

    assert overhead.fit_seconds(lambda key: jnp.zeros(()), step, data, 12, steps_per_call=4) > 0
    assert len(asked) == 1 + 4 * overhead.FIRST + 12  # one for its shapes
    assert compiled == [1]


def test_what_the_loop_adds():
    """Round by round, medians beside what is allowed."""
    found = benchmarks.added({
        "import jax": [1.0] * 3, "import dlx": [1.2] * 3, "from dlx import *": [1.3] * 3,
        "first step": [2.0, 3.0, 4.0], "bare, K=1": [1e-4, 2e-4, 9e-4],
        "fit, K=1": [2e-4, 4e-4, 12e-4], "bare, K=32": [2.0] * 3, "fit, K=32": [2.5] * 3,
    })  # fmt: skip
    assert found["loop_us_k1"]["median"] == 200
    assert found["loop_ratio_k32"]["median"] == 1.25
    assert found["import_ratio"]["median"] == 1.2 and found["first_step_ratio"]["median"] == 3
    end = {"median": 0.98, "low": 0.96, "high": 1.01}
    shown = report.table({"overhead": found, "rows": {"mlp": {"end_to_end": end}, "rbm": {}}})
    assert len(shown.splitlines()) == 6
    for words in ("200 (100 to 300)   at most 250", "0.98 (0.96 to 1.01)   at least 0.97"):
        assert words in shown
    json.dumps(found)


def test_the_command_of_a_record():
    """All that was asked for, but no path of the machine."""
    config = benchmarks.Config(("mlp", "rbm"), rounds=5, torch_python="/a/python")
    wanted = "python -m experiments.benchmarks --rows mlp rbm --rounds 5 --torch-python PYTHON"
    assert benchmarks.command(config) == wanted


def test_what_is_short_is_told_with_its_reason():
    def row(eager, scan, compiles):
        ratios = {"eager": eager, "flax": 2.0, "scan": scan}
        sides = {"dlx": {"compile_seconds": compiles}, "flax": {"compile_seconds": 1.0}}
        ratios = {k: {"median": v} for k, v in ratios.items()}
        return {"ratios": ratios, "sides": sides, "why": ""}

    rows = {
        "fine": row(0.96, 1.05, 1.9),
        "slow": row(0.94, 1.0, 1.0) | {"why": "Its products."},
        "scanned": row(1.0, 1.06, 1.0),
        "compiled": row(1.0, 1.0, 2.1),
        "waiting": row(1.0, 1.0, 1.0) | {"end_to_end": {"median": 0.96}},
        "refused": {"ratios": {}, "sides": {}, "why": ""},
    }
    record = {"rows": rows, "overhead": {"loop_us_k1": {"median": 251}}}
    lines = dict(line.split(": ", 1) for line in report.short(record).splitlines())
    beside = {"geometric mean", "the loop adds to a step, us"}
    assert lines.keys() == {"slow", "scanned", "compiled", "waiting", *beside}
    assert lines["geometric mean"].startswith("0.98 times as fast as the best of PyTorch, not 1")
    assert "0.94" in lines["slow"] and lines["slow"].endswith("Its products.")


@pytest.mark.parametrize(
    ("words", "message"),
    [("--rounds 0", "rounds is 0: give 1 or more"), ("--rows mpl", "rows 'mpl' is none of"),
     ("--torch-python /no/python", "/no/python is no Python")],
)  # fmt: skip
def test_a_wrong_command(words, message, monkeypatch):
    """Told before anything is measured."""
    monkeypatch.setattr("sys.argv", ["benchmarks", *words.split()])
    with pytest.raises(SystemExit, match=message):
        benchmarks.main()


@pytest.mark.slow
def test_overhead():
    found = benchmarks.overheads(1)
    assert benchmarks.added(found)["seconds"].keys() == found.keys()
    assert all(t > 0 for times in found.values() for t in times)


def test_intervals():
    low, high = benchmarks.interval(np.array([1.0, 1.1, 1.2, 1.3, 5.0]))
    assert 1 <= low <= 1.2 <= high <= 5


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed: pip install -e '.[parity]'")
@pytest.mark.parametrize("row", ["mlp", "lenet", "cnn", "gpt-4x128", "rbm"])
def test_both_sides_compute_the_same(row):
    """The first losses, before and after an update."""
    found = measured(row, "eager")
    assert "refused" not in found and "eager" in found["ratios"], found
