"""Recurrent networks against the equations step by step; what stands behind a sequence's end."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import nn
from dlx.models import rnn

B, T, D, H, V = 3, 6, 4, 5, 11


def perturbed(model, x, dtype=jnp.float64):
    """Every parameter away from where it starts."""
    random = np.random.default_rng(0)
    x = x.astype("int32" if x.dtype.kind == "i" else "float32")
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    return jax.tree.map(lambda s: jnp.asarray(random.normal(size=s.shape) / 2, dtype), shapes)


def inputs(dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(1).normal(size=(B, T, D)), dtype)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step(cell, p, x, state):
    """One step of one cell, from the equations in the head of the file."""

    def w(gate):
        return x @ p["i" + gate]["kernel"] + p["i" + gate].get("bias", 0)

    def u(gate):
        return h @ p["h" + gate]["kernel"] + p["h" + gate].get("bias", 0)

    if cell == "lstm":
        c, h = state
        i, f, o = (sigmoid(w(gate) + u(gate)) for gate in "ifo")
        c = f * c + i * np.tanh(w("g") + u("g"))
        h = o * np.tanh(c)
        return (c, h), h
    h = state
    if cell == "elman":
        h = np.tanh(w("") + u(""))
    else:
        r, z = sigmoid(w("r") + u("r")), sigmoid(w("z") + u("z"))
        h = (1 - z) * np.tanh(w("n") + r * u("n")) + z * h
    return h, h


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_the_equations(cell, x64):
    """Two layers in both directions, each sequence alone, from a state that is not zero."""
    model, x, lengths = rnn.RNN(H, 2, cell, True), inputs(), np.array([6, 1, 4])
    v = perturbed(model, x)
    random = np.random.default_rng(2)
    part = (B, H) if cell != "lstm" else (2, B, H)
    state = [random.normal(size=part) for _ in range(4)]
    if cell == "lstm":
        state = [tuple(s) for s in state]
    got = jax.jit(model.apply)(v, x, jax.tree.map(jnp.asarray, tuple(state)), jnp.array(lengths))
    p = jax.tree.map(np.asarray, v["params"])
    outputs, last = np.zeros((B, T, 2 * H)), jax.tree.map(np.copy, state)
    for b, n in enumerate(lengths):
        layer = np.asarray(x)[b, :n]
        for i in range(2):
            sides = []
            for j, (name, order) in enumerate((("", range(n)), ("_reverse", range(n - 1, -1, -1)))):
                s = jax.tree.map(lambda a, b=b: a[b], state[2 * i + j])
                out = np.zeros((n, H))
                for t in order:
                    s, out[t] = step(cell, p[f"layer{i}{name}"], layer[t], s)
                jax.tree.map(lambda a, new, b=b: a.__setitem__(b, new), last[2 * i + j], s)
                sides.append(out)
            layer = np.concatenate(sides, 1)
        outputs[b, :n] = layer
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, (outputs, tuple(last))
    )


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("cell", rnn.CELLS)
def test_padding_may_be_anything(cell, plain):
    """NaN behind the ends: outputs, states and all gradients stay as they are, and finite."""
    model, x, lengths = rnn.RNN(H, 2, cell, True), inputs(jnp.float32), jnp.array([6, 2, 4])
    v = perturbed(model, x, jnp.float32)
    behind = (jnp.arange(T)[None] >= lengths[:, None])[..., None]

    def loss(v, x):
        y, state = model.apply(v, x, None, lengths)
        return sum((jnp.sin(a) ** 2).sum() for a in jax.tree.leaves((y, state))), (y, state)

    with nn.plain(plain):
        f = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        want, got = f(v, jnp.where(behind, 0.0, x)), f(v, jnp.where(behind, jnp.nan, x))
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(want))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    (_, dx), (y, _) = got
    assert not np.asarray(y)[np.asarray(behind)[..., 0]].any()
    assert not np.asarray(dx)[np.asarray(behind)[..., 0]].any()
    assert np.asarray(dx)[~np.asarray(behind)[..., 0]].all()


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_the_state_goes_on(cell, x64):
    """A text in two parts, and token by token, is the text."""
    model = rnn.LanguageModel(V, H, 2, cell, dropout=0.3)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, T)))
    v = perturbed(model, tokens)
    apply = jax.jit(model.apply)
    whole, last = apply(v, tokens)
    first, state = apply(v, tokens[:, :4])
    second, after = apply(v, tokens[:, 4:], state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), after, last)
    state = None
    for t in range(T):
        logits, state = apply(v, tokens[:, t : t + 1], state)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-12)


def test_truncated_back_propagation():
    """The step carries the state on; and no gradient goes back through it."""
    model, tx = rnn.LanguageModel(V, H), optax.sgd(0.0)
    text = np.random.default_rng(0).integers(0, V, (B, 2 * T + 1)).astype(np.int32)
    v = model.init(jax.random.key(0), text[:, :T])
    _, zero = model.apply(v, text[:, :T])
    zero = jax.tree.map(jnp.zeros_like, zero)
    state = dlx.train_state(jax.random.key(0), {**v, "state": zero}, tx)
    advance = jax.jit(dlx.make_step(rnn.language(model), tx))
    for start in (0, T):
        part = text[:, start : start + T + 1]
        state, metrics = advance(state, {"tokens": part[:, :-1], "targets": part[:, 1:]})
    logits, last = model.apply(v, text[:, :-1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.model_state["state"], last
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])[:, T:].mean()
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_every_parameter_learns(cell):
    model = rnn.LanguageModel(V, H, 2, cell, dropout=0.3)
    text = np.random.default_rng(0).integers(0, V, (B, T + 1))
    params = model.init(jax.random.key(0), text)["params"]
    batch = {"tokens": text[:, :-1], "targets": text[:, 1:]}
    loss = rnn.language(model)
    gradients = jax.jit(jax.grad(lambda p: loss(p, {}, batch, jax.random.key(1))[0]))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("variational", [False, True])
def test_dropout(variational):
    """Between the layers only; variational: the same units at every step, others by sequence."""
    model = rnn.RNN(64, 2, "elman", dropout=0.5, variational=variational)
    x = inputs(jnp.float32)
    v = model.init(jax.random.key(0), x)
    seen = {}

    def look(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if isinstance(context.module, nn.Dropout):
            seen[context.module.name] = np.asarray(y) == 0
        return y

    with nn.intercept_methods(look):
        model.apply(v, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert list(seen) == ["drop1"]
    dropped = seen["drop1"]  # (B, T, H)
    assert 0.35 < dropped.mean() < 0.65 and (dropped[0] != dropped[1]).any()
    assert (dropped == dropped[:, :1]).all() == variational
    a, b = (model.apply(v, x)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_bfloat16(cell, promoting):
    """By the attribute, and by parameters that `make_step` has cast while the state stayed."""
    tokens = jnp.zeros((B, T), jnp.int32)
    model = rnn.LanguageModel(V, H, 2, cell)
    v = jax.eval_shape(model.init, jax.random.key(0), tokens)
    logits, state = jax.eval_shape(model.clone(dtype=jnp.bfloat16).apply, v, tokens)
    assert {a.dtype for a in jax.tree.leaves((logits, state))} == {jnp.dtype(jnp.bfloat16)}
    assert {a.dtype for a in jax.tree.leaves(v)} == {jnp.dtype(jnp.float32)}
    _, wide = jax.eval_shape(model.apply, v, tokens)
    low = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), v)
    assert jax.eval_shape(model.apply, low, tokens, wide)[0].dtype == jnp.bfloat16


def test_tied_weights():
    model = rnn.LanguageModel(V, H, tied=True)
    tokens = jnp.zeros((B, T), jnp.int32)
    v = model.init(jax.random.key(0), tokens)
    assert sorted(v["params"]) == ["embedding", "rnn"]
    logits, _ = model.apply(v, tokens)
    table = v["params"]["embedding"]["embedding"]
    y, _ = rnn.RNN(H).apply({"params": v["params"]["rnn"]}, table[tokens])
    np.testing.assert_allclose(logits, jnp.einsum("bth,vh->btv", y, table), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "count"),
    [(rnn.ZarembaSmall(), 4_651_600), (rnn.ZarembaMedium(), 19_775_200),
     (rnn.ZarembaLarge(), 66_022_000), (rnn.LanguageModel(256, 512, cell="gru"), 1_837_312),
     (rnn.LanguageModel(256, 512, cell="elman"), 787_200)],
)  # fmt: skip
def test_parameters(model, count):
    """2 V H + V, and in each layer of an LSTM 4 (2 H H + H), one bias for each gate."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 3), jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    logits, _ = jax.eval_shape(
        model.clone(dtype=jnp.float32).apply, shapes, jnp.zeros((2, 3), jnp.int32)
    )
    assert logits.shape == (2, 3, model.vocabulary) and logits.dtype == jnp.float32


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([6, 0, 3], "a length is 0: all must be from 1 to the 6 steps"),
     ([6, 7, 3], "a length is 7"), ([6, -1, 3], "a length is -1"),
     ([6.0, 2.0, 3.0], r"lengths are float32 of shape \(3,\): give integers"),
     ([6, 2], r"lengths are int32 of shape \(2,\): give integers of shape \(3,\)")],
)  # fmt: skip
def test_lengths_that_are_none(lengths, message):
    x = inputs(jnp.float32)
    with pytest.raises(dlx.BadInput, match=message) as error:
        rnn.RNN(H).init(jax.random.key(0), x, None, jnp.array(lengths))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_lengths_in_any_integers(cell):
    """int8 holds the lengths and not T; a list has no dtype."""
    x = np.random.default_rng(0).normal(size=(3, 200, D)).astype(np.float32)
    model = rnn.RNN(H, cell=cell)
    params = model.init(jax.random.key(0), x)
    wanted = model.apply(params, x, None, jnp.array([3, 127, 100]))
    for lengths in (np.array([3, 127, 100], np.int8), [3, 127, 100]):
        for a, b in zip(*map(jax.tree.leaves, (model.apply(params, x, None, lengths), wanted)),
                        strict=True):  # fmt: skip
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("lengths", [np.array([6, 0, 3]), [6, 7, 3]])
def test_lengths_that_are_known_within_jit(lengths):
    with pytest.raises(dlx.BadInput, match="a length is"):
        jax.jit(lambda x: rnn.RNN(H).init_with_output(jax.random.key(0), x, None, lengths)[0])(
            inputs(jnp.float32)
        )


