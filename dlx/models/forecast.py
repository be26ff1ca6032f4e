"""Forecasting a series: linear, recurrent, and several of either as one.

A. Zeng, M. Chen, L. Zhang, Q. Xu, "Are Transformers Effective for Time Series Forecasting?",
arXiv 2205.13504, section 4.2: a moving average splits the window into trend and remainder, and one
matrix each carries them to all steps of the horizon,

    trend = mean of k neighbours,   y = W_t trend + b_t + W_r (x - trend) + b_r          (DLinear)

G. Lai, W.-C. Chang, Y. Yang, H. Liu, "Modeling Long- and Short-Term Temporal Patterns with Deep
Neural Networks", arXiv 1703.07015, sections 3.4 and 3.6: a recurrent network is slow to follow the
level of its input, so a linear autoregression runs beside it, and the forecast is their sum,

    h = the last output of the recurrent network over the window
    mean = A h + a + W x + w,   log scale = C h + c                                     (Forecaster)

The scale is ours: the forecast is a normal distribution, so that it has intervals. Left out: the
convolution and the skipping recurrence of section 3.

B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and Scalable Predictive Uncertainty Estimation
using Deep Ensembles", arXiv 1612.01474, section 2.4: networks that differ by their initial weights
alone, each trained by itself; the forecast has the mean and variance of their mixture  (Ensemble).

Symbols: B batch, L steps of the window, H of the horizon, D series, K known inputs beside them
(the calendar), M members.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlx import nn
from dlx.errors import BadInput, check_ranges


class Forecast(NamedTuple):
    """A normal distribution for each value: mean and the logarithm of its standard deviation,
    (B, H, D) each; of an ensemble before `mixture` (M, B, H, D)."""

    mean: jax.Array
    log_scale: jax.Array


class Forecaster(nn.Module):
    """A recurrent network and a linear one side by side.

    Attributes:
      encoder: (B, L, D + K) -> (outputs (B, L, units), anything): `dlx.models.rnn.RNN`, say.
      horizon: H.
      series: D, the first columns of the input; the others are known inputs.
      dropout: rate of what the head takes in.
      dtype: of the computation; parameters are float32 in any case.

    Raises:
      BadInput: no horizon or series, a rate outside of [0, 1), or an input with fewer columns.
    """

    encoder: nn.Module
    horizon: int
    series: int = 1
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        check_ranges(self, positive=("horizon", "series"), share=("dropout",))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> Forecast:
        """(B, L, D + K) -> the distribution of the H steps after the window."""
        B, H, D = len(x), self.horizon, self.series
        if x.shape[-1] < D:
            raise BadInput(f"a window has {x.shape[-1]} columns: it needs the {D} series at least")
        outputs, _ = self.encoder(x, train=train)  # (B, L, units)
        h = nn.Dropout(self.dropout, deterministic=not train, name="drop")(outputs[:, -1])
        deep = nn.Dense(2 * H * D, dtype=self.dtype, name="head")(h)  # (B, 2 H D)
        mean, log_scale = jnp.moveaxis(deep.reshape(B, 2, H, D), 1, 0)  # (B, H, D) each
        return Forecast(mean + across(x[..., :D], H, self.dtype, "linear"), log_scale)


class DLinear(nn.Module):
    """Trend and remainder, a matrix each, the same for all series.

    Attributes:
      horizon: H.
      kernel: k, steps of the moving average; odd.
      dtype: of the computation; parameters are float32 in any case.

    Raises:
      BadInput: no horizon, or a kernel that is not odd.
    """

    horizon: int
    kernel: int = 25
    dtype: Any = None

    def __post_init__(self):
        check_ranges(self, positive=("horizon", "kernel"))
        if self.kernel % 2 == 0:
            raise BadInput(f"kernel is {self.kernel}: give an odd number of steps")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, L, D) -> the H steps after the window, (B, H, D)."""
        slow = trend(x, self.kernel)  # (B, L, D)
        parts = (("trend", slow), ("remainder", x - slow))
        first, second = (across(part, self.horizon, self.dtype, name) for name, part in parts)
        return first + second  # (B, H, D)


