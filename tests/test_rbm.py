"""The restricted Boltzmann machine: all states of a small one, one by one."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx.models import rbm

V, H = 6, 4


def machine(scale=1.0, dtype=jnp.float64):
    random = np.random.default_rng(0)
    shapes = {"weights": (V, H), "visible": (V,), "hidden": (H,)}
    return {k: jnp.asarray(scale * random.normal(size=s), dtype) for k, s in shapes.items()}


def states(n):
    return np.array(list(itertools.product([0.0, 1.0], repeat=n)))


def joint(params):
    """p(v, h), (2^V, 2^H), from the energy of each pair."""
    W, b, c = (np.asarray(params[k]) for k in ("weights", "visible", "hidden"))
    E = np.zeros((2**V, 2**H))
    for i, v in enumerate(states(V)):
        for j, h in enumerate(states(H)):
            E[i, j] = -(b @ v) - c @ h - v @ W @ h
    return np.exp(-E) / np.exp(-E).sum(), -np.log(np.exp(-E).sum())


def data(n=5):
    return np.random.default_rng(1).integers(0, 2, (n, V)).astype(float)


def log_likelihood(params, v):
    """Mean ln p(v) with ln Z from all states."""
    F = rbm.free_energy(params, jnp.asarray(states(V)))
    return (-rbm.free_energy(params, v)).mean() - jax.nn.logsumexp(-F)


def test_conditionals_and_free_energy(x64):
    params = machine()
    p, log_z = joint(params)
    v, h = states(V), states(H)
    given_v, given_h = p / p.sum(1, keepdims=True), p / p.sum(0, keepdims=True)
    np.testing.assert_allclose(rbm.hidden(params, jnp.asarray(v)), given_v @ h, rtol=1e-12)
    np.testing.assert_allclose(rbm.visible(params, jnp.asarray(h)), given_h.T @ v, rtol=1e-12)
    F = -np.log(p.sum(1)) + log_z
    np.testing.assert_allclose(rbm.free_energy(params, jnp.asarray(v)), F, rtol=1e-12)


def test_against_scikit_learn(x64):
    neural_network = pytest.importorskip("sklearn.neural_network")
    theirs, params, v = neural_network.BernoulliRBM(H, random_state=0), machine(3.0), data(20)
    theirs.fit(v)
    theirs.components_ = np.asarray(params["weights"]).T
    theirs.intercept_visible_ = np.asarray(params["visible"])
    theirs.intercept_hidden_ = np.asarray(params["hidden"])
    x = jnp.asarray(v)
    np.testing.assert_allclose(rbm.free_energy(params, x), theirs._free_energy(v), rtol=1e-14)
    np.testing.assert_allclose(rbm.hidden(params, x), theirs.transform(v), rtol=1e-13)


def test_gradient_of_the_likelihood(x64):
    """The CD formula is exact where its second phase is the machine's own distribution; and each
    phase is the mean that it should be."""
    params, v = machine(), jnp.asarray(data())
    p = joint(params)[0].sum(1)
    wanted = jax.grad(lambda params: -log_likelihood(params, v))(params)
    every = jnp.asarray(states(V))
    parts = [rbm.gradient(params, v, every[i : i + 1]) for i in range(2**V)]
    for name in params:
        found = sum(p[i] * np.asarray(part[name]) for i, part in enumerate(parts))
        np.testing.assert_allclose(found, wanted[name], rtol=1e-10, atol=1e-13)


def test_long_chains_find_the_likelihoods_gradient(x64):
    """CD-k with k large: the second phase is a sample of the machine."""
    params, n = machine(1.5), 5_000
    v = jnp.asarray(np.tile(data(), (n // 5, 1)))
    u = rbm.uniforms(jax.random.key(0), 50, n, params)
    found = jax.jit(rbm.contrastive_divergence)(params, v, u)
    wanted = jax.grad(lambda params: -log_likelihood(params, v))(params)
    one = jax.jit(rbm.contrastive_divergence)(params, v, {k: x[:, :1] for k, x in u.items()})
    worst = 0.0
    for name in params:
        np.testing.assert_allclose(found[name], wanted[name], atol=5 * 0.5 / n**0.5)
        worst = max(worst, np.abs(one[name] - wanted[name]).max())
    assert worst > 0.1  # and one step is another matter


def test_a_step_of_gibbs(x64):
    """Unit by unit, with the given numbers; v and p of two steps."""
    params, v = machine(), data(3)
    u = rbm.uniforms(jax.random.key(0), 2, 3, params)
    W, b, c = (np.asarray(params[k]) for k in ("weights", "visible", "hidden"))
    wanted, p = v.copy(), np.zeros((3, V))
    for n in range(3):
        for t in range(2):
            h = np.zeros(H)
            for j in range(H):
                h[j] = u["uniform_hidden"][n, t, j] < 1 / (1 + np.exp(-c[j] - wanted[n] @ W[:, j]))
            for i in range(V):
                p[n, i] = 1 / (1 + np.exp(-b[i] - W[i] @ h))
            wanted[n] = u["uniform_visible"][n, t] < p[n]
    found, probabilities = rbm.gibbs(params, jnp.asarray(v), u)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(probabilities, p, rtol=1e-12)


def test_chains_reach_the_machines_distribution():
    params, n = machine(0.7, jnp.float32), 20_000
    u = rbm.uniforms(jax.random.key(1), 40, n, params)
    v, _ = jax.jit(rbm.gibbs)(params, jnp.zeros((n, V)), u)
    found = np.bincount(np.asarray(v).astype(int) @ 2 ** np.arange(V)[::-1], minlength=2**V) / n
    p = joint(params)[0].sum(1)
    assert np.abs(found - p).max() < 5 * np.sqrt(p.max() / n)


@pytest.mark.parametrize("k", [1, 3])
def test_the_loss_has_this_gradient(k, x64):
    """make_step's gradient is the explicit one, and so is the update of plain descent."""
    params, v, tx = machine(), jnp.asarray(data()), optax.sgd(0.1)
    u = rbm.uniforms(jax.random.key(0), k, 5, params)
    wanted = rbm.contrastive_divergence(params, v, u)
    step = jax.jit(dlx.make_step(rbm.divergence(k), tx))
    state = dlx.train_state(jax.random.key(1), {"params": params}, tx)
    new, metrics = step(state, {"visible": v.reshape(5, 2, 3), **u})
    for name in params:
        np.testing.assert_allclose(
            new.params[name], params[name] - 0.1 * wanted[name], rtol=1e-12, atol=1e-14
        )
    vk, p = rbm.gibbs(params, v, u)
    difference = rbm.free_energy(params, v).mean() - rbm.free_energy(params, vk).mean()
    np.testing.assert_allclose(metrics["loss"], difference, rtol=1e-12)
    np.testing.assert_allclose(metrics["reconstruction"], ((v - p) ** 2).mean(), rtol=1e-12)


