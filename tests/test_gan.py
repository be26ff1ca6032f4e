"""DCGAN: its losses against NumPy, its two steps, its shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import nn
from dlx.models import gan


class Line(nn.Module):
    """What the losses take for a network: logits or images that a child can compute."""

    @nn.compact
    def __call__(self, x, *, train=False):
        w = self.param("w", lambda key: jnp.ones(()))
        return (w * x.reshape(len(x), -1)).sum(1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_losses(x64):
    """By the probabilities, as the paper has them; gradients by differences."""
    random = np.random.default_rng(0)
    image, noise = random.normal(size=(5, 2)), random.normal(size=(5, 3))
    judge = {"params": {"w": jnp.float64(0.7)}}
    params = {"w": jnp.float64(-1.3)}
    fake, generate = gan.generate(Line(), {}, params, noise)
    np.testing.assert_allclose(fake, -1.3 * noise.sum(1))

    def d_wanted(w):
        real, fake = w * image.sum(1), w * -1.3 * noise.sum(1)
        return -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean()

    def g_wanted(w):
        return -np.log(sigmoid(0.7 * w * noise.sum(1))).mean()

    def d_loss(params):
        return gan.discriminator_loss(Line())(params, {}, {"image": image, "fake": fake}, None)[0]

    def g_loss(params):
        loss_fn = gan.generator_loss(Line())
        return loss_fn(params, {}, {}, None, generate=generate, judge=judge)[0]

    for loss, wanted, at in ((d_loss, d_wanted, judge["params"]), (g_loss, g_wanted, params)):
        w, e = float(at["w"]), 1e-6
        value, gradient = jax.value_and_grad(loss)(at)
        np.testing.assert_allclose(value, wanted(w), rtol=1e-12)
        np.testing.assert_allclose(
            gradient["w"], (wanted(w + e) - wanted(w - e)) / 2 / e, rtol=1e-7
        )


def test_losses_are_stable():
    """Where the discriminator is sure, probabilities round to 0 and the gradient is still 1."""
    judge, params = {"params": {"w": jnp.float32(-1e4)}}, {"w": jnp.float32(1.0)}
    _, generate = gan.generate(Line(), {}, params, jnp.ones((2, 1)))  # images that are 1

    def g_loss(params):
        loss_fn = gan.generator_loss(Line())
        return loss_fn(params, {}, {}, None, generate=generate, judge=judge)[0]

    value, gradient = jax.value_and_grad(g_loss)(params)
    assert float(value) == 1e4 and float(gradient["w"]) == 1e4


@pytest.mark.parametrize(
    ("size", "channels", "out", "count"),
    [(28, (128, 64), 1, 759_681), (32, (256, 128, 64), 3, 1_068_931)],
)
def test_generator_shapes(size, channels, out, count):
    G = gan.Generator(size, channels, out)
    z = jnp.ones((2, 100))
    variables = jax.eval_shape(G.init, jax.random.key(0), z)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == count
    assert jax.eval_shape(G.apply, variables, z).shape == (2, size, size, out)


@pytest.mark.parametrize("norm", [True, False])
def test_discriminator_shapes(norm):
    D = gan.Discriminator((64, 128), norm=norm)
    x = jnp.ones((2, 28, 28, 1))
    variables = jax.eval_shape(D.init, jax.random.key(0), x)
    assert jax.eval_shape(D.apply, variables, x).shape == (2,)
    assert set(variables["params"]) == {"conv1", "conv2", "head"} | ({"norm2"} if norm else set())
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == (
        138_689 if norm else 138_561
    )
    assert ("batch_stats" in variables) == norm


def test_a_critic_sees_each_image_alone():
    """What WGAN-GP needs, with the gradient of a gradient."""
    D = gan.Discriminator((2, 3), norm=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 1)), jnp.float32)
    variables = jax.jit(D.init)(jax.random.key(0), x)

    def penalty(variables):
        gradient = jax.grad(lambda x: D.apply(variables, x, train=True).sum())(x)
        return ((jnp.sqrt((gradient**2).sum((1, 2, 3))) - 1) ** 2).mean()

    @jax.jit
    def both(variables):
        alone = jnp.stack([D.apply(variables, image[None], train=True)[0] for image in x])
        return alone, D.apply(variables, x, train=True), jax.grad(penalty)(variables)

    alone, together, gradient = both(variables)
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-6)
    for name in ("conv1", "conv2", "head"):
        assert np.abs(gradient["params"][name]["kernel"]).max() > 0


def steps(G, D, tx):
    d_step = dlx.make_step(gan.discriminator_loss(D), tx)
    g_step = dlx.make_step(gan.generator_loss(D), tx)

    def step(state, batch):
        d, g = state
        fake, generate = gan.generate(G, g.model_state, g.params, batch["noise"])
        d, d_metrics = d_step(d, {"image": batch["image"], "fake": fake})
        g, g_metrics = g_step(g, batch, generate=generate, judge=d.variables)
        return (d, g), d_metrics, g_metrics

    return step


@pytest.mark.slow
def test_two_steps_make_a_gan(promoting):
    """Every parameter of both moves; statistics too; the images are made once a step."""
    G, D, tx = gan.Generator(8, (6, 4)), gan.Discriminator((4, 6)), optax.adam(1e-3, b1=0.5)
    random = np.random.default_rng(0)
    batch = {
        "image": np.tanh(random.normal(size=(4, 8, 8, 1))).astype(np.float32),
        "noise": random.normal(size=(4, 5)).astype(np.float32),
    }

    def init(key):
        d = dlx.train_state(key, D.init(key, batch["image"]), tx)
        return d, dlx.train_state(key, G.init(key, batch["noise"]), tx)

    state = jax.jit(init)(jax.random.key(0))
    with nn.plain():
        text = jax.jit(steps(G, D, tx)).lower(state, batch).as_text()
    # G forward, D forward three times; backward: D's with the gradients of its parameters twice,
    # once without; G's. Of a first layer there is no gradient of the input.
    assert text.count("stablehlo.convolution") == 3 + 3 * 2 + 2 * 3 + 2 + 5
    (d, g), d_metrics, g_metrics = jax.jit(steps(G, D, tx))(state, batch)
    for old, new in zip(state, (d, g), strict=True):
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(old.variables), jax.tree.leaves(new.variables),
            strict=True,
        ):  # fmt: skip
            assert np.abs(a - b).max() > 0, jax.tree_util.keystr(path)
    assert (
        np.isfinite(g_metrics["loss"]) and 0 < d_metrics["real"] < 1 and 0 < d_metrics["fake"] < 1
    )
    images = gan.sample(G, g.variables, batch["noise"])
    assert images.shape == (4, 8, 8, 1) and np.abs(images).max() < 1


def test_a_size_that_cannot_be_halved():
    with pytest.raises(dlx.BadInput, match="size 30 cannot be halved 2 times"):
        gan.Generator(30)
