"""`dlx.nn` in flax's place: names, meshes, empty arrays, interceptors, boxed parameters."""

import types

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dlx import nn
from dlx.nn import causal_attention

KEY = jax.random.key(0)
MASK = np.tri(4, dtype=bool)[None, None]


@pytest.fixture(scope="module", autouse=True)
def few():
    """So that 4 tokens are more than one block of attention."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_attention, "ROWS", 2)
        jax.clear_caches()
        yield
    jax.clear_caches()


def ones(*shape, dtype=jnp.float32):
    return jnp.ones(shape, dtype)


def kind(x):
    return next((k for k in (types.ModuleType, type, types.FunctionType) if isinstance(x, k)), None)


def test_every_name_of_flax_is_there():
    for name in dir(linen):
        if not name.startswith("_"):
            assert kind(getattr(nn, name)) is kind(getattr(linen, name)), name
    assert nn.pool is linen.pool and nn.recurrent.LSTMCell is linen.LSTMCell


# layer of a library, shape of an input; each of them has a form of its own for a CPU
LAYERS = {
    "dense": (lambda m: m.Dense(5), (16, 4, 3)),
    "conv": (lambda m: m.Conv(33, (3, 3)), (16, 4, 4, 34)),
    "few channels": (lambda m: m.Conv(5, (3, 3)), (16, 4, 4, 3)),
    "transposed": (lambda m: m.ConvTranspose(5, (4, 4), (2, 2)), (16, 4, 4, 3)),
    "norm": (lambda m: m.LayerNorm(), (16, 4, 3)),
    "attention": (
        lambda m: lambda x: m.dot_product_attention(x, x, x, mask=MASK),
        (16, 4, 2, 3),
    ),
    "pool": (lambda m: lambda x: m.max_pool(x, (2, 2), (2, 2)), (16, 4, 4, 3)),
    "gelu": (lambda m: lambda x: m.gelu(x, approximate=False), (16, 3)),
    "rnn": (lambda m: m.RNN(m.GRUCell(5)), (16, 4, 3)),
}  # fmt: skip


def gradient(name, library, shape=None):
    """(a function of variables and inputs, the variables)."""
    make, usual = LAYERS[name]
    layer = make(library)
    if not isinstance(layer, linen.Module):
        return jax.grad(lambda v, x: (layer(v["x"] * x) ** 2).sum()), {"x": ones()}
    variables = make(linen).init(KEY, ones(*(shape or usual)))
    return jax.grad(lambda v, x: (layer.apply(v, x) ** 2).sum()), variables


def inputs(name):
    return np.random.default_rng(0).normal(size=LAYERS[name][1]).astype(np.float32)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-4 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("name", [n for n in LAYERS if n not in ("gelu", "rnn")])
def test_shard_map(name):
    """Its types tell what is replicated; gradients are summed over the devices. (gelu's custom
    gradient is JAX's own, and flax's RNN begins with a state that is not split: neither works.)"""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    f, v = gradient(name, nn)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=(P(), P("d")), out_specs=P())
    same(jax.jit(mapped)(v, inputs(name)), jax.jit(gradient(name, linen)[0])(v, inputs(name)))


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "rnn"])
def test_explicit_axes(name):
    """The meshes that `jax.make_mesh` makes where nothing is said. (Not flax's RNN, as above.)"""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    (f, v), (plain, _) = gradient(name, nn), gradient(name, linen)
    with jax.set_mesh(mesh):
        x = jax.device_put(inputs(name), NamedSharding(mesh, P("d")))
        v = jax.device_put(v, NamedSharding(mesh, P()))
        same(jax.jit(f)(v, x), jax.jit(plain)(v, x))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("rnn", (0, 4, 3)), ("rnn", (2, 0, 3)), ("transposed", (2, 0, 4, 3)), ("conv", (0, 4, 4, 34)),
     ("dense", (0, 3)), ("norm", (0, 3)), ("few channels", (0, 4, 4, 3))],
)  # fmt: skip
def test_nothing_in(name, shape):
    make = LAYERS[name][0]
    v = make(linen).init(KEY, ones(*LAYERS[name][1]))
    got, want = (make(m).apply(v, ones(*shape)) for m in (nn, linen))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("options", "shape"),
    [({}, (2, 4, 4, 1)), ({}, (2, 3, 6, 1)), ({"strides": (2, 2)}, (2, 2, 6, 34))],
)
def test_a_window_larger_than_the_image(options, shape):
    """Nothing comes out, and the gradient is 0."""

    def layer(m):
        return m.Conv(33, (5, 5), padding="VALID", **options)

    v = layer(linen).init(KEY, ones(*shape))
    assert layer(nn).apply(v, ones(*shape)).shape == layer(linen).apply(v, ones(*shape)).shape
    for g in jax.tree.leaves(jax.grad(lambda v: layer(nn).apply(v, ones(*shape)).sum())(v)):
        assert not g.any()


