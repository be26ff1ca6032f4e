"""Linear layers, layer normalisation and attention compute what flax's compute."""

import re

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx import nn
from dlx.models import gpt
from dlx.nn import causal_attention, dense, losses
from tests.test_nn import assert_same

FEW = 2  # tokens that attention works on together


@pytest.fixture(scope="module", autouse=True)
def few():
    """So that small arrays have more than one block of tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(causal_attention, "ROWS", FEW)
        jax.clear_caches()
        yield
    jax.clear_caches()


def draw(*shapes, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, s, dtype) for key, s in zip(keys, shapes, strict=True)]


def causal(T, ndim=4):
    return np.tri(T, dtype=bool).reshape((1,) * (ndim - 2) + (T, T))


# ---- Linear layers -----------------------------------------------------------------------------

PRODUCTS = [
    ((3, 4), (4, 5), 1),
    ((2, 3, 4), (4, 5), 1),
    ((4,), (4, 5), 1),
    ((2, 3, 4), (3, 4, 5, 2), 2),
]  # x, k, axes that meet


def numbers(left, n):
    return ((tuple(range(left - n, left)), tuple(range(n))), ((), ()))


def test_products(x64):
    """All at once: each with operands of its own."""
    operands = [a for left, right, _ in PRODUCTS for a in draw(left, right)]

    def each(product):
        def f(*operands):
            pairs = zip(operands[::2], operands[1::2], PRODUCTS, strict=True)
            return jnp.concatenate(
                [product(x, k, numbers(x.ndim, n)).ravel() for x, k, (_, _, n) in pairs]
            )

        return f

    assert_same(each(dense.dot_general), each(jax.lax.dot_general), *operands)


@pytest.mark.parametrize(
    ("left", "right", "axes", "options", "dtype"),
    [((2, 3, 4), (4, 3, 5), (((1, 2), (1, 0)), ((), ())), {}, jnp.float32),
     ((2, 3, 4), (3, 5), (((1,), (0,)), ((), ())), {}, jnp.float32),
     ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,))), {}, jnp.float32),
     ((2, 4), (4, 5), numbers(2, 1), {"out_sharding": None}, jnp.float32),
     ((2, 4), (4, 5), numbers(2, 1), {}, jnp.bfloat16),
     ((2, 4), (4, 5), numbers(2, 1), {}, jnp.int32),
     ((2, 4), (4, 5), numbers(2, 1), {"preferred_element_type": jnp.float32}, jnp.bfloat16),
     ((0, 4), (4, 5), numbers(2, 1), {}, jnp.float32)],
)  # fmt: skip
def test_other_products_are_jaxs(left, right, axes, options, dtype):
    x, k = jnp.ones(left, dtype), jnp.ones(right, dtype)
    found, wanted = (
        str(jax.make_jaxpr(lambda x, k, f=f: f(x, k, axes, **options))(x, k))
        for f in (dense.dot_general, jax.lax.dot_general)
    )
    assert found == wanted


# ---- Layers ------------------------------------------------------------------------------------


class Every(nn.Module):
    """All the layers on the same (2, 3, 6)."""

    m: object

    @nn.compact
    def __call__(self, x):
        m, f64 = self.m, {"param_dtype": jnp.float64}
        embed = m.Embed(7, 6, **f64)
        heads = m.MultiHeadDotProductAttention(2, use_bias=False, attention_fn=attend(m), **f64)
        out = [
            m.Dense(5, **f64)(x),
            m.DenseGeneral((3, 2), axis=(-2, -1), **f64)(x),
            m.LayerNorm(1e-5, **f64)(x),
            heads(x),
            embed.attend(x) + embed(jnp.arange(3)).sum(),
        ]
        return jnp.concatenate([y.ravel() for y in out])


def attend(m):
    """Causal, whatever the mask of the layer."""

    def f(query, key, value, **options):
        return m.dot_product_attention(query, key, value, mask=causal(query.shape[-3]))

    return f


@pytest.mark.slow
def test_layers(x64, promoting):
    """The same parameters from the same key, values and derivatives, also under vmap."""
    fast, plain = Every(nn), Every(linen)
    (x,) = draw((2, 3, 6))
    variables = jax.jit(fast.init)(jax.random.key(1), x)
    wanted = jax.jit(plain.init)(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)
    assert jax.tree.structure(variables) == jax.tree.structure(wanted)
    leaves, tree = jax.tree.flatten(variables)
    leaves = [a + 0.1 * jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape) for a in leaves]

    def call(layer):
        return lambda x, *leaves: layer.apply(jax.tree.unflatten(tree, leaves), x)

    def some(layer):
        """Of a batch of inputs, a gradient each."""
        loss = jax.grad(lambda x: jnp.sin(call(layer)(x, *leaves)).sum())
        return jax.jit(jax.vmap(loss))(*draw((4, 2, 3, 6)))

    assert_same(call(fast), call(plain), x, *leaves)
    np.testing.assert_allclose(some(fast), some(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"use_bias": False}, {"use_scale": False}, {"reduction_axes": (-2, -1)}, {"axis_name": "i"},
     {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}],
)  # fmt: skip
def test_other_normalisations_are_flaxs(options, promoting):
    x = jnp.ones((2, 3, 6))

    def traced(m):
        layer = m.LayerNorm(**options)
        params = linen.LayerNorm(**options | {"axis_name": None}).init(jax.random.key(0), x)
        return str(jax.make_jaxpr(layer.apply, axis_env=[("i", 1)])(params, x))

    assert traced(nn) == traced(linen)


def test_forward_mode():
    """The plain forms have it; the fast ones have not, and JAX says so."""
    q = jnp.ones((1, 5, 2, 4))

    def attend(q):
        return nn.dot_product_attention(q, q, q, mask=causal(q.shape[1]))

    def product(x):
        return dense.dot_general(x, x[0], (((2,), (0,)), ((), ())))

    def norm(x):
        return nn.LayerNorm().apply({"params": {"scale": x[0, 0], "bias": x[0, 0]}}, x)

    for f, x in ((attend, q), (product, jnp.ones((2, 3, 3))), (norm, jnp.ones((2, 3, 3)))):
        with nn.plain():
            jax.jvp(f, (x,), (x,))
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(f, (x,), (x,))


# ---- Attention ---------------------------------------------------------------------------------


def test_causal_attention(x64):
    """Blocks of 2 queries: fewer, exactly one, full ones, and more with a remainder; several batch
    axes and none."""
    shapes = [(1, 1, 1, 1), (2, 2, 1, 3), (2, 1, 4, 1, 3), (5, 2, 3)]
    operands = draw(*[shape for shape in shapes for _ in range(3)])

    def each(attend):
        def f(*operands):
            out = []
            for i, shape in enumerate(shapes):
                mask = causal(shape[-3], len(shape))
                out.append(attend(*operands[3 * i : 3 * i + 3], mask=mask).ravel())
            return jnp.concatenate(out)

        return f

    assert_same(*(each(m.dot_product_attention) for m in (nn, linen)), *operands)


OTHERS = {
    "none": {},
    "another mask": {"mask": np.ones((1, 1, 5, 5), bool)},
    "a mask of more axes": {"mask": causal(5, 5)},
    "a traced mask": {"mask": jnp.asarray(causal(5))},
    "a bias": {"mask": causal(5), "bias": jnp.ones((1, 1, 5, 5), jnp.float32)},
    "dropout": {"mask": causal(5), "dropout_rate": 0.5, "dropout_rng": jax.random.key(0)},
    "another precision": {"mask": causal(5), "precision": "highest"},
}


def test_few_tokens_are_flaxs():
    (q,) = draw((2, FEW, 3, 4), dtype=jnp.float32)
    found, wanted = (
        str(jax.make_jaxpr(lambda q, m=m: m.dot_product_attention(q, q, q, mask=causal(FEW)))(q))
        for m in (nn, linen)
    )
    assert found == wanted


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_is_flaxs(name):
    (q,) = draw((2, 5, 3, 4), dtype=jnp.float32)
    found, wanted = (
        str(jax.make_jaxpr(lambda q, m=m: m.dot_product_attention(q, q, q, **OTHERS[name]))(q))
        for m in (nn, linen)
    )
    assert found == wanted


# ---- Everything at once ------------------------------------------------------------------------


def lowered(platform, plain=False, scanned=False):
    model = gpt.GPT(7, 8, 1, 2, 8, dropout=0.0)
    tokens = jnp.zeros((2, 8), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens}
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]

    def loss(params):
        return losses.language(model)(params, {}, batch, jax.random.key(0))[0]

    def step(params, _):
        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(jnp.subtract, params, gradients), value

    def program(params):
        if scanned:
            return jax.lax.scan(step, params, None, length=2)
        return step(params, None)

    with nn.plain(plain):
        traced = jax.jit(program).trace(params)
        return traced.lower(lowering_platforms=(platform,)).as_text()


def products(text):
    """Its products with all attributes and shapes, but the names of their operands."""
    lines = [line.partition(" = ")[2] for line in text.splitlines() if "dot_general" in line]
    return sorted(re.sub(r"%\w+(#\d+)?", "", line) for line in lines)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms(platform, scanned):
    """The very products of plain flax, and no barrier."""
    text, plain = lowered(platform, False, scanned), lowered(platform, True, scanned)
    assert "optimization_barrier" not in text
    assert len(products(plain)) > 15 and products(text) == products(plain)


def test_the_switch():
    """With it, not an operation on a CPU differs from what flax.linen's own layers make."""
    fast, plain = lowered("cpu"), lowered("cpu", plain=True)
    assert "optimization_barrier" in fast and "optimization_barrier" not in plain
    assert products(plain) == products(lowered("tpu", plain=True))
