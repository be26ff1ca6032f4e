"""The benchmark's own honesty: the sides compute the same, and where they do not, it says so."""

import importlib.util
import json

import numpy as np
import pytest
from tqdm import tqdm

from experiments.benchmarks import __main__ as benchmarks

HAVE_TORCH = importlib.util.find_spec("torch") is not None


def measured(row, *sides):
    config = benchmarks.Config(sides=sides, rounds=2, seconds=0.01)
    return benchmarks.measure(row, config, tqdm(disable=True))


@pytest.mark.slow
def test_a_row():
    found = measured("mlp", "scan")
    assert set(found["sides"]) == {"flax", "dlx", "scan"}
    for side in found["sides"].values():
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


def test_intervals():
    low, high = benchmarks.interval(np.array([1.0, 1.1, 1.2, 1.3, 5.0]))
    assert 1 <= low <= 1.2 <= high <= 5


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed: pip install -e '.[parity]'")
@pytest.mark.parametrize("row", ["mlp", "lenet", "cnn", "gpt-4x128", "rbm"])
def test_both_sides_compute_the_same(row):
    """The first losses, before and after an update."""
    found = measured(row, "eager")
    assert "refused" not in found and "eager" in found["ratios"], found
