"""The variational autoencoder against NumPy, from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx.models import vae

MODELS = {"dense": (vae.dense(), 50, 425_284), "convolutional": (vae.convolutional(), 32, 370_945)}


def shapes(model, latents, batch=2):
    x = jax.ShapeDtypeStruct((batch, 28, 28, 1), jnp.float32)
    noise = jax.ShapeDtypeStruct((batch, latents), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x, noise)


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    model, latents, count = MODELS[name]
    params = shapes(model, latents)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name, promoting):
    """And the loss falls; without noise in the batch it is drawn."""
    model, latents, _ = MODELS[name]
    x = np.random.default_rng(0).random((4, 28, 28, 1)).astype(np.float32)
    tx = optax.adam(3e-3)
    step = jax.jit(dlx.make_step(vae.loss(model), tx))
    variables = jax.jit(model.init)(jax.random.key(0), x, jnp.ones((4, latents)))
    state = dlx.train_state(jax.random.key(1), variables, tx)
    losses = []
    for _ in range(12):
        state, metrics = step(state, {"image": x})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 3
    for path, mu in jax.tree_util.tree_leaves_with_path(state.opt_state[0].mu):
        assert np.abs(mu).max() > 0, jax.tree_util.keystr(path)


def test_shapes_of_samples():
    """`encode`, `decode` with any leading dimensions, `sample`: probabilities."""
    model, latents, _ = MODELS["convolutional"]
    variables = shapes(model, latents)
    x = jax.ShapeDtypeStruct((2, 28, 28, 1), jnp.float32)
    z = jax.ShapeDtypeStruct((5, 2, latents), jnp.float32)
    mean, log_variance = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="encode"), variables, x
    )
    assert mean.shape == log_variance.shape == (2, latents)
    decoded = jax.eval_shape(lambda v, z: model.apply(v, z, method="decode"), variables, z)
    assert decoded.shape == (5, 2, 28, 28, 1)
    small = vae.dense((3,), 2, (2, 2, 1))
    params = jax.jit(small.init)(jax.random.key(0), jnp.ones((1, 2, 2, 1)), jnp.ones((1, 2)))
    images = vae.sample(small, params["params"], jnp.ones((3, 2)))
    assert images.shape == (3, 2, 2, 1) and (images > 0).all() and (images < 1).all()


def gaussian(n, Z, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, Z)), 0.5 * random.normal(size=(n, Z))


def log_normal(z, mean, variance):
    """ln N(z; mean, variance), of independent components."""
    return (-0.5 * np.log(2 * np.pi * variance) - (z - mean) ** 2 / (2 * variance)).sum(-1)


def test_divergence(x64):
    """E_q[ln q - ln p] by Gauss-Hermite quadrature in each component: exact for these."""
    mean, log_variance = gaussian(3, 2)
    points, w = np.polynomial.hermite_e.hermegauss(20)
    wanted = np.zeros(3)
    for j in range(2):
        m, v = mean[:, j, None], np.exp(log_variance[:, j, None])
        z = m + np.sqrt(v) * points
        difference = log_normal(z[..., None], m[..., None], v[..., None]) - log_normal(
            z[..., None], 0.0, 1.0
        )
        wanted += difference @ w / np.sqrt(2 * np.pi)
    np.testing.assert_allclose(vae.divergence(mean, log_variance), wanted, rtol=1e-10)


def test_likelihood(x64):
    """Pixel by pixel; and finite where the probabilities have rounded to 0 and 1."""
    random = np.random.default_rng(0)
    x, logits = random.random((3, 2, 2, 1)), 3 * random.normal(size=(4, 3, 2, 2, 1))
    p = 1 / (1 + np.exp(-logits))
    wanted = (x * np.log(p) + (1 - x) * np.log(1 - p)).sum((2, 3, 4))
    np.testing.assert_allclose(vae.log_likelihood(x, logits), wanted, rtol=1e-12)
    extreme = np.array([1e3, -1e3]).reshape(2, 1, 1, 1)
    found = vae.log_likelihood(np.array([0.0, 0.0]).reshape(2, 1, 1, 1), extreme)
    np.testing.assert_allclose(found, [-1e3, 0.0], atol=1e-12)


def linear_case(k, seed=1):
    """A decoder whose logits are linear in z, so that everything is at hand: x, logits, q, z."""
    random = np.random.default_rng(0)
    x, matrix = random.random((3, 2, 2, 1)), random.normal(size=(2, 4))
    q = gaussian(3, 2)
    noise = np.random.default_rng(seed).normal(size=(k, 3, 2))
    z = np.asarray(vae.reparameterise(q, noise))
    np.testing.assert_allclose(z, q[0] + np.exp(0.5 * q[1]) * noise, rtol=1e-12)
    return x, (z @ matrix).reshape(k, 3, 2, 2, 1), q, z


def test_importance_bound(x64):
    """ln of the mean weight, the weights from the densities."""
    x, logits, q, z = linear_case(5)
    p = 1 / (1 + np.exp(-logits))
    likelihood = np.where(True, p**x * (1 - p) ** (1 - x), 0).prod((2, 3, 4))
    w = likelihood * np.exp(log_normal(z, 0.0, 1.0) - log_normal(z, q[0], np.exp(q[1])))
    np.testing.assert_allclose(vae.importance_bound(x, logits, q, z), np.log(w.mean(0)), rtol=1e-10)


@pytest.mark.slow
def test_bounds_of_more_samples(x64):
    """With one sample the mean is that of the ELBO; it rises with k, within its error."""
    n = 40_000
    x, logits, q, z = linear_case(n)

    def bound(k):
        """Mean and standard error over n / k draws, of each image."""
        parts = [a.reshape(n // k, k, *a.shape[1:]) for a in (logits, z)]
        values = np.asarray(jax.vmap(lambda y, z: vae.importance_bound(x, y, q, z))(*parts))
        return values.mean(0), values.std(0) / np.sqrt(n // k)

    elbo = np.asarray(jax.vmap(lambda y: vae.elbo(x, y, q))(logits)).mean(0)
    bounds = {k: bound(k) for k in (1, 5, 50)}
    assert (np.abs(bounds[1][0] - elbo) < 4 * bounds[1][1]).all()
    for few, many in ((1, 5), (5, 50)):
        (low, low_error), (high, high_error) = bounds[few], bounds[many]
        assert (high - low > 3 * (low_error + high_error)).all()


def test_loss_takes_the_noise_of_the_batch(x64, promoting):
    model = vae.dense((3,), 2, (2, 2, 1))
    random = np.random.default_rng(0)
    x, noise = random.random((3, 2, 2, 1)), random.normal(size=(3, 4, 2))
    params = model.init(jax.random.key(0), x, noise[:, 0])["params"]
    key = jax.random.key(1)
    logits, q = model.apply({"params": params}, x, noise[:, 0])
    loss, (_, metrics) = vae.loss(model)(params, {}, {"image": x, "noise": noise[:, 0]}, key)
    np.testing.assert_allclose(loss, -vae.elbo(x, logits, q).mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["divergence"], vae.divergence(*q).mean(), rtol=1e-12)
    z = vae.reparameterise(q, noise.swapaxes(0, 1))
    logits = model.apply({"params": params}, z, method="decode")
    loss, _ = vae.loss(model, 4)(params, {}, {"image": x, "noise": noise}, key)
    np.testing.assert_allclose(loss, -vae.importance_bound(x, logits, q, z).mean(), rtol=1e-12)
    drawn = [vae.loss(model, k)(params, {}, {"image": x}, jax.random.key(i))[0]
             for k in (None, 4) for i in (0, 1)]  # fmt: skip
    assert len({float(value) for value in drawn}) == 4


def test_an_image_that_cannot_be_halved():
    with pytest.raises(dlx.BadInput, match=r"\(28, 30, 1\) cannot be halved 2 times"):
        vae.convolutional(shape=(28, 30, 1))
