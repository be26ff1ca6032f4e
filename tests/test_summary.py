"""FLOPs against counts by hand, and the table that `summary` prints."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import dlx
from dlx import summary
from dlx.data import digits
from dlx.models import cnn
from dlx.nn import losses
from experiments import digits_cnn


def count(f, *shapes):
    """(FLOPs, exact) of a function of arrays of these shapes."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return summary.flops(jax.make_jaxpr(f)(*args).jaxpr)


conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("f", "shapes", "by_hand"),
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (jnp.matmul, [(4, 3, 5), (4, 5, 7)], 4 * 2 * 3 * 5 * 7),
        (jnp.dot, [(5,), (5,)], 2 * 5),
        (functools.partial(jnp.einsum, "bqhd,bkhd->bhqk"), [(2, 6, 3, 8), (2, 9, 3, 8)],
         2 * 2 * 3 * 6 * 9 * 8),
        (functools.partial(jnp.einsum, "abc,bcd->ad"), [(2, 3, 4), (3, 4, 5)], 2 * 2 * 3 * 4 * 5),
        (lambda x: jnp.tanh(x) + x * x, [(64, 64)], 0),  # only products of matrices count
    ],
    ids=["dense", "batched", "dot", "attention", "two contracted", "elementwise"],
)  # fmt: skip
def test_products(f, shapes, by_hand):
    assert count(f, *shapes) == (by_hand, True)


@pytest.mark.parametrize(
    ("kwargs", "x", "kernel", "out"),
    [
        ({"padding": "SAME"}, (2, 8, 8, 3), (3, 3, 3, 16), (8, 8)),
        ({"padding": "VALID"}, (2, 8, 10, 3), (3, 5, 3, 16), (6, 6)),
        ({"padding": "SAME", "window_strides": (2, 2)}, (2, 9, 8, 3), (3, 3, 3, 16), (5, 4)),
        ({"padding": "VALID", "rhs_dilation": (2, 3)}, (2, 8, 8, 3), (3, 3, 3, 16), (4, 2)),
        ({"padding": "SAME", "feature_group_count": 4}, (2, 8, 8, 8), (3, 3, 2, 16), (8, 8)),
        ({"padding": "SAME", "feature_group_count": 8}, (2, 8, 8, 8), (3, 3, 1, 8), (8, 8)),
        ({"padding": "VALID", "window_strides": (2, 1), "feature_group_count": 2},
         (2, 9, 8, 4), (3, 2, 2, 6), (4, 7)),
    ],
    ids=["same", "valid", "stride", "dilation", "groups", "depthwise", "stride and groups"],
)  # fmt: skip
def test_convolutions(kwargs, x, kernel, out):
    """Every output is a product over the window and the input features of its group."""
    f = functools.partial(conv, **{"window_strides": (1, 1), **kwargs})
    B, features = x[0], kernel[-1]
    by_hand = 2 * B * math.prod(out) * features * math.prod(kernel[:-1])
    assert count(f, x, kernel) == (by_hand, True)
    shapes = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, kernel))
    assert jax.eval_shape(f, *shapes).shape == (B, *out, features)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "size"), [(1, 1), (2, 2), (3, 3), (4, 4)])
def test_the_gradient_of_a_strided_convolution(stride, size, groups):
    """Without padding or overlap each of the three convolutions has the same products: twice a
    multiply-add for each output, window place and feature. Dilated inputs must not count holes."""
    f = functools.partial(
        conv, window_strides=(stride, stride), padding="VALID", feature_group_count=groups
    )
    shapes = (4, 12, 12, 6), (size, size, 6 // groups, 10)
    once = 2 * 4 * (12 // stride) ** 2 * 10 * size * size * 6 // groups
    assert count(f, *shapes) == (once, True)
    square = lambda x, k: (f(x, k) ** 2).sum()  # noqa: E731
    assert count(jax.grad(square, 0), *shapes) == (2 * once, True)
    assert count(jax.grad(square, 1), *shapes) == (2 * once, True)
    assert count(jax.grad(square, (0, 1)), *shapes) == (3 * once, True)


def test_scan_counts_every_turn():
    def nested(x):
        def outer(c, _):
            c = lax.scan(lambda d, _: (d @ x, None), c, length=3)[0]
            return c @ x, None

        return lax.scan(outer, x, length=5)[0]

    assert count(nested, (4, 4)) == (5 * (3 + 1) * 2 * 4**3, True)


def test_cond_counts_its_dearest_branch():
    def f(x):
        branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
        return lax.switch(x[0, 0].astype(int), branches, x)

    assert count(f, (4, 4)) == (2 * 2 * 4**3, True)


def test_while_is_not_exact_where_it_multiplies():
    def f(x, body):
        return lax.while_loop(lambda c: c[0, 0] > 0, body, x)

    assert count(lambda x: f(x, lambda c: c @ c), (4, 4)) == (2 * 4**3, False)
    assert count(lambda x: f(x, lambda c: c - 1), (4, 4)) == (0, True)
    assert count(lambda x: f(x, lambda c: c - 1) @ x, (4, 4)) == (2 * 4**3, True)
    scanned = lax.scan
    inner = count(
        lambda x: scanned(lambda c, _: (f(c, lambda d: d @ d), None), x, length=3)[0], (4, 4)
    )
    assert inner == (3 * 2 * 4**3, False)


def test_functions_within_functions_count():
    product = lambda x: x @ x  # noqa: E731
    for wrap in (jax.jit, jax.checkpoint, jax.named_call):
        assert count(wrap(product), (4, 4)) == (2 * 4**3, True)
    custom = jax.custom_vjp(product)
    custom.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert count(custom, (4, 4)) == (2 * 4**3, True)
    both = jax.value_and_grad(lambda x: custom(x).sum())
    assert count(both, (4, 4)) == (3 * 2 * 4**3, True)
    assert count(jax.vmap(product), (5, 4, 4)) == (5 * 2 * 4**3, True)


def test_what_nobody_asks_for_does_not_count():
    """XLA leaves it out: like a gradient towards the images, which a custom rule computes."""
    custom = jax.custom_vjp(lambda x, w: x @ w)
    custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g))
    both = jax.value_and_grad(lambda x, w: custom(x, w).sum(), argnums=1)
    assert count(both, (2, 3), (3, 5)) == (2 * (2 * 2 * 3 * 5), True)