def test_persistent_chains_go_on(x64):
    """From where they were, not from the data; of another number than the batch."""
    params, v, tx = machine(), jnp.asarray(data()), optax.sgd(0.1)
    chains = jnp.asarray(np.random.default_rng(3).integers(0, 2, (7, V)).astype(float))
    u = rbm.uniforms(jax.random.key(0), 2, 7, params)
    step = jax.jit(dlx.make_step(rbm.divergence(2, persistent=True), tx))
    state = dlx.train_state(jax.random.key(1), {"params": params, "chains": chains}, tx)
    new, _ = step(state, {"visible": v, **u})
    vk, _ = rbm.gibbs(params, chains, u)
    np.testing.assert_array_equal(new.model_state["chains"], vk)
    wanted = rbm.gradient(params, v, vk)
    for name in params:
        np.testing.assert_allclose(new.params[name], params[name] - 0.1 * wanted[name], rtol=1e-12)


@pytest.mark.parametrize("persistent", [False, True])
def test_the_likelihood_grows(persistent, x64):
    """Towards that of the data's own distribution, which is two patterns of equal share."""
    v = jnp.asarray(np.tile([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], (50, 1)))
    tx = optax.sgd(0.3)
    params = rbm.init(jax.random.key(0), V, H, np.asarray(v).mean(0))
    params = {k: x.astype(jnp.float64) for k, x in params.items()}
    chains = {"chains": v} if persistent else {}
    state = dlx.train_state(jax.random.key(1), {"params": params, **chains}, tx)
    step = jax.jit(dlx.make_step(rbm.divergence(1, persistent=persistent), tx))
    before = log_likelihood(params, v)
    for _ in range(300):
        state, _ = step(state, {"visible": v})
    after = log_likelihood(state.params, v)
    assert before < -4.1 and -1.1 < after <= np.log(0.5)


def test_init():
    mean = np.array([0.0, 0.5, 0.9, 1.0, 0.2, 0.3])
    params = rbm.init(jax.random.key(0), V, H, mean)
    p = rbm.visible(params, jnp.zeros((1, H)))[0]
    np.testing.assert_allclose(p, np.clip(mean, 0.01, 0.99), rtol=1e-6)
    assert {k: x.shape for k, x in params.items()} == {
        "weights": (V, H), "visible": (V,), "hidden": (H,),
    }  # fmt: skip
    assert {x.dtype for x in params.values()} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(rbm.init(jax.random.key(0), V, H)["visible"], 0)


def test_no_steps():
    with pytest.raises(dlx.BadInput, match="k is 0: give 1"):
        rbm.divergence(0)
