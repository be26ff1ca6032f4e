"""The fast layers compute what flax computes: values, gradients, gradients of gradients."""

import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx import nn
from dlx.nn import conv, products


def derivatives(f, *args):
    """(value, gradients, gradients of the gradients' squares) of a weighted sum of f."""

    def value(*args):
        y = f(*args)
        return (jnp.sin(y) * jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)).sum()

    every = tuple(range(len(args)))

    def norm(*args):
        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(value, every)(*args)))

    return f(*args), jax.grad(value, every)(*args), jax.grad(norm, every)(*args)


def assert_same(fast, plain, *args):
    """LLVM's optimisation is left out: it would take most of the time."""
    both = jax.jit(
        lambda *a: (derivatives(fast, *a), derivatives(plain, *a)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    got, want = both(*args)
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


CONVOLUTIONS = [  # size, strides, padding, channels: all the forms there are
    ((3, 3), (1, 1), "SAME", (33, 34)),
    ((3, 3), (1, 1), "SAME", (17, 18)),
    ((3, 3), (1, 1), ((2, 0), (0, 3)), (33, 34)),
    ((3, 2), (1, 1), ((5, 1), (2, 4)), (33, 34)),  # places that see nothing but padding
    ((3, 2), (1, 1), ((5, 1), (2, 4)), (1, 20)),
    ((3, 3), (2, 1), "VALID", (33, 34)),
    ((3, 3), (2, 1), "VALID", (20, 4)),
    ((4, 5), (2, 3), "SAME", (3, 5)),
    ((2, 2), (3, 3), ((0, 1), (1, 0)), (33, 34)),  # places that nothing sees
    ((1, 1), (2, 3), "VALID", (33, 2)),
    ((1, 1), (1, 1), ((1, 1), (0, 2)), (33, 34)),
    ((1, 3), (1, 2), "SAME", (1, 1)),
    ((7, 9), (1, 1), "VALID", (33, 34)),  # one place
]


@pytest.mark.parametrize(
    ("size", "strides", "padding", "channels", "chunk"),
    [
        pytest.param(*c, n, marks=[pytest.mark.slow] * (i > 4))
        for i, c in enumerate(CONVOLUTIONS)
        for n in (1, products.CHUNK)[: 1 + (i % 4 == 0)]
    ],
)
def test_convolution(size, strides, padding, channels, chunk, x64, constants):
    """Image by image and, of every fourth, all at once."""
    constants.setattr(products, "CHUNK", chunk)
    x = jax.random.normal(jax.random.key(0), (3, 7, 9, channels[0]), jnp.float64)
    k = jax.random.normal(jax.random.key(1), (*size, *channels), jnp.float64)
    convolutions = [
        lambda x, k, f=f: f(x, k, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        for f in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
    ]
    assert_same(*convolutions, x, k)


@pytest.mark.parametrize(
    ("shape", "size", "strides", "padding", "dilation"),
    [
        ((3, 17, 5), (2,), (1,), ((4, 0),), (4,)),  # WaveNet's
        ((3, 17, 5), (3,), (2,), ((1, 6),), (3,)),
        ((3, 17, 5), (4,), (3,), "VALID", (1,)),
        ((3, 17, 5), (1,), (3,), "VALID", (2,)),
        ((3, 7, 9, 5), (3, 2), (1, 1), ((5, 1), (2, 0)), (2, 3)),
        ((3, 7, 9, 5), (2, 3), (2, 3), "SAME", (1, 2)),
        ((3, 7, 9, 5), (1, 1), (2, 1), "SAME", (2, 2)),
    ],
)
def test_lines_and_dilated_kernels(shape, size, strides, padding, dilation, x64):
    x = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    k = jax.random.normal(jax.random.key(1), (*size, shape[-1], 6), jnp.float64)
    convolutions = [
        lambda x, k, f=f: f(
            x, k, strides, padding, rhs_dilation=dilation,
            dimension_numbers=conv.LAYOUTS[len(size)],
        )
        for f in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
    ]  # fmt: skip
    assert_same(*convolutions, x, k)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_other_convolutions(dimensions, dilation, groups, x64):
    """Groups, dilation and other numbers of dimensions."""
    shape, size = (2, *(7, 5, 4)[:dimensions], 4), (2,) * dimensions
    layers = [
        m.Conv(8, size, kernel_dilation=dilation, feature_group_count=groups, param_dtype="float64")
        for m in (nn, linen)
    ]
    x = jax.random.normal(jax.random.key(0), shape, jnp.float64)
    params = layers[1].init(jax.random.key(1), x)
    with jax.numpy_rank_promotion("allow"):
        assert_same(*(lambda k, x, m=m: m.apply(k, x) for m in layers), params, x)


def test_a_batch_of_batches(x64):
    x = jax.random.normal(jax.random.key(0), (2, 3, 6, 6, 3), jnp.float64)
    k = jax.random.normal(jax.random.key(1), (2, 3, 3, 3, 5), jnp.float64)
    convolutions = [
        jax.vmap(lambda x, k, f=f: f(x, k, (1, 1), "SAME", dimension_numbers=conv.LAYOUT))
        for f in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
    ]
    assert_same(*convolutions, x, k)


def test_forward_mode():
    """The plain form has it; the fast one has not, and JAX says so."""
    x, k = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))

    def f(x, k):
        return conv.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=conv.LAYOUT)

    with nn.plain():
        jax.jvp(f, (x, k), (x, k))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f, (x, k), (x, k))


