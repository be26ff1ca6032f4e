"""make_step against what a textbook would write in NumPy, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import checkpoint, metrics

RNG = np.random.default_rng


@pytest.fixture
def promotion():
    """flax and optax promote dtypes within themselves; what calls them here needs this."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def mean(value):
    """A metric as a number, be it a scalar or (sum, weight)."""
    return float(value[0]) / float(value[1]) if isinstance(value, tuple) else float(value)


def close(a, b, tolerance):
    """Every leaf within `tolerance` of the largest number in it."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.abs(x - y).max() <= tolerance * max(1.0, np.abs(y).max())


def linear(params, model_state, batch, key):
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    return jnp.mean(error**2), (model_state, {})


def linear_batch(rng, n=12):
    x = rng.normal(size=(n, 3))
    return {"x": x, "y": x @ np.array([1.0, -2.0, 0.5]) + 0.3 + rng.normal(size=n)}


def linear_gradient(w, b, batch):
    """(loss, gradients), by hand."""
    x, error = batch["x"], batch["x"] @ w + b - batch["y"]
    return np.mean(error**2), 2 * x.T @ error / len(error), 2 * np.mean(error)


def linear_state(tx, **kwargs):
    params = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.array([0.5])}
    return dlx.train_state(jax.random.key(0), {"params": params}, tx, **kwargs)


def test_sgd_with_momentum(x64):
    rate, momentum = 0.05, 0.9
    tx = optax.sgd(rate, momentum)
    step, state = jax.jit(dlx.make_step(linear, tx)), linear_state(tx)
    w, b = np.array([0.1, 0.2, -0.3]), np.array([0.5])
    vw, vb = np.zeros(3), np.zeros(1)
    rng = RNG(0)
    for t in range(6):
        batch = linear_batch(rng)
        state, metrics = step(state, batch)
        loss, gw, gb = linear_gradient(w, b, batch)
        vw, vb = gw + momentum * vw, gb + momentum * vb
        w, b = w - rate * vw, b - rate * vb
        assert int(state.step) == t + 1
        assert mean(metrics["loss"]) == pytest.approx(loss, rel=1e-13)
        norm = np.sqrt(np.sum(gw**2) + gb**2)
        assert mean(metrics["grad_norm"]) == pytest.approx(float(norm), rel=1e-13)
        close(state.params, {"w": w, "b": b}, 1e-13)


# ---- Accumulation ------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two layers; no statistics, no dropout."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(16, dtype=x.dtype, param_dtype=x.dtype, name="one")(x))
        return nn.Dense(5, dtype=x.dtype, param_dtype=x.dtype, name="two")(x)


def examples(params, model_state, batch, key):
    """A mean over examples, with a scalar metric and a pair."""
    logits = MLP().apply({"params": params}, batch["x"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    hit = metrics.correct(logits, batch["label"]).astype(losses.dtype)
    first = (batch["label"] == 0).astype(losses.dtype)
    pair = ((losses * first).sum(), first.sum())  # a mean over some of the examples
    return losses.mean(), (model_state, {"accuracy": hit.mean(), "loss_of_class_0": pair})


def tokens(params, model_state, batch, key):
    """A mean over the tokens that the mask leaves; "weight" says over how many."""
    logits = MLP().apply({"params": params}, batch["x"])  # (B, T, 5)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    n = batch["mask"].sum()
    hit = metrics.correct(logits, batch["label"]).astype(losses.dtype)
    loss = (losses * batch["mask"]).sum() / jnp.maximum(n, 1)
    accuracy = (hit * batch["mask"]).sum() / jnp.maximum(n, 1)
    return loss, (model_state, {"weight": n, "accuracy": accuracy})


def batch_of(loss_fn, rng, n=24):
    if loss_fn is examples:
        return {"x": rng.normal(size=(n, 7)), "label": rng.integers(0, 5, n)}
    mask = (rng.random((n, 6)) < rng.random((n, 1))).astype(np.float64)
    mask[1::4] = 0  # the second of four micro-batches has nothing to say
    return {"x": rng.normal(size=(n, 6, 7)), "label": rng.integers(0, 5, (n, 6)), "mask": mask}


@pytest.mark.parametrize("loss_fn", [examples, tokens])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_none(x64, loss_fn, accumulate):
    tx = optax.sgd(0.3, 0.9, nesterov=True)
    params = MLP().init(jax.random.key(1), jnp.zeros((1, 7)))["params"]
    whole = dlx.train_state(jax.random.key(2), {"params": params}, tx, ema=True)
    parts = whole
    kwargs = {"clip_norm": 0.7, "ema": 0.9}
    one = jax.jit(dlx.make_step(loss_fn, tx, **kwargs))
    many = jax.jit(dlx.make_step(loss_fn, tx, accumulate=accumulate, **kwargs))
    rng = RNG(3)
    for _ in range(4):
        batch = batch_of(loss_fn, rng)
        whole, wanted = one(whole, batch)
        parts, found = many(parts, batch)
        assert set(found) == set(wanted)
        for name in wanted:
            assert mean(found[name]) == pytest.approx(mean(wanted[name]), rel=1e-12), name
            assert isinstance(found[name], tuple) == isinstance(wanted[name], tuple)
        if loss_fn is tokens:  # the weight of a row in the log is the number of tokens
            assert float(found["loss"][1]) == batch["mask"].sum() == float(wanted["loss"][1])
        close(parts.params, whole.params, 1e-12)
        close(parts.opt_state, whole.opt_state, 1e-12)
        close(parts.ema, whole.ema, 1e-12)
    assert np.abs(np.asarray(parts.params["one"]["kernel"] - params["one"]["kernel"])).max() > 1e-3


def test_accumulation_weighs_tokens_and_not_micro_batches(x64):
    """The mean of the micro-batches' means would be another number: the masks see to that."""
    batch = batch_of(tokens, RNG(3))
    params = MLP().init(jax.random.key(1), jnp.zeros((1, 7)))["params"]
    parts = [jax.tree.map(lambda x, i=i: x[i::4], batch) for i in range(4)]
    each = [float(tokens(params, {}, part, None)[0]) for part in parts]
    tx = optax.sgd(1.0)
    state = dlx.train_state(jax.random.key(2), {"params": params}, tx)
    _, metrics = jax.jit(dlx.make_step(tokens, tx, accumulate=4))(state, batch)
    counts = np.array([part["mask"].sum() for part in parts])
    assert mean(metrics["loss"]) == pytest.approx(float(each @ counts / counts.sum()), rel=1e-12)
    assert abs(mean(metrics["loss"]) - np.mean(each)) > 1e-3


