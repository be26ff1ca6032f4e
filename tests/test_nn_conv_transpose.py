"""The transposed convolution computes what flax's does, and elsewhere than on a CPU is flax's."""

import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx import nn

# features, kernel, strides, padding, kernel_dilation, shape of the input
CASES = {
    "dcgan": (4, (4, 4), (2, 2), "SAME", None, (2, 3, 5, 3)),
    "one channel to one": (1, (4, 4), (2, 2), "SAME", None, (2, 3, 4, 1)),
    "odd kernel": (3, (3, 3), (2, 2), "SAME", None, (2, 4, 3, 2)),
    "kernel 5 by 1": (2, (5, 1), (3, 2), "SAME", None, (2, 3, 4, 3)),
    "kernel 2": (2, (2, 2), (2, 2), "VALID", None, (2, 3, 4, 3)),
    "kernel 1, stride 3": (2, (1, 1), (3, 3), "VALID", None, (2, 3, 4, 3)),
    "strides differ": (3, (5, 4), (1, 3), "VALID", None, (2, 4, 3, 2)),
    "no stride": (3, (3, 2), None, "SAME", None, (2, 4, 5, 2)),
    "latent": (3, (4, 3), (1, 1), "VALID", None, (2, 1, 1, 5)),
    "latent, stride, cut": (3, (4, 4), (2, 2), ((1, 2), (4, 2)), None, (2, 1, 1, 5)),
    "one row": (3, (4, 3), (2, 2), "SAME", None, (2, 1, 4, 2)),
    "explicit": (2, (4, 3), (2, 2), ((2, 3), (0, 1)), None, (2, 4, 3, 2)),
    "negative": (2, (3, 3), (2, 2), ((-1, 2), (1, -2)), None, (2, 4, 5, 2)),
    "wide": (2, (3, 3), (2, 3), ((5, 4), (6, 7)), None, (2, 3, 3, 2)),
    "number": (2, (3, 3), (2, 2), 1, None, (2, 4, 3, 2)),
    "dilated": (2, (3, 2), (2, 1), "SAME", (2, 3), (2, 4, 5, 2)),
    "dilated, explicit": (2, (3, 3), (2, 3), ((1, 4), (3, 2)), (2, 2), (2, 4, 3, 2)),
    "dilated, valid": (2, (2, 3), (3, 3), "VALID", 2, (2, 2, 3, 2)),
    "circular": (2, (4, 3), (2, 2), "CIRCULAR", None, (2, 3, 4, 2)),
    "line": (3, 4, 2, "SAME", None, (2, 5, 2)),
    "volume": (2, (2, 4, 3), (2, 2, 1), "SAME", None, (2, 2, 3, 2, 2)),
    "no batch": (2, (4, 4), (2, 2), "SAME", None, (3, 4, 2)),
    "two batch dimensions": (2, (3, 3), (2, 2), "SAME", None, (2, 1, 3, 2, 2)),
}


TWICE = ["dcgan", "latent", "odd kernel", "dilated", "line"]  # differentiated a second time


def derivatives(f, twice, *args):
    """(value, gradients, gradients of the gradients' squares) of a weighted sum of f."""
    every = tuple(range(len(args)))

    def value(*args):
        y = f(*args)
        return (y**2 * jnp.arange(y.size, dtype=y.dtype).reshape(y.shape)).sum(), y

    def norm(*args):
        g, y = jax.grad(value, every, has_aux=True)(*args)
        return sum((x**2).sum() for x in jax.tree.leaves(g)), (y, g)

    return jax.grad(norm, every, has_aux=True)(*args) if twice else norm(*args)[1]


