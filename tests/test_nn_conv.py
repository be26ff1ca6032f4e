"""Winograd's form of a convolution: flax's numbers, and flax's operations for other platforms."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlx
from dlx import nn
from dlx.nn import conv, products, winograd
from tests.test_nn import assert_same, lowered, operations

PADS = ["SAME", "VALID", ((2, 0), (0, 3)), ((0, 3), (4, 1))]


@pytest.mark.parametrize(
    ("padding", "size", "chunk"),
    [
        pytest.param(p, s, c, marks=[pytest.mark.slow] * (i + j + (c > 1) > 1))
        for i, p in enumerate(PADS)
        for j, s in enumerate([(7, 9), (4, 4), (3, 5)])
        for c in (1, products.CHUNK)
    ],
)
def test_winograd(padding, size, chunk, x64, constants):
    """Heights that four divides and does not, image by image and all at once."""
    constants.setattr(products, "CHUNK", chunk)
    constants.setattr(winograd, "MANY", 17)
    constants.setattr(winograd, "ROWS", 1)
    x = jax.random.normal(jax.random.key(0), (3, *size, 17), jnp.float64)
    k = jax.random.normal(jax.random.key(1), (3, 3, 17, 18), jnp.float64)
    convolutions = [
        lambda x, k, f=f: f(x, k, (1, 1), padding, dimension_numbers=conv.LAYOUT)
        for f in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
    ]
    assert_same(*convolutions, x, k)


def test_single_precision():
    """The matrices' numbers, up to 8, cost a digit at most."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 128))
    k = jax.random.normal(jax.random.key(1), (3, 3, 128, 128)) / 34
    with jax.enable_x64(True):
        exact = jnp.asarray(x, jnp.float64), jnp.asarray(k, jnp.float64)
        wanted = jax.lax.conv_general_dilated(
            exact[0], exact[1], (1, 1), "SAME", dimension_numbers=conv.LAYOUT
        )
    found = winograd.conv(x, k, ((1, 1), (1, 1)), 2)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(np.asarray(wanted)).max())


@pytest.mark.parametrize("scan", [False, True])
def test_where_it_is_used(scan, constants):
    """On a CPU alone: a product of six in place of the convolution, forward and for the input."""
    constants.setattr(winograd, "MANY", 17)
    constants.setattr(winograd, "ROWS", 16)
    layers = [m.Conv(34, (3, 3)) for m in (nn, linen)]
    for platform in ("tpu", "cuda"):
        ours, flax = (lowered(layer, platform, scan) for layer in layers)
        assert operations(ours) == operations(flax) != []
        assert "barrier" not in ours
    assert not any("convolution" in line for line in operations(lowered(layers[0], "cpu", scan)))


def test_where_it_pays():
    """Not for few channels, other strides or sizes, or a few rows; as many images as divide."""

    def few(B, H, C, O=256, size=3, stride=1, pad=1):  # noqa: E741
        x = jnp.zeros((B, H, H, C))
        return winograd.at_once(x, (size, size, C, O), (stride, stride), ((pad, pad), (pad, pad)))

    assert few(64, 4, 512) == 32 and few(64, 8, 256) == 16 and few(8, 7, 512) == 8
    assert few(61, 4, 256) == 61 and few(331, 4, 512) == 0  # a prime: one image at a time
    assert few(64, 8, 127) == few(64, 8, 128, 127) == few(64, 4, 256, pad=-1) == 0
    assert few(64, 4, 256, stride=2) == few(64, 4, 256, size=5) == few(1, 4, 512) == 0


@pytest.mark.parametrize("shapes", [(1024, 3, 5), (1025, 3, 5), (1026, 5, 3), (7, 5, 3)])
def test_products_over_long_rows(shapes, x64):
    """x^T y in halves, the narrower side first; odd and short ones in one product."""
    P, M, N = shapes
    x = jax.random.normal(jax.random.key(0), (P, M), jnp.float64)
    y = jax.random.normal(jax.random.key(1), (P, N), jnp.float64)
    np.testing.assert_allclose(products.over_rows(x, y), np.asarray(x).T @ np.asarray(y))
    assert_same(products.product, jnp.dot, x, jnp.ones((M, N)) + y[:M])