@pytest.mark.parametrize("name", ["conv", "few channels", "attention", "dense", "norm"])
def test_export_for_any_batch(name):
    f, v = gradient(name, nn)
    shape = ("b", *map(str, LAYERS[name][1][1:]))
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(",".join(shape)), "float32")
    jax.export.export(jax.jit(f), platforms=("tpu", "cpu"))(v, x)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("make", [
    lambda m: m.LayerNorm(use_bias=False), lambda m: m.LayerNorm(),
    lambda m: m.ConvTranspose(5, (2, 2), padding="CIRCULAR"), lambda m: m.ConvTranspose(5, (2, 2)),
    lambda m: m.RNN(m.SimpleCell(5, activation_fn=linen.relu)), lambda m: m.Conv(5, (3, 3)),
])  # fmt: skip
def test_interceptors_see_a_layer_once(make, plain):
    x = ones(2, 8, 8, 3)
    v = make(linen).init(KEY, x)
    with nn.plain(plain):
        _, seen = make(nn).apply(v, x, capture_intermediates=True, mutable=["intermediates"])
        _, wanted = make(linen).apply(v, x, capture_intermediates=True, mutable=["intermediates"])
        assert jax.tree.map(jnp.shape, seen) == jax.tree.map(jnp.shape, wanted)

        def twice(f, args, kwargs, context):
            return (1 + (context.method_name == "__call__")) * f(*args, **kwargs)

        if "RNN" not in type(make(nn)).__name__:  # whose cell gives pairs
            with nn.intercept_methods(twice):
                same(make(nn).apply(v, x), make(linen).apply(v, x))


def test_boxed_parameters():
    def layer(m):
        init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "x"))
        return m.RNN(m.GRUCell(5, kernel_init=init))

    x = ones(2, 4, 3)
    v = layer(linen).init(KEY, x)
    same(layer(nn).apply(v, x), layer(linen).apply(v, x))


def test_states_of_sequences_on_two_batch_axes():
    def layer(m):
        return m.RNN(m.LSTMCell(5), return_carry=True)

    x, n = ones(2, 2, 4, 3), jnp.array([[1, 4], [2, 3]])
    v = layer(linen).init(KEY, x)
    same(*(jax.jit(lambda m=m: layer(m).apply(v, x, seq_lengths=n))() for m in (nn, linen)))


def test_attention_to_values_of_another_size():
    q = ones(2, 4, 2, 3)

    def loss(m):
        return lambda v: (m.dot_product_attention(q, q, v, mask=MASK) ** 2).sum()

    same(jax.grad(loss(nn))(q[..., :2]), jax.grad(loss(linen))(q[..., :2]))
    with pytest.raises(TypeError, match="too many positional"):
        nn.dot_product_attention(q, q, q, *[None] * 30)
    with pytest.raises(TypeError, match="multiple values"):
        nn.dot_product_attention(q, q, q, None, bias=None)


def test_no_tracer_leaves_a_product():
    x, layer = ones(2, 4, 3), nn.Dense(4)
    v = layer.init(KEY, x)
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda v: layer.apply(v, x).sum()))(v)


def test_attend_takes_a_list():
    layer = nn.Embed(7, 3)
    v = layer.init(KEY, jnp.zeros(1, jnp.int32))
    got = layer.apply(v, [1.0, 2.0, 3.0], method="attend")
    same(got, linen.Embed(7, 3).apply(v, [1.0, 2.0, 3.0], method="attend"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in LAYERS if n != "pool"])
def test_forward_mode_is_flaxs_where_it_is_asked_for(name):
    _, v = gradient(name, nn)
    make, _ = LAYERS[name]
    x = jnp.asarray(inputs(name))

    def f(m):
        layer = make(m)
        return (lambda x: layer.apply(v, x)) if isinstance(layer, linen.Module) else layer

    with nn.plain():
        same(jax.jvp(f(nn), (x,), (x,))[1], jax.jvp(f(linen), (x,), (x,))[1])
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(f(nn), (x,), (x,))
