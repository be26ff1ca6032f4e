"""The standard way to make a training step: a pure loss function and an optax optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlx.errors import BadInput


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What one optimizer trains. Several of them make a GAN; `dlx.fit` takes any pytree.

    Attributes:
      step: () int32, updates done.
      params: pytree that the loss is differentiated by.
      model_state: pytree that the forward pass itself updates (batch statistics), or {}.
      opt_state: optax's.
      key: PRNG key; step number t draws from ``fold_in(key, t)``.
      ema: exponential moving average of `params`, or None.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    key: jax.Array
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """What a linen module's `apply` takes, with the averaged parameters where there are."""
        params = self.params if self.ema is None else self.ema
        return {"params": params, **self.model_state}


def train_state(
    key: jax.Array,
    variables: Any,
    tx: optax.GradientTransformation,
    *,
    ema: bool = False,
) -> TrainState:
    """A fresh TrainState from a linen module's variables (or ``{"params": ...}``).

    >>> s = train_state(jax.random.key(0), {"params": {"w": jnp.ones(3)}}, optax.sgd(0.1))
    >>> int(s.step), s.model_state
    (0, {})
    """
    model_state = {k: v for k, v in variables.items() if k != "params"}
    params = variables["params"]
    # A copy: two leaves of one state must never share a buffer, for the state is donated.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.int32(0), params, model_state, tx.init(params), key, average)


LossFn = Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema: float | None = None,
    compute_dtype: Any = None,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """step(state, batch, **consts) -> (state, metrics).

    Args:
      loss_fn: (params, model_state, batch, key, **consts) -> (loss, (model_state, metrics)). The
        loss is a mean. Metrics are scalars or (sum, weight). Where the mean is not over the
        examples of the batch (tokens, say), the metric "weight" tells over how many it is.
        `consts` are other networks: never differentiated, never split.
      tx: optimizer.
      accumulate: micro-batches a step; their gradients are averaged by weight, and `model_state`
        goes through them one after the other.
      clip_norm: the gradient is scaled down to this global norm where it is larger.
      ema: decay of the moving average of the parameters; needs ``train_state(..., ema=True)``.
      compute_dtype: floating parameters and inputs are cast to it (jnp.bfloat16) for the loss;
        parameters, gradients, optimizer and model state keep their own.

    Returns:
      A pure step; its metrics are loss, grad_norm (before clipping) and the loss function's own.

    Raises:
      BadInput: accumulate is below 1 or does not divide the batch, another option is out of range,
        or ema is given and the state holds no average.

    >>> def loss_fn(params, model_state, batch, key):
    ...     return jnp.mean((batch["x"] * params["w"] - batch["y"]) ** 2), (model_state, {})
    >>> tx = optax.sgd(0.1)
    >>> state = train_state(jax.random.key(0), {"params": {"w": jnp.zeros(())}}, tx)
    >>> batch = {"x": jnp.ones(4), "y": jnp.ones(4)}
    >>> state, metrics = jax.jit(make_step(loss_fn, tx))(state, batch)
    >>> float(state.params["w"]), float(metrics["loss"])
    (0.20000000298023224, 1.0)
    """
    if accumulate < 1:
        raise BadInput(f"accumulate is {accumulate}: give 1 (none) or more")
    if clip_norm is not None and not clip_norm > 0:
        raise BadInput(f"clip_norm is {clip_norm}: it must be positive, or None")
    if ema is not None and not 0 <= ema < 1:
        raise BadInput(f"ema is {ema}: it must be in [0, 1), or None")
    if compute_dtype is not None and not jnp.issubdtype(compute_dtype, jnp.floating):
        raise BadInput(f"compute_dtype is {compute_dtype}: it must be floating, like jnp.bfloat16")

    def loss(params, model_state, batch, key, consts):
        if compute_dtype is not None:
            params, batch = _cast(params, compute_dtype), _cast(batch, compute_dtype)
        value, (new, metrics) = loss_fn(params, model_state, batch, key, **consts)
        new = jax.tree.map(lambda a, old: a.astype(old.dtype), new, model_state)
        value, metrics = _wide(value), jax.tree.map(_wide, dict(metrics))
        if "weight" in metrics:
            w = metrics.pop("weight")
            metrics = {"loss": (value * w.astype(value.dtype), w), **metrics}
        else:
            examples = jax.tree.leaves(batch)[0].shape[0] if jax.tree.leaves(batch) else 1
            w = jnp.float32(examples)
            metrics = {"loss": value, **metrics}
        return value, (new, metrics, w)

    grad_fn = jax.grad(loss, has_aux=True)

    def gradient(state, batch, key, consts):
        """-> (gradient of the mean loss, model_state, metrics with the loss)."""
        if accumulate == 1:
            g, (new, metrics, _) = grad_fn(state.params, state.model_state, batch, key, consts)
            return g, new, metrics

        def one(model_state, i, part):
            """A micro-batch's (model_state, sums): what is a mean counts by its weight w."""
            g, (new, metrics, w) = grad_fn(
                state.params, model_state, part, jax.random.fold_in(key, i), consts
            )
            return new, (_times(g, w), _scalars(_times, metrics, w), w)

        def add(carry, item):
            model_state, sums = carry
            new, part = one(model_state, *item)
            return (new, jax.tree.map(jnp.add, sums, part)), None

        items = (jnp.arange(accumulate), jax.tree.map(lambda x: _split(x, accumulate), batch))
        _, shapes = jax.eval_shape(one, state.model_state, *jax.tree.map(lambda x: x[0], items))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (new, (g, metrics, w)), _ = jax.lax.scan(add, (state.model_state, zeros), items)
        return _over(g, w), new, _scalars(_over, metrics, w)

    def step(state: TrainState, batch: Any, **consts: Any) -> tuple[TrainState, dict[str, Any]]:
        key = jax.random.fold_in(state.key, state.step)
        g, model_state, metrics = gradient(state, batch, key, consts)
        metrics = {"grad_norm": optax.tree.norm(g), **metrics}
        if clip_norm is not None:
            g, _ = optax.clip_by_global_norm(clip_norm).update(g, optax.EmptyState())
        updates, opt_state = tx.update(g, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.ema
        if ema is not None:
            if state.ema is None:
                raise BadInput("ema needs an average to start from: train_state(..., ema=True)")
            average = optax.incremental_update(params, state.ema, 1 - ema)
        return TrainState(
            state.step + 1, params, model_state, opt_state, state.key, average
        ), metrics

    return step


def _times(tree: Any, w: jax.Array) -> Any:
    return jax.tree.map(lambda x: x * w.astype(x.dtype), tree)


def _over(tree: Any, w: jax.Array) -> Any:
    return jax.tree.map(lambda x: x / w.astype(x.dtype), tree)


def _scalars(f: Callable[..., Any], metrics: dict[str, Any], w: jax.Array) -> dict[str, Any]:
    """f on the metrics that are means; pairs are sums already."""
    return {k: v if isinstance(v, tuple) else f(v, w) for k, v in metrics.items()}


def _wide(x: Any) -> jax.Array:
    """At least float32: a sum over many steps in bfloat16 would lose most of its digits."""
    x = jnp.asarray(x)
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def _split(x: jax.Array, n: int) -> jax.Array:
    """(B, ...) -> (n, B / n, ...): row i goes to micro-batch i mod n, so that every device that
    holds a contiguous share of the batch keeps its own rows."""
    if x.shape[0] % n:
        raise BadInput(f"accumulate {n} does not divide the batch of {x.shape[0]}: change either")
    return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)
