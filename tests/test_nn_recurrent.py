"""`nn.RNN` computes what flax.linen's computes: values, gradients, gradients of gradients."""

import collections
import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx import nn
from dlx.nn import recurrence

CELLS = [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell]
FORMS = CELLS[1:]
B, T, I, H = 3, 5, 4, 7  # noqa: E741


def random(shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def variables(cell, inputs, dtype=jnp.float64):
    """Every parameter away from where it starts, the biases from zero."""
    shapes = jax.eval_shape(linen.RNN(cell).init, jax.random.key(0), inputs)
    return jax.tree.map(lambda s: random(s.shape, s.size, dtype) / 2, shapes)


def carry(cell, batch, dtype=jnp.float64):
    shapes = jax.eval_shape(lambda: cell.initialize_carry(jax.random.key(0), (*batch, I)))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([random(s.shape, i, dtype) for i, s in enumerate(leaves)])


def weighted(tree):
    """A number that depends on every element, and on each in its own way."""
    return sum(
        (jnp.sin(x) * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum()
        for x in jax.tree.leaves(tree)
    )


def derivatives(kind, cell, args, options, second=True):
    """Values, gradients, and gradients of the gradients' weighted sum."""

    def run(variables, start, x):
        return kind(cell, **options).apply(variables, x, initial_carry=start, **lengths)

    lengths = {"seq_lengths": options.pop("seq_lengths")} if "seq_lengths" in options else {}
    first = jax.grad(lambda *a: weighted(run(*a)), (0, 1, 2))
    out = run(*args), first(*args)
    if second:
        out = *out, jax.grad(lambda *a: weighted(first(*a)), (0, 1, 2))(*args)
    return out


def assert_same(cell, options, batch=(B,), steps=T, second=True):
    shape = (steps, *batch, I) if "time_major" in options else (*batch, steps, I)
    x = random(shape, 9)
    args = variables(cell, x), carry(cell, batch), x
    got, want = jax.jit(
        lambda *a: tuple(
            derivatives(kind, cell, a, dict(options), second) for kind in (nn.RNN, linen.RNN)
        )
    )(*args)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        least = 1e-11 * max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, 1e-11, least, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("cell", FORMS)
def test_all_derivatives(cell, x64):
    lengths = jnp.array([4, 2, 1])
    options = {"return_carry": True, "reverse": True, "keep_order": True, "seq_lengths": lengths}
    assert_same(cell(H, param_dtype=jnp.float64), options, steps=4)


@pytest.mark.parametrize("cell", FORMS)
@pytest.mark.parametrize(
    ("options", "batch", "steps"),
    [({}, (1,), 4), ({"return_carry": True}, (2,), 1), ({"return_carry": True}, (), 3),
     ({"reverse": True, "return_carry": True}, (2, 3), 4),
     ({"time_major": True, "reverse": True, "keep_order": True, "unroll": 2}, (2,), 4),
     ({"return_carry": True, "seq_lengths": (1, 4)}, (2,), 4)],
)  # fmt: skip
def test_options(cell, options, batch, steps, x64):
    """Batches of one, of several axes and of none, one step, orders, lengths."""
    if "seq_lengths" in options:
        options = options | {"seq_lengths": jnp.array(options["seq_lengths"])}
    assert_same(cell(H, param_dtype=jnp.float64), options, batch, steps, second=False)


@pytest.mark.parametrize("cell", FORMS)
def test_vmap(cell, x64):
    """Over the parameters, of the gradient."""
    cell = cell(H, param_dtype=jnp.float64)
    x = random((B, T, I))
    both = jax.tree.map(lambda a: jnp.stack([a, a / 3]), variables(cell, x))

    def gradients(kind):
        loss = jax.grad(lambda v: weighted(kind(cell).apply(v, x)))
        return jax.jit(jax.vmap(loss))(both)

    for a, b in zip(*map(jax.tree.leaves, map(gradients, (nn.RNN, linen.RNN))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_the_parameters_are_linens(cell):
    """The same tree, drawn the same; and a cell that an outer module names keeps its place."""

    class Outer(nn.Module):
        rnn: type

        @nn.compact
        def __call__(self, x):
            return self.rnn(cell(H, name="layer0"), name="scan0")(x)

    x = random((B, T, I), dtype=jnp.float32)
    got, want = (Outer(kind).init(jax.random.key(3), x) for kind in (nn.RNN, linen.RNN))
    assert list(want["params"]) == ["layer0"]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    a, b = (Outer(kind).apply(got, x) for kind in (nn.RNN, linen.RNN))
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6)


def test_in_two_directions(x64):
    def both(kind):
        cells = [nn.GRUCell(H, param_dtype=jnp.float64) for _ in range(2)]
        return nn.Bidirectional(kind(cells[0]), kind(cells[1]))

    x = random((B, T, I))
    v = both(linen.RNN).init(jax.random.key(0), x)
    lengths = jnp.array([2, 5, 3])
    got, want = (
        both(kind).apply(v, x, seq_lengths=lengths, return_carry=True)
        for kind in (nn.RNN, linen.RNN)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, want)


def products(kind, cell, platform):
    x = jnp.ones((B, T, I))
    v = variables(cell, x, jnp.float32)

    def loss(v, x):
        return weighted(kind(cell, return_carry=True).apply(v, x))

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    text = step.trace(v, x).lower(lowering_platforms=(platform,)).as_text()
    lines = [
        re.sub(r"%\w+(#\d+)?", "", line) for line in text.splitlines() if "dot_general" in line
    ]
    return collections.Counter(line.strip() for line in lines), "optimization_barrier" in text


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("cell", CELLS)
def test_other_platforms_get_flaxs_own(cell, platform):
    got, want = (products(kind, cell(H), platform) for kind in (nn.RNN, linen.RNN))
    assert got == want and got[0].total() >= 6 and not got[1]


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_a_cpu_gets_one_product_for_all_gates(cell):
    counts, barriers = products(nn.RNN, cell(H), "cpu")
    assert counts.total() == 6 and barriers
    with nn.plain():
        assert products(nn.RNN, cell(H), "cpu") == products(linen.RNN, cell(H), "cpu")


class Squared(nn.SimpleCell):
    """A cell of one's own."""

    def __call__(self, carry, inputs):
        carry, y = super().__call__(carry, inputs)
        return carry * carry, y


@pytest.mark.parametrize(
    ("cell", "dtype"),
    [(nn.LSTMCell(H, gate_fn=nn.hard_sigmoid), jnp.float32),
     (nn.GRUCell(H, activation_fn=nn.relu), jnp.float32),
     (nn.SimpleCell(H, residual=True), jnp.float32),
     (nn.LSTMCell(H, dtype=jnp.bfloat16), jnp.float32),
     (nn.OptimizedLSTMCell(H), jnp.bfloat16),
     (nn.MGUCell(H), jnp.float32), (Squared(H), jnp.float32)],
)  # fmt: skip
def test_other_cells_and_dtypes_run_as_flax_has_them(cell, dtype, monkeypatch, promoting):
    x = random((B, T, I), dtype=dtype)
    v = variables(cell, x, jnp.float32)
    monkeypatch.setattr(recurrence, "on_cpu", None)
    got, want = (kind(cell, return_carry=True).apply(v, x) for kind in (nn.RNN, linen.RNN))
    assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