@pytest.mark.parametrize(
    ("C", "O", "size", "stride"),
    [(17, 33, 3, 1), (33, 17, 3, 1), (17, 33, 3, 2), (2, 17, 3, 2), (17, 2, 1, 1)],
)
def test_many_places(C, O, size, stride, x64):  # noqa: E741
    """Sizes at which products over places and a strided input's gradient are the fast ones."""
    x = jax.random.normal(jax.random.key(0), (2, 48, 45, C), jnp.float64)
    k = jax.random.normal(jax.random.key(1), (size, size, C, O), jnp.float64)
    convolutions = [
        lambda x, k, f=f: f(x, k, (stride,) * 2, "SAME", dimension_numbers=conv.LAYOUT)
        for f in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
    ]
    assert_same(*convolutions, x, k)


@pytest.mark.parametrize("size", [(7, 9), pytest.param((8, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize("strides", [(3, 2), pytest.param((1, 2), marks=pytest.mark.slow)])
@pytest.mark.parametrize("padding", PADS)
def test_strided_input_phase_by_phase(padding, strides, size, x64):
    """Every phase of a stride, those that no place of the kernel meets among them."""
    x = jnp.zeros((2, *size, 3))
    for window in [(3, 3), (4, 4), (2, 5), (1, 1)]:
        k = jax.random.normal(jax.random.key(0), (*window, 3, 5), jnp.float64)

        def strided(x, k=k):
            return jax.lax.conv_general_dilated(
                x, k, strides, padding, dimension_numbers=conv.LAYOUT
            )

        y, pull = jax.vjp(strided, x)
        dy = jax.random.normal(jax.random.key(1), y.shape, jnp.float64)
        pads = padding
        if isinstance(padding, str):
            pads = jax.lax.padtype_to_pads(size, window, strides, padding)
        turned = k[::-1, ::-1].swapaxes(-1, -2)
        found = conv._phase_by_phase(dy, turned, size, strides, pads)
        np.testing.assert_allclose(found, pull(dy)[0], atol=1e-12)


@pytest.mark.parametrize("padding", PADS)
def test_columns(padding, x64):
    """A kernel that is larger than the images, with strides."""
    x = jax.random.normal(jax.random.key(0), (1, 5, 6, 17), jnp.float64)
    k = jax.random.normal(jax.random.key(1), (3, 3, 17, 65), jnp.float64)
    convolutions = [
        lambda x, k, f=f: f(x, k, (2, 3), padding, dimension_numbers=conv.LAYOUT)
        for f in (conv.conv_general_dilated, jax.lax.conv_general_dilated)
    ]
    text = jax.jit(convolutions[0]).lower(x, k).as_text()
    assert "dot_general" in text and "stablehlo.convolution" not in text
    assert_same(*convolutions, x, k)


def test_no_loop_over_what_lies_on_several_devices():
    """Each turn would exchange data, in no common order with what is exchanged outside."""
    x = jnp.ones((64, 32, 32, 32))
    layer = nn.Conv(32, (3, 3))
    variables = layer.init(jax.random.key(0), x)

    def images(x):
        return jax.grad(lambda v, x: (layer.apply(v, x) ** 2).sum())(variables, x)

    mesh = dlx.make_mesh("data=4,fsdp=2")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    loops = [
        "while" in jax.jit(images).lower(jax.device_put(x, place)).as_text()
        for place in (jax.devices()[0], whole, rows)
    ]
    assert loops == [True, False, False]
    with jax.set_mesh(mesh):
        assert "while" not in jax.jit(images).lower(x).as_text()