LAYERS = {
    "3 x 3": lambda m: m.Conv(33, (3, 3)),
    "strides": lambda m: m.Conv(33, (3, 3), (2, 2)),
    "1 x 1": lambda m: m.Conv(33, (1, 1)),
    "few channels": lambda m: m.Conv(5, (3, 3)),
    "groups": lambda m: m.Conv(34, (3, 3), feature_group_count=2),
    "dilated": lambda m: m.Conv(33, (3, 3), kernel_dilation=2),
    "line": lambda m: m.Conv(33, (2,), kernel_dilation=4, padding="CAUSAL"),
    "pool": lambda m: lambda x: m.max_pool(x, (2, 2), (2, 2)),
    "other pool": lambda m: lambda x: m.max_pool(x, (3, 3), (2, 2), "SAME"),
    "gelu": lambda m: lambda x: m.gelu(x, approximate=False),
}


def lowered(layer, platform, scan=False):
    """value_and_grad with regard to parameters and input, of a module or a function."""
    x = jnp.ones((2, 8, 8, 34))
    variables = {}
    apply = lambda variables, x: layer(x)  # noqa: E731
    if isinstance(layer, linen.Module):
        variables, apply = jax.eval_shape(layer.init, jax.random.key(0), x), layer.apply

    def step(variables, x):
        return jax.value_and_grad(lambda v, x: (apply(v, x) ** 2).sum(), (0, 1))(variables, x)

    def scanned(variables, x):
        return jax.lax.scan(lambda v, x: (v, step(v, x)), variables, x[None])

    program = jax.jit(scanned if scan else step).trace(variables, x)
    return program.lower(lowering_platforms=(platform,)).as_text()


def operations(text):
    """What counts, with shapes and attributes, without the names of the operands."""
    words = ("convolution", "dot_general", "reduce_window", "select_and_scatter", "barrier")
    lines = [line for line in text.splitlines() if any(word in line for word in words)]
    return sorted(re.sub(r"%\w+(:\d+)?(#\d+)?", "", line).strip() for line in lines)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", sorted({*LAYERS} - {"gelu"}))  # which has none of these
def test_other_platforms_get_what_flax_has(name, platform, scan):
    ours, flax = (lowered(LAYERS[name](m), platform, scan) for m in (nn, linen))
    assert operations(ours) == operations(flax) != []
    assert "barrier" not in ours


@pytest.mark.parametrize("name", ["3 x 3", "strides", "few channels", "dilated", "line"])
def test_within_a_scan_convolutions_stay_as_they_are(name):
    """XLA turns those that are written with other layouts to its own, but within a scan it makes
    naive loops of them."""
    own = re.compile(r"\[b, (0|0, 1), f\]x\[(0|0, 1), i, o\]->\[b, (0|0, 1), f\]")
    for m, same in (nn, True), (linen, False):
        lines = operations(lowered(LAYERS[name](m), "cpu", True))
        assert all(own.search(line) for line in lines if "convolution" in line) == same


@pytest.mark.parametrize("name", LAYERS)
def test_the_switch_gives_what_flax_has(name):
    flax = lowered(LAYERS[name](linen), "cpu")
    with nn.plain():
        assert lowered(LAYERS[name](nn), "cpu") == flax
    same = operations(lowered(LAYERS[name](nn), "cpu")) == operations(flax)
    assert same == (name == "other pool")


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