class Ensemble(nn.Module):
    """M networks alike that differ by their initial weights.

    Attributes:
      member: one of them; the parameters of all stand in arrays with M rows.
      members: M.

    Raises:
      BadInput: no members.
    """

    member: nn.Module
    members: int

    def __post_init__(self):
        check_ranges(self, positive=("members",))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> Any:
        """What a member returns, with a first axis of M."""
        every = nn.vmap(
            lambda member, x: member(x, train=train),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]  # None is one for all
            axis_size=self.members,
        )
        return every(self.member, x)


def across(x: jax.Array, horizon: int, dtype: Any, name: str) -> jax.Array:
    """A matrix and a vector from the L steps to the H after them: (B, L, D) -> (B, H, D). As in
    the published code, they begin uniform within 1 / sqrt(L)."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

    def bias(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / x.shape[1] ** 0.5

    dense = nn.Dense(horizon, dtype=dtype, kernel_init=uniform, bias_init=bias, name=name)
    return dense(x.swapaxes(1, 2)).swapaxes(1, 2)


def with_linear(params: Any, weights: Any) -> Any:
    """Parameters of a `Forecaster`, or an ensemble of them, whose linear part is a given one.

    G. P. Zhang, "Time Series Forecasting Using a Hybrid ARIMA and Neural Network Model",
    Neurocomputing 2003, section 3: a linear model first; the network learns what it leaves.

    Args:
      params: as `init` makes them.
      weights: (L + 1, H), the last row is the vector w.
    """
    given = {"kernel": weights[:-1], "bias": weights[-1]}

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        if not is_linear(path):
            return leaf
        return jnp.broadcast_to(jnp.asarray(given[path[-1].key], leaf.dtype), leaf.shape)

    return jax.tree_util.tree_map_with_path(one, params)


def beside_linear(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer for all but the linear part of a `Forecaster`, which stays what it is."""

    def group(path: Any, leaf: Any) -> str:
        return "fixed" if is_linear(path) else "learns"

    return optax.multi_transform(
        {"fixed": optax.set_to_zero(), "learns": tx},
        lambda params: jax.tree_util.tree_map_with_path(group, params),
    )


def is_linear(path: Any) -> bool:
    """Whether a parameter's path (of jax.tree_util) is in the linear part of a `Forecaster`."""
    return len(path) > 1 and path[-2].key == "linear"


def trend(x: jax.Array, kernel: int) -> jax.Array:
    """Mean of the `kernel` steps around each; beyond the ends the first and last values stand:
    (B, L, D) -> (B, L, D)."""
    half = kernel // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (0, 0)), mode="edge")  # (B, L + k - 1, D)
    window = (1, kernel, 1)
    return jax.lax.reduce_window(padded, 0.0, jax.lax.add, window, (1, 1, 1), "VALID") / kernel


def mixture(forecast: Forecast) -> Forecast:
    """The normal distribution with mean and variance of the mixture of members, each as likely:

        mean = E[mean_m],   variance = E[scale_m^2 + mean_m^2] - mean^2         (section 2.4)

    (M, B, H, D) -> (B, H, D).
    """
    mean = forecast.mean.mean(0)
    spread = (forecast.mean - mean[None]) ** 2  # the same, and never negative
    variance = (jnp.exp(2 * forecast.log_scale) + spread).mean(0)
    return Forecast(mean, jnp.log(variance) / 2)


def gaussian(model: nn.Module) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Mean over all values (and members) of -log p(y) but for its constant,

        (y - mean)^2 / (2 scale^2) + log scale

    Each member has its own term alone, so an optimizer that works element by element trains each
    as if it were by itself, at M times its steps' rate of the loss.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {"x": (B, L, D + K), "y": (B, H, D)}.
    """

    def loss_fn(params, model_state, batch, key):
        out: Any = model.apply({"params": params}, batch["x"], train=True, rngs={"dropout": key})
        mean, log_scale = out  # ((M,) B, H, D) each
        y = jnp.broadcast_to(batch["y"], mean.shape)
        squared = (y - mean) ** 2
        loss = (squared * jnp.exp(-2 * log_scale) / 2 + log_scale).mean()
        return loss, (model_state, {"squared_error": squared.mean()})

    return loss_fn


def squared(model: nn.Module) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Mean over all values of (y - forecast)^2, of a model that gives (B, H, D).

    Returns:
      loss_fn as `gaussian`'s.
    """

    def loss_fn(params, model_state, batch, key):
        y: Any = model.apply({"params": params}, batch["x"], train=True, rngs={"dropout": key})
        return ((batch["y"] - y) ** 2).mean(), (model_state, {})

    return loss_fn