@pytest.mark.parametrize(
    "wrong", [lambda s: (*s, s[0]), lambda s: s[:1], lambda s: (), lambda s: s[0]]
)
def test_a_state_of_another_network(wrong):
    x, model = inputs(jnp.float32), rnn.RNN(H, 2, "gru", bidirectional=True)
    params = model.init(jax.random.key(0), x)
    _, state = model.apply(params, x)
    model.apply(params, x, state)
    with pytest.raises(dlx.BadInput, match="give a tuple of 4"):
        model.apply(params, x, wrong(state))


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: rnn.RNN(H, cell="ltsm"), "cell is 'ltsm': give one of elman, lstm, gru"),
     (lambda: rnn.LanguageModel(V, H, cell="LSTM"), "cell is 'LSTM'"),
     (lambda: rnn.from_torch({}, "rnn"), "cell is 'rnn'"),
     (lambda: rnn.RNN(H, 0), "layers is 0"), (lambda: rnn.RNN(0), "units is 0"),
     (lambda: rnn.RNN(H, dropout=1.0), "dropout is 1.0"),
     (lambda: rnn.LanguageModel(0, H), "vocabulary is 0")],
)  # fmt: skip
def test_a_network_that_is_none(make, message):
    with pytest.raises(dlx.BadInput, match=message):
        make()
