"""Sums and weights: exact for every batch size, under padding, on a mesh and over a log window."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import dlx
from dlx import metrics
from dlx.data import stream

N = 13
RNG = np.random.default_rng(0)
X = RNG.integers(-50, 50, N)  # integers: every partial sum is exact
WEIGHT = RNG.integers(0, 4, N)  # some are zero
ARRAYS = {
    "x": X.astype(np.float32),
    "weight": WEIGHT.astype(np.float32),
    "index": np.arange(N),
}
EXACT = {
    "x": X.sum() / N,
    "weighted": (X * WEIGHT).sum() / WEIGHT.sum(),
    "scaled": 3 * X.sum() / N,
}


def measure(state, batch):
    return {
        "x": batch["x"],
        "weighted": (batch["x"], batch["weight"]),
        "scaled": state * batch["x"],
    }


# ---- The evaluator -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", range(1, N + 4))
def test_every_batch_size_gives_the_same_mean(batch_size):
    assert metrics.evaluator(measure, ARRAYS, batch_size)(jnp.float32(3)) == EXACT


@pytest.mark.parametrize("spec", ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "tensor=8"])
@pytest.mark.parametrize("batch_size", [1, 8, 12, 16])
def test_eight_devices_give_the_same_mean(spec, batch_size):
    mesh = dlx.make_mesh(spec)
    state = jax.device_put(
        jnp.float32(3), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    with jax.set_mesh(mesh):
        assert metrics.evaluator(measure, ARRAYS, batch_size)(state) == EXACT


def test_a_mesh_shares_the_work():
    """Each device must see its part of the batch and no more."""
    seen = []

    def look(state, batch):
        jax.debug.inspect_array_sharding(batch["x"], callback=seen.append)
        return {"x": batch["x"]}

    with jax.set_mesh(dlx.make_mesh("data=4,fsdp=2")):
        assert metrics.evaluator(look, ARRAYS, 16)(jnp.float32(0)) == {"x": EXACT["x"]}
    assert [s.shard_shape((16,)) for s in seen] == [(2,)]


@pytest.mark.parametrize("batch_size", [4, 5, N, N + 3])
def test_nan_in_padded_rows_stays_there(batch_size):
    """The padded rows repeat an index, so that they can be told from real ones and poisoned."""

    def poisoned(state, batch):
        position = jnp.arange(batch["x"].shape[0])
        padding = (batch["index"] == batch["index"][0]) & (position > 0)
        bad = jnp.where(padding, jnp.nan, batch["x"])
        return {
            "x": bad,
            "weighted": (bad, jnp.where(padding, jnp.nan, batch["weight"])),
            "scaled": state * bad,
        }

    assert metrics.evaluator(poisoned, ARRAYS, batch_size)(jnp.float32(3)) == EXACT


def test_nan_of_weight_zero_does_not_count_and_a_real_one_is_not_hidden():
    arrays = ARRAYS | {"x": np.where(WEIGHT == 0, np.nan, X).astype(np.float32)}
    found = metrics.evaluator(measure, arrays, 5)(jnp.float32(3))
    assert found["weighted"] == EXACT["weighted"]
    assert np.isnan(found["x"])


def test_a_metric_of_no_weight_is_left_out():
    arrays = ARRAYS | {"weight": np.zeros_like(WEIGHT)}
    found = metrics.evaluator(measure, arrays, 5)(jnp.float32(3))
    assert found == {k: v for k, v in EXACT.items() if k != "weighted"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.bool_])
def test_other_dtypes_are_summed_exactly(dtype):
    """301 ones and 40 threes: bfloat16 has no room for such sums."""
    values = np.array([1] * 301 + [0] * 100 + [1 if dtype == jnp.bool_ else 3] * 40)
    evaluate = metrics.evaluator(
        lambda state, batch: {"x": batch["x"].astype(dtype), "weighted": (batch["x"], batch["w"])},
        {"x": values, "w": np.asarray(values).astype(dtype)},
        500,
    )
    weighted = (values * values).sum() / values.sum()
    assert evaluate(None) == {"x": values.sum() / 441, "weighted": weighted}


@pytest.mark.parametrize("shape", ["()", "(B, 2)", "(B, B)"])
def test_a_value_that_is_not_one_an_example_is_refused(shape):
    """A mean would count the padded rows and say nothing."""

    def wrong(state, batch):
        x = batch["x"]
        values = {"()": x.mean(), "(B, 2)": jnp.stack([x, x], 1), "(B, B)": jnp.outer(x, x)}
        return {"loss": values[shape]}

    with pytest.raises(dlx.BadInput, match="'loss'"):
        metrics.evaluator(wrong, ARRAYS, 5)(None)


def test_float64_stays_float64(x64):
    values = np.random.default_rng(1).normal(size=N)
    evaluate = metrics.evaluator(lambda state, batch: {"x": batch["x"]}, {"x": values}, 4)
    assert evaluate(None)["x"] == pytest.approx(values.mean(), rel=1e-15)


def test_lazy_arrays_are_opened_when_they_are_needed():
    opened = []

    def open_arrays():
        opened.append(1)
        return ARRAYS

    evaluate = metrics.evaluator(measure, open_arrays, 4)
    assert not opened
    assert evaluate(jnp.float32(3)) == EXACT
    assert opened


def test_lists_are_arrays():
    lists = {k: v.tolist() for k, v in ARRAYS.items()}
    assert metrics.evaluator(measure, lists, 5)(jnp.float32(3)) == EXACT


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_an_evaluation_sees_what_training_sees(mode):
    """Images of Pillow, numbers of Python and lists, of the same shapes and dtypes."""
    grey = RNG.integers(0, 256, (N, 4, 3), np.uint8)
    rows = [
        {"image": PIL.Image.fromarray(x).convert(mode), "label": i, "z": [0.5, np.float64(i)]}
        for i, x in enumerate(grey)
    ]
    trained = stream.batches(rows, N, 0)(0, lambda n: slice(0, n))
    batch = next(trained)
    trained.close()
    ((found, mask),) = metrics.padded(rows, N)
    assert mask.all() and found.keys() == batch.keys()
    order = np.argsort(batch["label"])
    for key, values in batch.items():
        assert found[key].dtype == values.dtype
        np.testing.assert_array_equal(found[key], values[order])


def test_many_evaluations_compile_once():
    traced = []

    def counted(state, batch):
        traced.append(1)
        return measure(state, batch)

    evaluate = metrics.evaluator(counted, ARRAYS, 4)
    for state in (3, 4, 5):
        evaluate(jnp.float32(state))
    assert len(traced) == 1


def test_correct():
    logits = jnp.array([[[0.0, 2.0], [3.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    hit = metrics.correct(logits, jnp.array([[1, 1], [0, 0]]))
    assert hit.dtype == jnp.float32 and hit.tolist() == [[1.0, 0.0], [1.0, 0.0]]


# ---- The log window ----------------------------------------------------------------------------


def windows(rows, length, start=0, window=None):
    """The windows after each row, as the loop makes them."""
    first = jax.tree.map(jnp.asarray, rows[0])
    if window is None:
        window = metrics.empty_window(first)
    advance = jax.jit(lambda *a: metrics.accumulate(*a, length))
    out = []
    for position, row in enumerate(rows, start):
        window = advance(window, jax.tree.map(jnp.asarray, row), jnp.int32(position))
        out.append(jax.device_get(window))
    return out


ROWS = [
    {"loss": (6.0, 3.0), "norm": 1.0, "reward": (0.0, 0.0)},
    {"loss": (1.0, 1.0), "norm": 2.0, "reward": (0.0, 0.0)},
    {"loss": (8.0, 4.0), "norm": 6.0, "reward": (0.0, 0.0)},
    {"loss": (9.0, 2.0), "norm": 10.0, "reward": (5.0, 2.0)},
    {"loss": (3.0, 1.0), "norm": 20.0, "reward": (0.0, 0.0)},
]


def test_means_of_a_window_by_hand():
    found = [metrics.means(w["sums"]) for w in windows(ROWS, 3)]
    assert found == [
        {"loss": 2.0, "norm": 1.0},
        {"loss": 7 / 4, "norm": 1.5},
        {"loss": 15 / 8, "norm": 3.0},  # the first window is full
        {"loss": 4.5, "norm": 10.0, "reward": 2.5},
        {"loss": 4.0, "norm": 15.0, "reward": 2.5},
    ]


def test_a_window_may_be_put_away_and_taken_up():
    whole = windows(ROWS, 3)
    again = windows(ROWS[1:], 3, start=1, window=whole[0])
    assert jax.tree.map(float, again) == jax.tree.map(float, whole[1:])


def test_a_row_of_a_window_of_one_is_the_step():
    found = [metrics.means(w["sums"])["loss"] for w in windows(ROWS, 1)]
    assert found == [2.0, 1.0, 2.0, 4.5, 3.0]


def test_half_precision_metrics_are_summed_in_float32():
    rows = [{"loss": jnp.bfloat16(1.0)}] * 300
    last = windows(rows, 300)[-1]
    assert last["sums"]["loss"][0].dtype == np.float32
    assert metrics.means(last["sums"]) == {"loss": 1.0}
    assert float(last["sums"]["loss"][0]) == 300.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_bad_step_and_its_metrics_are_named(bad):
    rows = [dict(row) for row in ROWS]
    rows[1]["loss"] = (bad, 1.0)
    rows[2]["norm"] = bad
    found = windows(rows, 3)
    assert [int(w["bad"]) for w in found] == [0, 2, 2, 2, 2]
    metrics.check_window(found[0])
    with pytest.raises(FloatingPointError, match=r"^loss not finite at step 2$"):
        metrics.check_window(found[1])
    with pytest.raises(FloatingPointError, match=r"^loss and norm not finite at step 2$"):
        metrics.check_window(found[2])
    with pytest.raises(FloatingPointError, match=r"^a metric not finite at step 2$"):
        metrics.check_window(found[3])  # the sums began anew; the step is still known


def test_a_weight_that_is_not_finite_is_bad_too():
    rows = [dict(ROWS[0]), {**ROWS[1], "loss": (1.0, np.nan)}]
    with pytest.raises(FloatingPointError, match="loss not finite at step 2"):
        metrics.check_window(windows(rows, 3)[-1])


def test_nan_of_weight_zero_in_training_is_bad():
    """0 / 0 in a loss is a mistake to be told, not one to be averaged away."""
    rows = [{**ROWS[0], "reward": (np.nan, 0.0)}]
    with pytest.raises(FloatingPointError, match="reward not finite at step 1"):
        metrics.check_window(windows(rows, 3)[-1])
