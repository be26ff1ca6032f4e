"""The restricted Boltzmann machine with binary units.

P. Smolensky 1986; G. Hinton, "Training Products of Experts by Minimizing Contrastive Divergence",
Neural Computation 2002. Visible units v and hidden units h, connected across and never within, so
that each layer's units are independent given the other layer:

    E(v, h) = - b^T v - c^T h - v^T W h,    p(v, h) = exp(-E(v, h)) / Z
    p(h = 1 | v) = sigmoid(c + v W),        p(v = 1 | h) = sigmoid(b + h W^T)
    F(v) = - b^T v - sum over j of softplus(c + v W)_j,    p(v) = exp(-F(v)) / Z

The gradient of - ln p(v) is that of F at the data less its mean under p. Contrastive divergence
(CD-k) takes for the latter k steps of Gibbs sampling from the data; the persistent form
(T. Tieleman, "Training Restricted Boltzmann Machines using Approximations to the Likelihood
Gradient", ICML 2008) k steps from where the chains of the last update stopped.

A deep belief network (G. Hinton, S. Osindero, Y. Teh, Neural Computation 2006) is a stack of them,
each trained on the `hidden` of the one below.

Parameters are a plain dict: {"weights": W (V, H), "visible": b (V,), "hidden": c (H,)}.
Symbols: B batch, V visible and H hidden units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlx import nn
from dlx.errors import BadInput

Params = dict[str, jax.Array]


def init(key: jax.Array, visible: int, hidden: int, mean: np.ndarray | None = None) -> Params:
    """Small random weights (deviation 0.01), hidden biases of 0.

    Args:
      key: of the weights.
      visible: V.
      hidden: H.
      mean: (V,), how often each visible unit is on in the data: the visible biases are its log
        odds (kept within 1 and 99 %), or 0 without it. G. Hinton, "A Practical Guide to Training
        Restricted Boltzmann Machines", 2010, section 8.
    """
    p = np.clip(np.full(visible, 0.5) if mean is None else mean, 0.01, 0.99)
    return {
        "weights": 0.01 * jax.random.normal(key, (visible, hidden), jnp.float32),
        "visible": jnp.asarray(np.log(p / (1 - p)), jnp.float32),
        "hidden": jnp.zeros(hidden, jnp.float32),
    }


def _hidden_input(params: Params, v: jax.Array) -> jax.Array:
    return v @ params["weights"] + params["hidden"][None]  # (B, H)


def hidden(params: Params, v: jax.Array) -> jax.Array:
    """p(h = 1 | v): (B, V) -> (B, H)."""
    return nn.sigmoid(_hidden_input(params, v))


def visible(params: Params, h: jax.Array) -> jax.Array:
    """p(v = 1 | h): (B, H) -> (B, V)."""
    return nn.sigmoid(h @ params["weights"].T + params["visible"][None])


def free_energy(params: Params, v: jax.Array) -> jax.Array:
    """F(v): (B, V) -> (B,); p(v) = exp(-F(v)) / Z."""
    return -v @ params["visible"] - nn.softplus(_hidden_input(params, v)).sum(-1)


# ---- Contrastive divergence --------------------------------------------------------------------

Uniforms = dict[str, jax.Array]


def uniforms(key: jax.Array, k: int, batch: int, params: Params) -> Uniforms:
    """Random numbers of k steps: {"uniform_hidden": (B, k, H), "uniform_visible": (B, k, V)}."""
    V, H = params["weights"].shape
    a, b = jax.random.split(key)
    dtype = params["weights"].dtype
    return {
        "uniform_hidden": jax.random.uniform(a, (batch, k, H), dtype),
        "uniform_visible": jax.random.uniform(b, (batch, k, V), dtype),
    }


def gibbs(params: Params, v: jax.Array, u: Uniforms) -> tuple[jax.Array, jax.Array]:
    """k steps v -> h -> v, each unit on where its uniform number is below its probability.

    Args:
      params: of the machine.
      v: (B, V), where the chains start.
      u: `uniforms`.

    Returns:
      v after k steps, and the probabilities that it was drawn from, both (B, V).
    """

    def on(u: jax.Array, p: jax.Array) -> jax.Array:
        return (u < p).astype(v.dtype)

    def step(v_p: tuple[jax.Array, jax.Array], u: tuple[jax.Array, jax.Array]) -> Any:
        h = on(u[0], hidden(params, v_p[0]))
        p = visible(params, h)
        return (on(u[1], p), p), None

    numbers = u["uniform_hidden"].swapaxes(0, 1), u["uniform_visible"].swapaxes(0, 1)
    (v, p), _ = jax.lax.scan(step, (v, v), numbers)
    return v, p


def gradient(params: Params, v: jax.Array, vk: jax.Array) -> Params:
    """Of mean F(v) - mean F(vk), by hand: with p = p(h = 1 | v)

        dF/dW = - v^T p,    dF/db = - v,    dF/dc = - p.

    Args:
      params: of the machine.
      v: (B, V), the data.
      vk: (B', V), samples of the machine.
    """
    p, pk = hidden(params, v), hidden(params, vk)
    return {
        "weights": vk.T @ pk / len(vk) - v.T @ p / len(v),
        "visible": vk.mean(0) - v.mean(0),
        "hidden": pk.mean(0) - p.mean(0),
    }


def contrastive_divergence(params: Params, v: jax.Array, u: Uniforms) -> Params:
    """The CD-k gradient, to descend: (B, V) data and `uniforms` -> as `params`."""
    return gradient(params, v, gibbs(params, v, u)[0])


def divergence(
    k: int = 1, *, persistent: bool = False
) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """CD-k or persistent CD-k as a loss for `dlx.make_step`.

    The loss is mean F(v) - mean F(vk), whose gradient, vk held fixed, is `gradient`; it is
    no measure of progress. Without persistence the metric "reconstruction" goes with it: the mean
    squared difference between the data and the probabilities that vk was drawn from.

    Args:
      k: Gibbs steps an update.
      persistent: the chains go on from the last update, in ``model_state["chains"]`` (B, V): start
        with ``dlx.train_state(key, {"params": init(...), "chains": v}, tx)``.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {"visible": (B, ...) in [0, 1]}, flattened
      to (B, V), which may bring its own `uniforms`; otherwise they are drawn from the key.

    Raises:
      BadInput: k is below 1.
    """
    if k < 1:
        raise BadInput(f"k is {k}: give 1 Gibbs step or more")

    def loss_fn(params, model_state, batch, key):
        v = batch["visible"].reshape(len(batch["visible"]), -1)  # (B, V)
        start = model_state["chains"] if persistent else v
        u = batch if "uniform_hidden" in batch else uniforms(key, k, len(start), params)
        vk, p = jax.lax.stop_gradient(gibbs(params, start, u))  # (B, V)
        loss = free_energy(params, v).mean() - free_energy(params, vk).mean()
        if persistent:
            return loss, ({"chains": vk}, {})
        return loss, (model_state, {"reconstruction": ((v - p) ** 2).mean()})

    return loss_fn
