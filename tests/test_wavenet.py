"""WaveNet: nothing of the future, all of the receptive field, and its queues."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx.models import wavenet

SMALL = wavenet.WaveNet(channels=4, skip=5, dilations=(1, 2, 4, 1, 2), values=16)
WIDE = wavenet.WaveNet(channels=4, skip=6, dilations=(1, 3), width=3, values=16)
MODELS = {"small": SMALL, "wide": WIDE}


def perturbed(model, *args, dtype=jnp.float32):
    """Every parameter random, biases too."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * random.normal(size=x.shape), dtype), shapes)


def samples(*shape, values=16):
    return jnp.asarray(np.random.default_rng(1).integers(0, values, shape), jnp.int32)


def test_mu_law(x64):
    """Value by value from the definition; the extremes, silence, and beyond."""
    x = np.linspace(-1, 1, 2001)
    f = np.array([np.sign(v) * np.log(1 + 255 * abs(v)) / np.log(256) for v in x])
    levels = np.linspace(-1, 1, 256)
    near = np.abs(f[:, None] - levels)
    found = np.asarray(wavenet.mu_law(jnp.asarray(x)))
    np.testing.assert_allclose(near[np.arange(2001), found], near.min(1), atol=1e-12)
    assert wavenet.mu_law(jnp.array([-1.0, 0, 1, -3, 3])).tolist() == [0, 128, 255, 0, 255]
    back = np.asarray(wavenet.mu_law_inverse(jnp.arange(256)))
    wanted = np.sign(levels) * (256 ** np.abs(levels) - 1) / 255
    np.testing.assert_allclose(back, wanted, rtol=1e-9)


@pytest.mark.parametrize("values", [16, 256])
def test_mu_law_there_and_back(values):
    """In float32: every value, and amplitudes to half a level."""
    every = jnp.arange(values)
    back = wavenet.mu_law_inverse(every, values)
    assert back.dtype == jnp.float32
    np.testing.assert_array_equal(wavenet.mu_law(back, values), every)
    x = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    x2 = wavenet.mu_law_inverse(wavenet.mu_law(jnp.asarray(x), values), values)
    widest = np.log(values) * (np.abs(x) + 1 / (values - 1)) / (values - 1)  # of half a level
    assert (np.abs(x2 - x) <= 1.2 * widest).all()


@pytest.mark.parametrize("name", MODELS)
def test_causality(name):
    """The gradient of one prediction by what each sample looks up: nothing of the future, nothing
    beyond the receptive field, something of every sample within."""
    T, t = 30, 24
    model = MODELS[name].clone(values=T)
    sample = jnp.arange(T, dtype=jnp.int32)[None]  # each looks up a row of its own
    params = perturbed(model, sample)["params"]

    def prediction(table):
        own = {**params, "causal": {"embedding": table}}
        return (model.apply({"params": own}, sample)[0, t] * jnp.arange(1.0, T + 1)).sum()

    g = np.asarray(jax.jit(jax.grad(prediction))(params["causal"]["embedding"]))  # (T, 2 C)
    field = wavenet.receptive_field(model.dilations, model.width)
    assert field < t
    seen = np.arange(t - field + 1, t + 1)
    np.testing.assert_array_equal(np.flatnonzero(np.abs(g).max(1)), seen)


def test_receptive_fields():
    """The paper's block of 1, 2, 4, ..., 512 sees 1,024 samples of what it is given."""
    assert wavenet.receptive_field(tuple(2**i for i in range(10))) == 1024 + 1
    assert wavenet.receptive_field((1, 3), 3) == 10


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_queues(name, conditioned, x64, promoting):
    """Sample by sample from the queues, the logits are those of the whole."""
    model, sample = MODELS[name], samples(3, 40)
    condition = jnp.eye(3, 2) if conditioned else None
    variables = perturbed(model, sample, condition, dtype=jnp.float64)
    whole = jax.jit(model.apply)(variables, sample, condition)
    one = jax.jit(lambda v, x, t: model.apply(v, x, condition, t=t, mutable=["cache"]))
    cache = {}
    for t in range(40):
        logits, cache = one({**variables, **cache}, sample[:, t : t + 1], t)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], rtol=1e-11, atol=1e-11)
    assert conditioned != np.allclose(whole, model.apply(variables, sample))


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("prompted", [1, 7])
def test_generation(prompted, conditioned, x64, promoting):
    """The samples that the naive way draws, which puts the whole waveform through for each."""
    model, key, prompt = WIDE, jax.random.key(5), samples(2, prompted)
    condition = jnp.eye(2) if conditioned else None
    variables = perturbed(model, prompt, condition, dtype=jnp.float64)
    found = jax.jit(wavenet.generate, static_argnums=(0, 4))(
        model, variables, key, prompt, 25, condition
    )
    apply = jax.jit(lambda x: model.apply(variables, x, condition))
    slow = prompt
    for t in range(prompted, prompted + 25):
        logits = apply(jnp.pad(slow, ((0, 0), (0, 40 - t))))[:, t - 1]  # one size: one compile
        drawn = jax.random.categorical(jax.random.fold_in(key, t), logits)
        slow = jnp.concatenate([slow, drawn[:, None].astype(jnp.int32)], 1)
    np.testing.assert_array_equal(found, slow)
    assert len(np.unique(found)) > 4


