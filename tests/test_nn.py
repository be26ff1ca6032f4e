"""The fast layers compute what flax computes: values, gradients, gradients of gradients."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx import nn
from dlx.nn import conv


def derivatives(f, *args):
    """(value, gradients, gradients of the gradients' squares) of a weighted sum of f."""

    def value(*args):
        y = f(*args)
        return (jnp.sin(y) * jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)).sum()

    every = tuple(range(len(args)))

    def norm(*args):
        return sum((g**2).sum() for g in jax.grad(value, every)(*args))

    return f(*args), jax.grad(value, every)(*args), jax.grad(norm, every)(*args)


def assert_same(fast, plain, *args):
    got, want = jax.jit(lambda *a: (derivatives(fast, *a), derivatives(plain, *a)))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 1), (3, 2, 5, 4)])
def test_max_pool(shape, x64):
    """Ties too: values in steps of a half, so that many places hold the maximum."""
    x = jnp.round(2 * jax.random.normal(jax.random.key(0), shape, jnp.float64)) / 2
    args = (2, 2), (2, 2)
    assert_same(lambda x: nn.max_pool(x, *args), lambda x: linen.max_pool(x, *args), x)


def test_gelu(x64):
    x = 3 * jax.random.normal(jax.random.key(0), (2, 3, 4), jnp.float64)
    exact = {"approximate": False}
    assert_same(lambda x: nn.gelu(x, **exact), lambda x: linen.gelu(x, **exact), x)


@pytest.mark.parametrize("many", [0, conv.MANY])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(
    ("strides", "padding", "dilation", "groups"),
    [((1, 1), "SAME", 1, 1), ((1, 1), ((2, 0), (0, 3)), 1, 1), ((2, 1), "VALID", 1, 1),
     ((1, 1), ((2, 1), (0, 3)), 2, 1),
     ((1, 2), "SAME", 1, 0)],
)  # fmt: skip
def test_convolution(channels, strides, padding, dilation, groups, many, x64, monkeypatch):
    """Above and below the number of channels from which the kernel's gradient is a product."""
    monkeypatch.setattr(conv, "MANY", many)
    groups = groups or channels
    options = {
        "window_strides": strides, "padding": padding, "rhs_dilation": (dilation, dilation),
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": groups,
    }  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (2, 7, 9, channels), jnp.float64)
    k = jax.random.normal(jax.random.key(1), (3, 3, channels // groups, 2 * groups), jnp.float64)
    assert_same(
        lambda x, k: conv.conv_general_dilated(x, k, **options),
        lambda x, k: jax.lax.conv_general_dilated(x, k, **options),
        x, k,
    )  # fmt: skip


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_get_no_barrier(platform):
    def loss(x, k):
        y = conv.conv_general_dilated(x, k, (1, 1), "SAME",
                                      dimension_numbers=("NHWC", "HWIO", "NHWC"))  # fmt: skip
        return (y**2).sum()

    x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    text = step.trace(x, k).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.convolution") == 3
    assert "optimization_barrier" not in text
    assert "optimization_barrier" in step.trace(x, k).lower(lowering_platforms=("cpu",)).as_text()


def test_the_pool_behind_a_normalisation(x64, promoting):
    """XLA makes the pool's input twice and rounds it otherwise: no gradient may be lost by that."""
    random = np.random.default_rng(0)
    x, k = random.normal(size=(3, 12, 8, 64)), random.normal(size=(3, 3, 64, 64))
    norm = nn.BatchNorm(use_running_average=False)
    variables = norm.init(jax.random.key(0), x)

    def gradient(pool):
        @jax.jit
        def loss(params, x, k):
            y = conv.conv_general_dilated(
                x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            y, _ = norm.apply(variables | {"params": params}, y, mutable=["batch_stats"])
            return jnp.sin(pool(nn.relu(y))).sum()

        return jax.jit(jax.grad(loss))(variables["params"], x, k)

    found = gradient(lambda x: nn.max_pool(x, (2, 2), (2, 2)))
    wanted = gradient(lambda x: linen.max_pool(x, (2, 2), (2, 2)))
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-9)
