"""Generative adversarial networks: DCGAN.

I. Goodfellow et al., "Generative Adversarial Networks", arXiv 1406.2661: a generator G makes images
of noise z, a discriminator D tells them from real ones, D(x) = sigmoid(logit), and

    D ascends  E[ln D(x)] + E[ln (1 - D(G(z)))]                            (algorithm 1)
    G ascends  E[ln D(G(z))]        (section 3: the non-saturating form, strong gradients early on)

in turn. A. Radford, L. Metz, S. Chintala, "Unsupervised Representation Learning with Deep
Convolutional Generative Adversarial Networks", arXiv 1511.06434 (section 3 and figure 1): strided
and transposed convolutions in place of pooling, batch normalisation everywhere but at the
generator's output and the discriminator's input, ReLU in the generator, leaky ReLU in the
discriminator, weights drawn from N(0, 0.02^2).

The convolutions are 4 x 4 instead of the paper's 5 x 5, so that every output is touched by as
many places of the kernel. Without normalisation the discriminator is a critic for WGAN-GP
(I. Gulrajani et al., arXiv 1704.00028, section 4: "no critic batch normalization").

A step trains both in turn, each by a step of `dlx.make_step`; the images are made once for both:

    fake, generate = gan.generate(generator, g.model_state, g.params, noise)
    d, d_metrics = d_step(d, {"image": image, "fake": fake})
    g, g_metrics = g_step(g, {"noise": noise}, generate=generate, judge=d.variables)

Symbols: B batch, Z latents, H and W height and width, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from dlx import nn
from dlx.errors import BadInput

init = nn.initializers.normal(0.02)


def scale_init(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
    """N(1, 0.02^2), of a normalisation's scale."""
    return 1 + init(key, shape, dtype)


class Generator(nn.Module):
    """A linear layer to a small image, then as many transposed convolutions as there are channels,
    each of which doubles it.

    Attributes:
      size: height and width of the images: a multiple of 2 ** len(channels).
      channels: of the small image and of what each convolution but the last makes of it.
      out: channels of the images.
      dtype: of the computation; parameters are float32 in any case.
    """

    size: int = 28
    channels: tuple[int, ...] = (128, 64)
    out: int = 1
    dtype: Any = None

    def __post_init__(self):
        if self.size % 2 ** len(self.channels):
            raise BadInput(f"size {self.size} cannot be halved {len(self.channels)} times")
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, Z) -> images (B, size, size, out) in (-1, 1)."""
        norm = partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype,
                       scale_init=scale_init)  # fmt: skip
        up = partial(nn.ConvTranspose, kernel_init=init, dtype=self.dtype)
        small = self.size >> len(self.channels)
        x = z.reshape(z.shape[0], 1, 1, -1)  # (B, 1, 1, Z)
        x = up(self.channels[0], (small, small), padding="VALID", use_bias=False, name="conv0")(x)
        x = nn.relu(norm(name="norm0")(x))  # (B, small, small, channels)
        for i, width in enumerate(self.channels[1:], 1):  # (B, 2^i small, 2^i small, width)
            x = up(width, (4, 4), (2, 2), use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(norm(name=f"norm{i}")(x))
        x = up(self.out, (4, 4), (2, 2), name=f"conv{len(self.channels)}")(x)  # (B, H, W, out)
        return nn.tanh(x)


class Discriminator(nn.Module):
    """The generator turned round: strided convolutions and a linear layer.

    Attributes:
      channels: of each convolution; each halves the image.
      norm: whether all but the first are normalised over the batch; False for a critic whose
        gradient at each single image is penalised (WGAN-GP).
      dtype: of the computation; parameters are float32 in any case.
    """

    channels: tuple[int, ...] = (64, 128)
    norm: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, H, W, C) -> logits (B,)."""
        for i, width in enumerate(self.channels, 1):  # (B, H / 2^i, W / 2^i, width)
            norm = self.norm and i > 1
            x = nn.Conv(width, (4, 4), (2, 2), use_bias=not norm, kernel_init=init,
                        dtype=self.dtype, name=f"conv{i}")(x)  # fmt: skip
            if norm:
                x = nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype, scale_init=scale_init,
                                 name=f"norm{i}")(x)  # fmt: skip
            x = nn.leaky_relu(x, 0.2)
        x = x.reshape(x.shape[0], -1)  # (B, H W C)
        x = nn.Dense(1, kernel_init=init, dtype=self.dtype, name="head")(x)  # (B, 1)
        return x[:, 0]


def train(module: Any, variables: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """module(x) in training mode, and the new batch statistics."""
    state = [name for name in variables if name != "params"]
    return module.apply(variables, x, train=True, mutable=state)


Generate = Callable[[Any], tuple[jax.Array, Any]]


def generate(
    generator: Any, model_state: Any, params: Any, noise: jax.Array
) -> tuple[jax.Array, Generate]:
    """Noise (B, Z) -> images (B, H, W, C) in training mode, to be constants for the discriminator;
    and the function of the parameters that made them, for the generator's loss.

    The function makes nothing anew: its value is these images and statistics, its gradient
    theirs. (XLA does not see that two passes with the same noise are one: the discriminator is
    trained in between.)
    """

    def make(params: Any) -> tuple[jax.Array, Any]:
        return train(generator, {"params": params, **model_state}, noise)

    fake, pull, statistics = jax.vjp(make, params, has_aux=True)

    @jax.custom_vjp
    def made(params: Any) -> tuple[jax.Array, Any]:
        return fake, statistics

    made.defvjp(lambda params: (made(params), None), lambda _, slopes: pull(slopes[0]))
    return fake, made


def discriminator_loss(discriminator: nn.Module) -> Callable[..., Any]:
    """The discriminator's loss_fn, of a batch {"image", "fake"}, both (B, H, W, C) in (-1, 1):

        - mean of ln D(image) - mean of ln (1 - D(fake)),   with - ln D = softplus(- logit)

    Either is normalised over its own batch. The metrics are the means of D.
    """

    def loss_fn(params, model_state, batch, key):
        real, model_state = train(discriminator, {"params": params, **model_state}, batch["image"])
        fake, model_state = train(discriminator, {"params": params, **model_state}, batch["fake"])
        loss = nn.softplus(-real).mean() + nn.softplus(fake).mean()
        metrics = {"real": nn.sigmoid(real).mean(), "fake": nn.sigmoid(fake).mean()}
        return loss, (model_state, metrics)

    return loss_fn


def generator_loss(discriminator: nn.Module) -> Callable[..., Any]:
    """The generator's loss_fn, - mean of ln D(G(z)), the non-saturating one.

    Its constants are `generate`, of the function of that name (so that no part of the batch can be
    left out: no accumulation), and `judge`, the discriminator's variables, which do not change.
    """

    def loss_fn(params, model_state, batch, key, *, generate: Generate, judge: Any):
        fake, model_state = generate(params)
        logits, _ = train(discriminator, judge, fake)
        return nn.softplus(-logits).mean(), (model_state, {})

    return loss_fn


def sample(generator: Any, variables: Any, noise: jax.Array) -> jax.Array:
    """Noise (n, Z) -> images (n, H, W, C) in (-1, 1), normalised by the running statistics."""
    return generator.apply(variables, noise)