def test_bad_input():
    with pytest.raises(dlx.BadInput, match="prompt has no samples"):
        wavenet.generate(SMALL, {}, jax.random.key(0), jnp.zeros((2, 0), jnp.int32), 3)
    with pytest.raises(dlx.BadInput, match="width is 1: give 2"):
        wavenet.WaveNet(width=1)
    with pytest.raises(dlx.BadInput, match=r"dilations are \(1, 0\): give 1"):
        wavenet.WaveNet(dilations=(1, 0))


def test_parameters():
    """Three blocks of ten layers, counted by hand: look-up, gates, residual, skip, the last two."""
    v = jax.eval_shape(wavenet.WaveNet().init, jax.random.key(0), samples(1, 8))
    layer = (2 * 64 * 128 + 128) + (64 * 64 + 64) + (64 * 256 + 256)
    wanted = 256 * 128 + 30 * layer - (64 * 64 + 64) + 2 * (256 * 256 + 256)
    assert sum(x.size for x in jax.tree.leaves(v)) == wanted == 1_279_552


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_every_parameter_learns(dtype, promoting):
    model = SMALL.clone(dtype=dtype)
    batch = {"sample": samples(2, 21), "condition": jnp.eye(2)}
    params = perturbed(model, batch["sample"], batch["condition"])["params"]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    grad = jax.jit(jax.grad(wavenet.likelihood(model), has_aux=True))
    g, (_, metrics) = grad(params, {}, batch, jax.random.key(1))
    for path, x in jax.tree_util.tree_leaves_with_path(g):
        rows = x[np.unique(batch["sample"])] if "embedding" in jax.tree_util.keystr(path) else x
        assert np.isfinite(x).all() and np.abs(rows).max() > 0, jax.tree_util.keystr(path)
    assert metrics["bits"].dtype == jnp.float32


def test_likelihood(x64):
    """- ln p of every sample but the first, from the logits of the samples before it alone."""
    sample = samples(2, 9)
    variables = perturbed(SMALL, sample, dtype=jnp.float64)
    apply, total = jax.jit(SMALL.apply), 0.0
    for b in range(2):
        for t in range(1, 9):
            before = sample[b : b + 1].at[:, t:].set(0)
            z = np.asarray(apply(variables, before))[0, t - 1]
            total -= np.log(np.exp(z[sample[b, t]]) / np.exp(z).sum())
    loss_fn = wavenet.likelihood(SMALL)
    loss, (_, m) = loss_fn(variables["params"], {}, {"sample": sample}, jax.random.key(0))
    np.testing.assert_allclose(loss, total / 16, rtol=1e-10)
    np.testing.assert_allclose(m["bits"], total / 16 / np.log(2), rtol=1e-10)


@pytest.mark.slow
def test_it_learns_a_wave_and_goes_on_with_it():
    """A period of 8 samples: next to nothing is left to tell, and generation repeats it."""
    wave = np.tile([1, 7, 12, 7, 1, 9, 3, 9], 6).astype(np.int32)
    batch = {"sample": jnp.asarray(np.stack([wave[i : i + 33] for i in range(8)]))}
    tx = optax.sgd(0.3, momentum=0.9)
    params = jax.jit(SMALL.init)(jax.random.key(0), batch["sample"])
    state = dlx.train_state(jax.random.key(0), params, tx)
    step = jax.jit(dlx.make_step(wavenet.likelihood(SMALL), tx), donate_argnums=0)
    for _ in range(300):
        state, metrics = step(state, batch)
    assert metrics["bits"] < 0.15  # the first samples of each have little before them
    made = wavenet.generate(SMALL, state.variables, jax.random.key(1), batch["sample"][:, :16], 17)
    assert (np.asarray(made) == np.asarray(batch["sample"])).mean() > 0.9