def test_the_step_of_the_small_cnn():
    """Each layer three times: forward, towards its kernel, towards its input (not the first)."""
    B = 32
    model, tx = cnn.SmallCNN((32, 64, 64), (True, False, True)), optax.sgd(0.1)
    batch = {k: v[:B] for k, v in digits.load()["train"].items()}
    state = jax.eval_shape(
        lambda key: dlx.train_state(key, model.init(key, batch["image"]), tx), jax.random.key(0)
    )
    step = dlx.make_step(losses.classification(model), tx)
    first = 2 * B * 64 * 9 * 32
    second, third = 2 * B * 16 * 9 * 32 * 64, 2 * B * 16 * 9 * 64 * 64
    head = 2 * B * (2 * 2 * 64) * 10
    found = summary.flops(jax.make_jaxpr(step)(state, batch).jaxpr)
    assert found == (2 * first + 3 * (second + third + head), True)


def test_summary_of_the_digits():
    same = ("SAME",) * 3
    config = digits_cnn.Config((32, 64, 64), (True, False, True), same, batch_size=64)
    experiment = digits_cnn.build(config)
    batch = next(experiment.data(0, lambda n: slice(0, n)))
    with jax.numpy_dtype_promotion("standard"):  # optax promotes within itself
        text = summary.summary(experiment, batch)
    lines = [line.split() for line in text.splitlines()]
    assert [
        "params/conv2/kernel",
        "3",
        "x",
        "3",
        "x",
        "32",
        "x",
        "64",
        "float32",
        "18,432",
    ] in lines
    assert ["params/head/bias", "10", "float32", "10"] in lines
    assert ["parameters", "58,474"] in lines
    shown = [int(line[-1].replace(",", "")) for line in lines if line and "params/" in line[0]]
    assert len(shown) == 11 and sum(shown) == 58474
    # Parameters four times (EMA and two moments), statistics, counters (3 x 4 bytes), key (8).
    assert f"state           {(4 * 4 * 58474 + 4 * 2 * 160 + 12 + 8) / 1000:,.1f} kB" in text
    assert f"gradients       {4 * 58474 / 1000:,.1f} kB" in text
    (line,) = [line for line in lines if line[:3] == ["FLOPs", "a", "step"]]
    total = int(line[3].replace(",", ""))
    convolutions = 64 * (
        2 * 64 * 9 * 32 * 2 + 3 * (2 * 16 * 9 * (32 * 64 + 64 * 64) + 2 * 256 * 10)
    )
    assert total == convolutions  # augmentation makes no products
    assert line[4:] == [f"({total / 64:,.0f}", "an", "example)"]


def test_summary_says_where_a_count_is_a_bound():
    def step(w, batch):
        w = lax.while_loop(lambda w: w[0, 0] > 1, lambda w: w @ w, w)
        return w, {"norm": (batch["x"] @ w).sum()}

    experiment = dlx.Experiment(lambda key, given: jnp.ones((4, 4)), step)
    text = summary.summary(experiment, {"x": np.ones((2, 4), np.float32)})
    total = 2 * 4**3 + 2 * 2 * 4 * 4
    assert f"FLOPs a step    {total} ({total / 2:.0f} an example), and more" in text
    assert "while loop" in text


@pytest.mark.parametrize(
    ("size", "said"),
    [(10, "40 bytes"), (1000, "4.0 kB"), (2_500_000, "10.0 MB"), (2**30, "4.3 GB")],
)
def test_bytes_are_readable(size, said):
    experiment = dlx.Experiment(
        lambda key, given: {"params": jnp.zeros(size)},
        lambda state, batch: (state, {"x": state["params"][0]}),
    )
    assert f"state           {said} " in summary.summary(experiment, {})
