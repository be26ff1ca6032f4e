"""Variational autoencoders.

D. Kingma, M. Welling, "Auto-Encoding Variational Bayes", arXiv 1312.6114: an image x is made from
a latent z ~ N(0, I) by a decoder p(x | z), and an encoder q(z | x) = N(mu, diag(sigma^2)) stands
for the posterior that nobody can compute. Both are trained on a lower bound of ln p(x),

    L(x) = E_q[ln p(x | z)] - KL(q(z | x) || p(z))                        (equation 3)
    KL = 1/2 sum over j of (mu_j^2 + sigma_j^2 - 1 - ln sigma_j^2)        (appendix B)

whose expectation is estimated from z = mu + sigma * epsilon, epsilon ~ N(0, I), so that it can be
differentiated through z (section 2.4). Y. Burda, R. Grosse, R. Salakhutdinov, "Importance Weighted
Autoencoders", arXiv 1509.00519: with k samples the bound

    L_k(x) = E[ln 1/k sum over i of w_i],    w_i = p(x | z_i) p(z_i) / q(z_i | x)    (equation 8)

rises with k to ln p(x). Pixels are Bernoulli variables whose log odds the decoder gives.

`dense()` is the network of 1509.00519 with one stochastic layer (section 5), 784-200-200-50 with
tanh; `convolutional()` halves the image twice by strided convolutions and doubles it again by
transposed ones.

Symbols: B batch, D pixels, Z latents, k samples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlx import nn
from dlx.errors import BadInput

Gaussian = tuple[jax.Array, jax.Array]  # mean and logarithm of the variance


class DenseEncoder(nn.Module):
    """Tanh layers, then mean and log variance side by side."""

    hidden: tuple[int, ...] = (200, 200)
    latents: int = 50
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> Gaussian:
        """(B, ...) -> two of (B, Z)."""
        x = x.reshape(x.shape[0], -1)  # (B, D)
        for i, width in enumerate(self.hidden, 1):
            x = nn.tanh(nn.Dense(width, dtype=self.dtype, name=f"dense{i}")(x))  # (B, width)
        x = nn.Dense(2 * self.latents, dtype=self.dtype, name="head")(x)  # (B, 2 Z)
        return x[..., : self.latents], x[..., self.latents :]


class DenseDecoder(nn.Module):
    """Tanh layers and the logits of an image."""

    hidden: tuple[int, ...] = (200, 200)
    shape: tuple[int, ...] = (28, 28, 1)
    dtype: Any = None

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """(..., Z) -> (..., *shape)."""
        for i, width in enumerate(self.hidden, 1):
            z = nn.tanh(nn.Dense(width, dtype=self.dtype, name=f"dense{i}")(z))  # (..., width)
        z = nn.Dense(int(np.prod(self.shape)), dtype=self.dtype, name="head")(z)  # (..., D)
        return z.reshape(*z.shape[:-1], *self.shape)


class ConvEncoder(nn.Module):
    """4 x 4 convolutions with stride 2 and ReLU, then mean and log variance side by side."""

    channels: tuple[int, ...] = (32, 64)
    latents: int = 32
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> Gaussian:
        """(B, H, W, C) -> two of (B, Z)."""
        for i, width in enumerate(self.channels, 1):  # (B, H / 2^i, W / 2^i, width)
            x = nn.relu(nn.Conv(width, (4, 4), (2, 2), dtype=self.dtype, name=f"conv{i}")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(2 * self.latents, dtype=self.dtype, name="head")(x)  # (B, 2 Z)
        return x[..., : self.latents], x[..., self.latents :]


class ConvDecoder(nn.Module):
    """The encoder turned round: a linear layer, then transposed convolutions."""

    channels: tuple[int, ...] = (64, 32)
    shape: tuple[int, int, int] = (28, 28, 1)
    dtype: Any = None

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """(..., Z) -> (..., *shape)."""
        (H, W, C), n = self.shape, len(self.channels)
        small = H >> n, W >> n, self.channels[0]
        z = nn.relu(nn.Dense(int(np.prod(small)), dtype=self.dtype, name="dense")(z))
        x = z.reshape(*z.shape[:-1], *small)  # (..., H / 2^n, W / 2^n, channels)
        for i, width in enumerate((*self.channels[1:], C), 1):  # twice as high and wide
            up = nn.ConvTranspose(width, (4, 4), (2, 2), dtype=self.dtype, name=f"conv{i}")
            x = up(x) if i == n else nn.relu(up(x))
        return x


class VAE(nn.Module):
    """An encoder and a decoder, whichever.

    Attributes:
      encoder: x -> (mean, log variance) of q(z | x).
      decoder: z, with any leading dimensions -> logits of the pixels.
    """

    encoder: nn.Module
    decoder: nn.Module

    def __call__(self, x: jax.Array, noise: jax.Array) -> tuple[jax.Array, Gaussian]:
        """(B, H, W, C) and noise as of `reparameterise` -> logits of p(x | z), and q(z | x)."""
        q = self.encode(x)
        return self.decode(reparameterise(q, noise)), q

    def encode(self, x: jax.Array) -> Gaussian:
        """(B, H, W, C) -> mean and log variance of q(z | x), (B, Z) each."""
        return self.encoder(x)

    def decode(self, z: jax.Array) -> jax.Array:
        """(..., Z) -> logits (..., H, W, C)."""
        return self.decoder(z)


def dense(
    hidden: tuple[int, ...] = (200, 200), latents: int = 50, shape: tuple[int, ...] = (28, 28, 1)
) -> VAE:
    """784-200-200-50 and back: 1509.00519, section 5, one stochastic layer."""
    return VAE(DenseEncoder(hidden, latents), DenseDecoder(hidden[::-1], shape))


def convolutional(
    channels: tuple[int, ...] = (32, 64),
    latents: int = 32,
    shape: tuple[int, int, int] = (28, 28, 1),
) -> VAE:
    """Strided convolutions down, transposed ones up.

    Raises:
      BadInput: the image cannot be halved as often as there are channels.
    """
    if any(side % 2 ** len(channels) for side in shape[:2]):
        raise BadInput(f"an image of {shape} cannot be halved {len(channels)} times")
    return VAE(ConvEncoder(channels, latents), ConvDecoder(channels[::-1], shape))


def reparameterise(q: Gaussian, noise: jax.Array) -> jax.Array:
    """z = mu + sigma * epsilon: q two of (B, Z), epsilon ~ N(0, I) (B, Z) or (k, B, Z) -> as it."""
    mean, log_variance = (a.reshape((1,) * (noise.ndim - a.ndim) + a.shape) for a in q)
    return mean + jnp.exp(0.5 * log_variance) * noise


def log_likelihood(x: jax.Array, logits: jax.Array) -> jax.Array:
    """ln p(x | z) of pixels in [0, 1]: (B, H, W, C) and (..., B, H, W, C) -> (..., B)."""
    x = x.reshape((1,) * (logits.ndim - x.ndim) + x.shape)
    return (x * logits - nn.softplus(logits)).sum((-3, -2, -1))


def divergence(mean: jax.Array, log_variance: jax.Array) -> jax.Array:
    """KL(N(mean, variance) || N(0, I)): (B, Z) -> (B,)."""
    return 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(-1)


def elbo(x: jax.Array, logits: jax.Array, q: Gaussian) -> jax.Array:
    """L(x) by equation 3, the likelihood by its one sample, the divergence exactly: (B,)."""
    return log_likelihood(x, logits) - divergence(*q)


def importance_bound(x: jax.Array, logits: jax.Array, q: Gaussian, z: jax.Array) -> jax.Array:
    """L_k(x) by equation 8 of 1509.00519: logits (k, B, H, W, C), q two of (B, Z), z (k, B, Z) ->
    (B,). Its mean rises with k; with one sample it is L(x), both terms sampled."""
    mean, log_variance = (a[None] for a in q)
    # ln p(z) - ln q(z | x); what is 2 pi cancels
    ratio = 0.5 * ((z - mean) ** 2 * jnp.exp(-log_variance) + log_variance - z**2).sum(-1)
    return jax.nn.logsumexp(log_likelihood(x, logits) + ratio, 0) - np.log(len(z))


def loss(model: VAE, samples: int | None = None) -> Callable[..., Any]:
    """loss_fn for `dlx.make_step` of a batch {"image": (B, H, W, C) in [0, 1]}: the mean of
    - L(x), or of - L_k(x) with k = `samples`. The metric is the divergence, in nats too.

    The noise is the batch's, "noise" (B, Z) or (B, k, Z), where it has any.
    """

    def loss_fn(params, model_state, batch, key):
        x, network = batch["image"], model.bind({"params": params})
        q = network.encode(x)
        B, Z = q[0].shape
        shape = (B, Z) if samples is None else (B, samples, Z)
        noise = batch["noise"] if "noise" in batch else jax.random.normal(key, shape, x.dtype)
        noise = noise if samples is None else noise.swapaxes(0, 1)  # (k, B, Z)
        z = reparameterise(q, noise)
        logits = network.decode(z)
        bound = elbo(x, logits, q) if samples is None else importance_bound(x, logits, q, z)
        return -bound.mean(), (model_state, {"divergence": divergence(*q).mean()})

    return loss_fn


def sample(model: VAE, params: Any, noise: jax.Array) -> jax.Array:
    """Standard normal noise (n, Z) -> the pixels' probabilities (n, H, W, C)."""
    return nn.sigmoid(model.bind({"params": params}).decode(noise))
