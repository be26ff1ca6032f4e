"""WaveNet: sound, one sample after the other.

A. van den Oord, S. Dieleman, H. Zen, K. Simonyan et al., "WaveNet: A Generative Model for Raw
Audio", arXiv 1609.03499. The probability of a waveform is the product of those of its samples, each
given all before it (equation 1), and each a softmax over 256 values. Causal convolutions compute
them all at once; since their dilations double from layer to layer, the samples seen grow
exponentially with depth. In each layer

    z = tanh(W_f * x) . sigmoid(W_g * x)                                        (equation 2)

goes through 1 x 1 convolutions round the layer (residual) and straight to the output (skip).

T. Le Paine et al., "Fast Wavenet Generation Algorithm", arXiv 1611.09482: a new sample costs one
column of the network, when every layer keeps its past inputs in a queue.

The first layer, a causal convolution of width 2 over one-hot samples, is a look-up of its kernel.
Left out: local conditioning (section 2.5) and context stacks (section 2.6).

Symbols: B batch, T samples, Q values of a sample, C residual channels, S skip channels, k width of
the convolutions, d dilation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlx import nn
from dlx.errors import BadInput

# ---- Samples as 256 values (section 2.2) -------------------------------------------------------


def mu_law(audio: jax.Array, values: int = 256) -> jax.Array:
    """Amplitudes in [-1, 1] (beyond: clipped) -> int32 in [0, values), of the same shape.

        f(x) = sign(x) ln(1 + mu |x|) / ln(1 + mu),  mu = values - 1

    rounded to the nearest of `values` levels, so that quiet sounds get most of them.
    """
    mu = values - 1
    x = jnp.clip(audio, -1, 1)
    f = jnp.sign(x) * jnp.log1p(mu * jnp.abs(x)) / math.log1p(mu)
    return jnp.floor((f + 1) / 2 * mu + 0.5).astype(jnp.int32)


def mu_law_inverse(sample: jax.Array, values: int = 256) -> jax.Array:
    """Integers in [0, values) -> amplitudes in [-1, 1]; `mu_law` gives the integers again."""
    mu = values - 1
    f = 2 * sample.astype(jnp.result_type(float)) / mu - 1
    return jnp.sign(f) * jnp.expm1(jnp.abs(f) * math.log1p(mu)) / mu


def receptive_field(dilations: tuple[int, ...], width: int = 2) -> int:
    """Samples that a prediction sees: 1 + (k - 1) sum of d, and one by the first layer.

    >>> receptive_field((1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
    1025
    """
    return 2 + (width - 1) * sum(dilations)


# ---- The network (section 2.4, figure 4) -------------------------------------------------------


class Layer(nn.Module):
    """A gated dilated convolution; its result goes round the layer and to the output."""

    channels: int
    skip: int
    width: int
    dilation: int
    last: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array | None, t: jax.Array | int | None
    ) -> tuple[jax.Array, jax.Array]:
        """x (B, T, C), condition (B, D) -> (B, T, C) and skip (B, T, S); the last layer has only
        the latter, and gives x back.

        With a sample's number t, x is (B, 1, C), and the layer's past lies in its queue, a ring:
        the input of sample s at place s modulo the length.
        """
        dilation, padding, window = self.dilation, "CAUSAL", x
        if t is not None:
            (B, _, C), length = x.shape, (self.width - 1) * self.dilation
            queue = self.variable("cache", "queue", jnp.zeros, (length, B, C), x.dtype)
            places = (t + self.dilation * jnp.arange(self.width - 1)) % length  # the oldest first
            past = queue.value[places].swapaxes(0, 1)  # (B, k - 1, C)
            queue.value = queue.value.at[t % length].set(x[:, 0])
            dilation, padding, window = 1, "VALID", jnp.concatenate([past, x], 1)  # (B, k, C)
        y = nn.Conv(2 * self.channels, (self.width,), kernel_dilation=dilation, padding=padding,
                    dtype=self.dtype, name="gates")(window)  # (B, T, 2 C)  # fmt: skip
        if condition is not None:  # equation 3
            h = nn.Dense(2 * self.channels, use_bias=False, dtype=self.dtype, name="condition")
            y = y + h(condition)[:, None]
        filter, gate = jnp.split(y, 2, -1)
        z = nn.tanh(filter) * nn.sigmoid(gate)  # (B, T, C)
        if not self.last:
            x = x + nn.Dense(self.channels, dtype=self.dtype, name="residual")(z)  # (B, T, C)
        return x, nn.Dense(self.skip, dtype=self.dtype, name="skip")(z)


class WaveNet(nn.Module):
    """A look-up, gated layers, and two 1 x 1 convolutions on the sum of their skips.

    Attributes:
      channels: C, of the residual path and of the gates.
      skip: S, also of the first of the last two convolutions.
      dilations: of each layer; the paper repeats 1, 2, 4, ..., 512.
      width: k of the dilated convolutions.
      values: Q.
      dtype: of the computation; parameters are float32 in any case.

    Raises:
      BadInput: a width below 2, or dilations that are none.
    """

    channels: int = 64
    skip: int = 256
    dilations: tuple[int, ...] = tuple(2**i for i in range(10)) * 3
    width: int = 2
    values: int = 256
    dtype: Any = None

    def __post_init__(self):
        if self.width < 2:
            raise BadInput(f"width is {self.width}: give 2 or more, for 1 sees no past")
        if not self.dilations or min(self.dilations) < 1:
            raise BadInput(f"dilations are {self.dilations}: give 1 or more for each layer")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        condition: jax.Array | None = None,
        *,
        train: bool = False,
        t: jax.Array | int | None = None,
    ) -> jax.Array:
        """Logits (B, T, Q): those at t are for the sample t + 1, given all up to t.

        Args:
          sample: (B, T) integers in [0, Q).
          condition: (B, D), what holds for the whole of each waveform, a speaker's one-hot vector
            say; or None.
          train: without effect, for there is no dropout.
          t: None, or the number () of the one sample that is given, (B, 1); those before it, from
            0 on, lie in the collection "cache", which must be mutable.
        """
        table = nn.Embed(self.values, 2 * self.channels, dtype=self.dtype, name="causal")(sample)
        old, x = jnp.split(table, 2, -1)  # the kernel's rows for the sample before, and for this
        if t is None:
            old = jnp.pad(old, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        else:
            queue = self.variable("cache", "queue", jnp.zeros, old.shape, old.dtype)
            old, queue.value = queue.value, old
        x = x + old  # (B, T, C)
        skips = []
        for i, dilation in enumerate(self.dilations, 1):
            layer = Layer(self.channels, self.skip, self.width, dilation,
                          i == len(self.dilations), self.dtype, name=f"layer{i}")  # fmt: skip
            x, skip = layer(x, condition, t)
            skips.append(skip)
        y = nn.relu(sum(skips[1:], skips[0]))  # (B, T, S)
        y = nn.relu(nn.Dense(self.skip, dtype=self.dtype, name="head1")(y))
        return nn.Dense(self.values, dtype=self.dtype, name="head2")(y)  # (B, T, Q)


def likelihood(module: Any) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Mean negative log likelihood of a sample in nats: for `dlx.make_step`.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {"sample": (B, T + 1) integers in [0, Q),
      "condition": (B, D) or missing}: each but the first sample given all before it. Its metric is
      the same in bits.
    """

    def loss_fn(params, model_state, batch, key):
        sample = batch["sample"]
        logits = module.apply(
            {"params": params}, sample[:, :-1], batch.get("condition"), train=True
        )  # (B, T, Q)
        if logits.dtype != jnp.float64:
            logits = logits.astype(jnp.float32)  # a bfloat16 network's loss is summed in float32
        target = jax.nn.one_hot(sample[:, 1:], logits.shape[-1], dtype=logits.dtype)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        return loss, (model_state, {"bits": loss / math.log(2)})

    return loss_fn


def generate(
    module: Any,
    variables: Any,
    key: jax.Array,
    prompt: jax.Array,
    length: int,
    condition: jax.Array | None = None,
) -> jax.Array:
    """(B, P) samples, P at least 1, and `length` drawn after them: (B, P + length).

    The draw of sample t is made with ``fold_in(key, t)``.

    Raises:
      BadInput: the prompt is empty.
    """
    if prompt.shape[1] == 0:
        raise BadInput("prompt has no samples: give one at least, such as 128, which is silence")

    def one(carry: Any, t: jax.Array) -> Any:
        """Sample t in, sample t + 1 out: the prompt's, as long as it lasts."""
        cache, sample = carry
        logits, new = module.apply(
            {**variables, "cache": cache}, sample[:, None], condition, t=t, mutable=["cache"]
        )
        drawn = jax.random.categorical(jax.random.fold_in(key, t + 1), logits[:, 0])
        given = prompt[:, jnp.minimum(t + 1, prompt.shape[1] - 1)]
        sample = jnp.where(t + 1 < prompt.shape[1], given, drawn.astype(prompt.dtype))
        return (new["cache"], sample), sample

    def cached() -> Any:
        return module.apply(variables, prompt[:, :1], condition, t=0, mutable=["cache"])[1]["cache"]

    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(cached))
    steps = jnp.arange(prompt.shape[1] + length - 1)
    _, samples = jax.lax.scan(one, (cache, prompt[:, 0]), steps)  # (P + length - 1, B)
    return jnp.concatenate([prompt[:, :1], samples.T], 1)
