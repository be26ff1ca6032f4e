"""Forecasters against PyTorch in float64, every parameter perturbed: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx.models import forecast, rnn

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
B, L, H, D, UNITS = 3, 9, 4, 2, 5


def close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def arrays(tree):
    return jax.tree.map(lambda p: jnp.asarray(p.detach().numpy()), tree)


def dense(layer, of=lambda p: p):
    return {"kernel": of(layer.weight).T, "bias": of(layer.bias)}


@pytest.fixture
def data(x64):
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    return random.normal(size=(B, L, D)), random.normal(size=(B, H, D))


def test_dlinear(data, promoting):
    """As in its paper's code: the ends repeated, a pooling, two layers over time."""
    x, y = data
    slow, rest = (torch.nn.Linear(L, H, dtype=torch.float64) for _ in range(2))
    pool = torch.nn.AvgPool1d(5, stride=1)
    t = torch.from_numpy(x)
    trend = pool(torch.cat([t[:, :1]] * 2 + [t] + [t[:, -1:]] * 2, 1).transpose(1, 2))  # (B, D, L)
    out = (slow(trend) + rest(t.transpose(1, 2) - trend)).transpose(1, 2)
    loss = ((out - torch.from_numpy(y)) ** 2).mean()
    loss.backward()
    model = forecast.DLinear(H, 5)
    params = arrays({"trend": dense(slow), "remainder": dense(rest)})
    close(model.apply({"params": params}, jnp.asarray(x)), out.detach().numpy())
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    value, g = jax.value_and_grad(
        lambda p: forecast.squared(model)(p, {}, batch, jax.random.key(0))[0]
    )(params)
    close(value, loss.item())
    close(g, arrays({k: dense(m, lambda p: p.grad) for k, m in
                     (("trend", slow), ("remainder", rest))}))  # fmt: skip


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_forecaster(cell, data, promoting):
    x, y = data
    kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell]
    layer = kind(D + 3, UNITS, batch_first=True, dtype=torch.float64)
    head = torch.nn.Linear(UNITS, 2 * H * D, dtype=torch.float64)
    linear = torch.nn.Linear(L, H, dtype=torch.float64)
    known = np.random.default_rng(1).normal(size=(B, L, 3))
    t, both = torch.from_numpy(x), torch.from_numpy(np.concatenate([x, known], 2))
    deep = head(layer(both)[0][:, -1]).reshape(B, 2, H, D)
    mean, log_scale = deep[:, 0] + linear(t.transpose(1, 2)).transpose(1, 2), deep[:, 1]
    loss = torch.nn.functional.gaussian_nll_loss(
        mean, torch.from_numpy(y), torch.exp(2 * log_scale), eps=1e-30
    )
    loss.backward()
    model = forecast.Forecaster(rnn.RNN(UNITS, cell=cell), H, D)
    state = {k: p.detach().numpy() for k, p in layer.named_parameters()}
    encoder = jax.tree.map(jnp.asarray, rnn.from_torch(state, cell))
    params = {"encoder": encoder} | arrays({"head": dense(head), "linear": dense(linear)})
    batch = {"x": jnp.asarray(both.numpy()), "y": jnp.asarray(y)}
    found = model.apply({"params": params}, batch["x"])
    close(tuple(found), (mean.detach().numpy(), log_scale.detach().numpy()))
    value, g = jax.value_and_grad(
        lambda p: forecast.gaussian(model)(p, {}, batch, jax.random.key(0))[0]
    )(params)
    close(value, loss.item())
    for name, m in (("head", head), ("linear", linear)):
        close(g[name], arrays(dense(m, lambda p: p.grad)))
    gradients = {k: p.grad.numpy() for k, p in layer.named_parameters()}
    for gate, rows in zip("rzn" if cell == "gru" else "ifgo", range(4), strict=False):
        part = slice(rows * UNITS, (rows + 1) * UNITS)
        for ours, theirs in (("i", "weight_ih_l0"), ("h", "weight_hh_l0")):
            close(g["encoder"]["layer0"][ours + gate]["kernel"], gradients[theirs][part].T)