def assert_same(fast, plain, *args, twice=False):
    """LLVM's optimisation is left out: it would take most of the time."""
    both = jax.jit(
        lambda *a: (derivatives(fast, twice, *a), derivatives(plain, twice, *a)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    got, want = both(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * float(jnp.abs(b).max() + 1e-9))


def layers(*args, **kwargs):
    return nn.ConvTranspose(*args, **kwargs), linen.ConvTranspose(*args, **kwargs)


def filled(layer, x):
    """Variables of random numbers (initialisers would be compiled for each shape)."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.tree.map(lambda s: np.random.default_rng(s.size).normal(size=s.shape), shapes)


def compare(ours, flax, x, twice=False):
    assert jax.eval_shape(ours.init, jax.random.key(0), x) == jax.eval_shape(
        flax.init, jax.random.key(0), x
    )
    assert_same(ours.apply, flax.apply, filled(ours, x), x, twice=twice)


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("name", CASES)
def test_is_flax(name, x64):
    features, kernel, strides, padding, dilation, shape = CASES[name]
    options = dict(strides=strides, padding=padding, kernel_dilation=dilation)
    options |= {"param_dtype": jnp.float64, "transpose_kernel": len(name) % 2 == 0}
    ours, flax = layers(features, kernel, **options)
    compare(ours, flax, normal(*shape), twice=name in TWICE)


def test_mask_and_no_bias(x64):
    mask = np.tril(np.ones((3, 3, 2, 4)))
    options = {"strides": (2, 2), "param_dtype": jnp.float64, "use_bias": False, "mask": mask}
    compare(*layers(4, (3, 3), **options), normal(2, 3, 4, 2))
    with pytest.raises(ValueError, match=r"mask of shape \(3, 3, 2, 4\): .* \(3, 3, 4, 2\)"):
        layer = nn.ConvTranspose(4, (3, 3), mask=mask, transpose_kernel=True)
        jax.eval_shape(layer.init, jax.random.key(0), normal(2, 3, 4, 2))


def test_begins_as_flax():
    ours, flax = layers(3, (4, 4))
    x = jnp.ones((1, 2, 2, 2))
    both = jax.jit(lambda key: (ours.init(key, x), flax.init(key, x)))(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_vmap(x64):
    """Over kernels, so that the batch is no batch of the convolution."""
    ours, flax = layers(3, (4, 4), strides=(2, 2), param_dtype=jnp.float64)
    x = normal(3, 2, 3, 4, 2)
    variables = jax.tree.map(lambda v: np.stack([v, 2 * v, -v]), filled(ours, x[0]))
    assert_same(jax.vmap(ours.apply), jax.vmap(flax.apply), variables, x)


def test_computes_in_its_dtype(promoting):
    ours, flax = layers(3, (4, 4), strides=(2, 2), dtype=jnp.bfloat16)
    x = normal(2, 3, 4, 2).astype(np.float32)
    variables = filled(ours, x)
    y, want = jax.jit(lambda v, x: (ours.apply(v, x), flax.apply(v, x)))(variables, x)
    assert y.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(y), np.float32(want), rtol=0.02, atol=0.05)


def lowered(layer, shape, platform, scan):
    def loss(variables, x):
        return (layer.apply(variables, x) ** 2).sum()

    def step(variables, x):
        if not scan:
            return jax.value_and_grad(loss, (0, 1))(variables, x)
        one = lambda v, x: (v, jax.value_and_grad(loss, (0, 1))(v, x))  # noqa: E731
        return jax.lax.scan(one, variables, x[None])

    x = jnp.ones(shape)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    return jax.jit(step).trace(variables, x).lower(lowering_platforms=(platform,)).as_text()


def convolutions(text):
    """Shapes and attributes of each, without the names of the operands."""
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    return sorted(re.sub(r"%\w+", "", line).strip() for line in lines)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("name", ["dcgan", "latent", "dilated", "kernel 2", "line"])
def test_other_platforms_get_what_flax_has(name, platform, scan):
    features, kernel, strides, padding, dilation, shape = CASES[name]
    options = dict(strides=strides, padding=padding, kernel_dilation=dilation)
    ours, flax = layers(features, kernel, **options, transpose_kernel=True)
    text = lowered(ours, shape, platform, scan)
    assert convolutions(text) == convolutions(lowered(flax, shape, platform, scan))
    assert len(convolutions(text)) == 3
    assert "optimization_barrier" not in text and "dot_general" not in text


def test_the_switch_gives_what_flax_has():
    ours, flax = layers(4, (4, 4), strides=(2, 2))
    with nn.plain():
        text = lowered(ours, (2, 3, 5, 3), "cpu", False)
    assert text == lowered(flax, (2, 3, 5, 3), "cpu", False)
    assert text != lowered(ours, (2, 3, 5, 3), "cpu", False)


def test_in_a_scan_the_same_form_is_lowered():
    """And one that XLA does not make a naive loop of: no input is dilated, every layout is NHWC."""
    ours, flax = layers(4, (4, 4), strides=(2, 2))
    text = convolutions(lowered(ours, (2, 3, 5, 3), "cpu", True))
    assert text == convolutions(lowered(ours, (2, 3, 5, 3), "cpu", False))
    assert len(text) == 2  # the kernel's gradient is products
    for line in text:
        assert "dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line
        assert "lhs_dilate = [2, 2]" not in line
    plain = "\n".join(convolutions(lowered(flax, (2, 3, 5, 3), "cpu", True)))
    assert "lhs_dilate = [2, 2]" in plain and "[f, 0, 1, b]" in plain