class Normed(nn.Module):
    """Batch normalisation alone decides the state."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, momentum=0.9, param_dtype=x.dtype, dtype=x.dtype, name="n")(x)
        return nn.Dense(1, param_dtype=x.dtype, dtype=x.dtype, name="d")(x)


def normed(params, model_state, batch, key):
    out, model_state = Normed().apply(
        {"params": params, **model_state}, batch["x"], True, mutable=list(model_state)
    )
    return jnp.mean((out[:, 0] - batch["y"]) ** 2), (model_state, {})


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_batch_statistics_go_through_micro_batches_in_turn(x64, promotion, accumulate):
    tx = optax.sgd(0.0)
    variables = Normed().init(jax.random.key(0), jnp.zeros((2, 3)), False)
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)
    state = dlx.train_state(jax.random.key(0), variables, tx)
    step = jax.jit(dlx.make_step(normed, tx, accumulate=accumulate))
    average, variance = np.zeros(3), np.ones(3)
    rng = RNG(4)
    for _ in range(2):
        batch = {"x": rng.normal(1.0, 2.0, (12, 3)), "y": rng.normal(size=12)}
        state, _ = step(state, batch)
        for i in range(accumulate):
            part = batch["x"][i::accumulate]
            average = 0.9 * average + 0.1 * part.mean(0)
            variance = 0.9 * variance + 0.1 * part.var(0)
    close(state.model_state, {"batch_stats": {"n": {"mean": average, "var": variance}}}, 1e-12)


# ---- Clipping, averaging, keys ------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.5, 100.0])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_by_the_global_norm(x64, clip, accumulate):
    tx = optax.sgd(1.0)
    batch = linear_batch(RNG(5))
    step = jax.jit(dlx.make_step(linear, tx, clip_norm=clip, accumulate=accumulate))
    before = linear_state(tx)
    after, metrics = step(before, batch)
    _, gw, gb = linear_gradient(*(np.asarray(before.params[k]) for k in "wb"), batch)
    norm = float(np.sqrt(np.sum(gw**2) + gb**2))
    assert 0.5 < norm < 100  # clipped in one case, left alone in the other
    scale = min(1.0, clip / norm)
    moved = jax.tree.map(lambda a, b: np.asarray(a - b), before.params, after.params)
    close(moved, {"w": scale * gw, "b": np.array([scale * gb])}, 1e-13)
    assert mean(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-13)  # before clipping


def test_average_of_the_parameters(x64):
    tx = optax.sgd(0.05)
    step, state = jax.jit(dlx.make_step(linear, tx, ema=0.8)), linear_state(tx, ema=True)
    average = jax.tree.map(np.asarray, state.params)
    rng = RNG(6)
    for _ in range(5):
        state, _ = step(state, linear_batch(rng))
        average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * np.asarray(p), average, state.params)
        close(state.ema, average, 1e-13)
    assert state.variables["params"] is state.ema
    assert np.abs(average["w"] - np.asarray(state.params["w"])).max() > 1e-3


def test_without_an_average_the_parameters_are_the_variables():
    state = linear_state(optax.sgd(0.1))
    assert state.ema is None and state.variables["params"] is state.params


def noisy(params, model_state, batch, key):
    noise = jax.random.uniform(key)
    return jnp.mean((batch["x"] @ params["w"] - noise) ** 2), (model_state, {"noise": noise})


def test_a_step_draws_from_key_and_step_alone():
    tx = optax.sgd(0.1)
    step = jax.jit(dlx.make_step(noisy, tx))

    def draws(key, fill):
        state = dlx.train_state(key, {"params": {"w": jnp.full(2, fill)}}, tx)
        out = []
        for _ in range(5):
            state, metrics = step(state, {"x": np.full((4, 2), fill, np.float32)})
            out.append(mean(metrics["noise"]))
        assert (jax.random.key_data(state.key) == jax.random.key_data(key)).all()
        return out

    key = jax.random.key(7)
    first = draws(key, 1.0)
    assert len(set(first)) == 5
    assert first == draws(key, 2.0)  # other parameters, other data: the same draws
    assert not set(first) & set(draws(jax.random.key(8), 1.0))
    assert first == [float(jax.random.uniform(jax.random.fold_in(key, t))) for t in range(5)]


def test_micro_batches_draw_differently():
    tx = optax.sgd(0.1)
    seen = []

    def loss_fn(params, model_state, batch, key):
        jax.debug.callback(lambda x: seen.append(float(x)), jax.random.uniform(key))
        return jnp.mean(batch["x"] * params["w"]), (model_state, {})

    state = dlx.train_state(jax.random.key(0), {"params": {"w": jnp.ones(())}}, tx)
    step = jax.jit(dlx.make_step(loss_fn, tx, accumulate=4))
    for _ in range(2):
        state, _ = step(state, {"x": np.ones(8, np.float32)})
    jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 8


# ---- bfloat16 ----------------------------------------------------------------------------------


class Network(nn.Module):
    """Statistics, a layer, a dtype that follows the input."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(32, dtype=x.dtype, name="one")(x)
        x = jnp.tanh(nn.BatchNorm(not train, momentum=0.9, dtype=x.dtype, name="norm")(x))
        return nn.Dense(5, dtype=x.dtype, name="two")(x)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bfloat16_computes_and_float32_keeps(promotion, accumulate):
    seen = []

    def loss_fn(params, model_state, batch, key):
        logits, model_state = Network().apply(
            {"params": params, **model_state}, batch["x"], True, mutable=list(model_state)
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        dtypes = {str(x.dtype) for x in jax.tree.leaves(params)}
        seen.append((dtypes, str(batch["x"].dtype), str(batch["label"].dtype), str(loss.dtype)))
        return loss, (model_state, {"loss_again": loss})

    rng = RNG(9)
    batch = {
        "x": rng.normal(size=(64, 8)).astype(np.float32),
        "label": rng.integers(0, 5, 64).astype(np.int32),
    }
    variables = Network().init(jax.random.key(0), batch["x"], False)

    def gradient(**kwargs):
        """(state after a step of size 1, parameters before - after)."""
        tx = optax.chain(optax.trace(0.9), optax.scale(-1.0))
        state = dlx.train_state(jax.random.key(1), variables, tx, ema=True)
        step = dlx.make_step(loss_fn, tx, ema=0.9, accumulate=accumulate, **kwargs)
        new, metrics = jax.jit(step)(state, batch)
        assert {str(x.dtype) for x in jax.tree.leaves(metrics)} == {"float32"}
        return new, jax.tree.map(lambda a, b: a - b, state.params, new.params)

    wide, exact = gradient()
    assert all(s == ({"float32"}, "float32", "int32", "float32") for s in seen)
    seen.clear()
    state, rough = gradient(compute_dtype=jnp.bfloat16)
    assert seen and all(s == ({"bfloat16"}, "bfloat16", "int32", "bfloat16") for s in seen)
    for kept in (state.params, state.opt_state, state.model_state, state.ema, rough):
        assert {str(x.dtype) for x in jax.tree.leaves(kept)} == {"float32"}
    assert checkpoint.spec(state) == checkpoint.spec(wide)
    difference = optax.tree.norm(jax.tree.map(lambda a, b: a - b, rough, exact))
    relative = float(difference / optax.tree.norm(exact))
    assert 1e-5 < relative < 0.03  # not the same arithmetic, and the same direction


# ---- Constants, donation ------------------------------------------------------------------------


def test_other_networks_are_not_differentiated_and_not_split():
    @jax.custom_vjp
    def teach(weights, x):
        return x @ weights

    def backward(saved, g):
        raise AssertionError("a gradient of the teacher was asked for")

    teach.defvjp(lambda weights, x: (teach(weights, x), None), backward)

    def loss_fn(params, model_state, batch, key, *, teacher):
        wanted = teach(teacher["w"], batch["x"])
        return jnp.mean((batch["x"] @ params["w"] - wanted) ** 2), (model_state, {})

    tx = optax.sgd(0.1)
    state = dlx.train_state(jax.random.key(0), {"params": {"w": jnp.zeros(3)}}, tx)
    teacher = {"w": jnp.array([1.0, 2.0, 3.0]), "name": jax.random.key(0)}  # 3 rows, 4 parts
    x = RNG(1).normal(size=(8, 3)).astype(np.float32)
    for accumulate in (1, 4):
        step = jax.jit(dlx.make_step(loss_fn, tx, accumulate=accumulate))
        new, metrics = step(state, {"x": x}, teacher=teacher)
        error = x @ np.array([1.0, 2.0, 3.0], np.float32)
        np.testing.assert_allclose(mean(metrics["loss"]), np.mean(error**2), rtol=1e-6)
        np.testing.assert_allclose(new.params["w"], 0.2 * x.T @ error / 8, rtol=1e-5)


@pytest.mark.parametrize("made", ["by jit(init)", "eagerly"])
def test_a_donated_state_works(made):
    """Two leaves that shared a buffer would be donated twice, which XLA refuses."""
    tx = optax.sgd(0.1, 0.9)
    net = Network()

    def init(key):
        variables = net.init(key, jnp.zeros((2, 8)), False)
        return dlx.train_state(key, variables, tx, ema=True)

    def loss_fn(params, model_state, batch, key):
        out, model_state = net.apply(
            {"params": params, **model_state}, batch["x"], True, mutable=list(model_state)
        )
        return jnp.mean(out**2), (model_state, {})

    state = (jax.jit(init) if made == "by jit(init)" else init)(jax.random.key(0))
    step = jax.jit(dlx.make_step(loss_fn, tx, ema=0.9), donate_argnums=0)
    batch = {"x": RNG(0).normal(size=(16, 8)).astype(np.float32)}
    losses = []
    for _ in range(3):
        old = state
        state, metrics = step(state, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves((old.params, old.ema, old.opt_state)))
        losses.append(mean(metrics["loss"]))
    assert losses[2] < losses[0] and np.isfinite(losses).all()
