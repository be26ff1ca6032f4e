"""GPT: sizes, causality, dropout, the loss from its definition, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx.models import gpt
from dlx.nn import losses

TINY = gpt.GPT(vocabulary=11, context=8, layers=2, heads=2, width=12, dropout=0.0)


def draw(model, seed=0):
    """(variables, tokens (2, 8)), every parameter away from its start."""
    tokens = jax.random.randint(jax.random.key(seed), (2, 8), 0, model.vocabulary)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    pairs = zip(leaves, keys, strict=True)
    leaves = [x + 0.2 * jax.random.normal(k, x.shape, x.dtype) for x, k in pairs]
    return jax.tree.unflatten(tree, leaves), tokens


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (gpt.GPT2(), 124_439_808),
        (gpt.GPT2Medium(), 354_823_168),
        (gpt.GPT2Large(), 774_030_080),
        (gpt.GPT2XL(), 1_557_611_200),
        (gpt.GPT2(tied=False), 124_439_808 + 50257 * 768),
    ],
)
def test_sizes(model, parameters):
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert sum(x.size for x in jax.tree.leaves(variables)) == parameters
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_logits(dtype, promoting):
    model = gpt.GPT2(layers=1, dtype=dtype)
    tokens = jnp.zeros((2, 5), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    logits = jax.eval_shape(model.apply, variables, tokens)
    assert logits.shape == (2, 5, 50257) and logits.dtype == (dtype or jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


def test_initial_spread():
    """0.02 everywhere, but 0.02 / sqrt(2 L) where a branch joins the stream."""
    model = gpt.GPT(vocabulary=500, context=100, layers=8, heads=2, width=128)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    for path, x in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path)
        if name.endswith("['kernel']") or name.endswith("['embedding']"):
            joins = "['out']" in name or "['down']" in name
            wanted = 0.02 / 4 if joins else 0.02
            assert abs(float(x.std()) / wanted - 1) < 0.05, name
        else:
            assert (x == float("scale" in name)).all(), name


def test_causality():
    """Token 5 changes what is said from place 5 on, and nothing before it."""
    variables, tokens = draw(TINY)
    other = tokens.at[:, 5].add(1) % TINY.vocabulary
    apply = jax.jit(TINY.apply)
    a, b = apply(variables, tokens), apply(variables, other)
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert (np.abs(a[:, 5:] - b[:, 5:]).max((0, 2)) > 1e-3).all()


def test_short_texts_are_prefixes():
    variables, tokens = draw(TINY)
    long = TINY.apply(variables, tokens)
    short = TINY.apply(variables, tokens[:, :3])
    np.testing.assert_allclose(short, long[:, :3], rtol=1e-5, atol=1e-5)


def test_dropout():
    """A function of the key alone, everywhere that it says, and absent in evaluation."""
    variables, tokens = draw(TINY)
    model = TINY.clone(dropout=0.3)

    def apply(seed, model=model):
        return model.apply(variables, tokens, train=True, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(apply(0), apply(0))
    assert (apply(0) != apply(1)).any()
    np.testing.assert_array_equal(model.apply(variables, tokens), TINY.apply(variables, tokens))
    # In every row of every head of its own: texts that are equal come out different.
    twice = jnp.tile(tokens[:1], (2, 1))
    rngs = {"dropout": jax.random.key(0)}
    y = model.apply(variables, twice, train=True, rngs=rngs)
    assert (y[0, 1:] != y[1, 1:]).any()


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_learns(tied):
    model = TINY.clone(tied=tied, dropout=0.1)
    variables, tokens = draw(model)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, 1, 1)}
    loss_fn = losses.language(model)

    @jax.jit
    def gradients(params):
        return jax.grad(loss_fn, has_aux=True)(params, {}, batch, jax.random.key(0))[0]

    for path, g in jax.tree_util.tree_leaves_with_path(gradients(variables["params"])):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_loss_from_its_definition():
    variables, tokens = draw(TINY)
    targets = (tokens * 3 + 1) % TINY.vocabulary
    batch = {"tokens": tokens, "targets": targets}
    loss, (state, metrics) = losses.language(TINY)(
        variables["params"], {}, batch, jax.random.key(0)
    )
    logits = np.asarray(TINY.apply(variables, tokens), np.float64)
    total = 0.0
    for b in range(2):
        for t in range(8):
            p = np.exp(logits[b, t]) / np.exp(logits[b, t]).sum()
            total -= np.log(p[targets[b, t]])
    np.testing.assert_allclose(loss, total / 16, rtol=1e-5)
    assert state == {} and metrics == {}


@pytest.mark.slow
def test_it_learns_to_count(promoting):
    tokens = (jnp.arange(8)[None] + jnp.arange(4)[:, None]) % 11
    batch = {"tokens": tokens, "targets": (tokens + 1) % 11}
    tx = optax.adam(1e-2)
    step = jax.jit(dlx.make_step(losses.language(TINY), tx))
    state = dlx.train_state(jax.random.key(0), TINY.init(jax.random.key(0), tokens), tx)
    for _ in range(60):
        state, metrics = step(state, batch)
    assert metrics["loss"] < 0.1


def test_bad_input():
    with pytest.raises(dlx.BadInput, match=r"width 10 is no multiple of heads 3"):
        gpt.GPT(width=10, heads=3)
    with pytest.raises(dlx.BadInput, match=r"9 tokens are beyond the context of 8"):
        TINY.init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32))
