"""Loss functions for `dlx.make_step` that several models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Variables = Any


def classification(
    module: Any,
    *,
    inputs: str = "image",
    label_smoothing: float = 0.0,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Cross-entropy of a linen classifier, as a loss_fn.

    Args:
      module: (inputs, train) -> logits (B, C), with dropout and batch statistics as it likes.
      inputs: their name in the batch.
      label_smoothing: e in [0, 1): targets are (1 - e) one-hot + e / C.
      augment: (key, inputs) -> inputs, within the compiled step.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {inputs: (B, ...), "label": (B,)}; its
      metric is the accuracy on the (augmented) batch.
    """

    def loss_fn(params, model_state, batch, key):
        dropout, augmentation = jax.random.split(key)
        x, label = batch[inputs], batch["label"]
        if augment is not None:
            x = augment(augmentation, x)
        logits, model_state = module.apply(
            {"params": params, **model_state},
            x,
            train=True,
            rngs={"dropout": dropout},
            mutable=list(model_state),
        )  # (B, C)
        if logits.dtype != jnp.float64:
            logits = logits.astype(jnp.float32)  # a bfloat16 network's loss is summed in float32
        target = jax.nn.one_hot(label, logits.shape[-1], dtype=logits.dtype)
        target = optax.smooth_labels(target, label_smoothing)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        hit = (logits.argmax(-1).astype(label.dtype) == label).astype(jnp.float32)
        return loss, (model_state, {"accuracy": hit.mean()})

    return loss_fn


def language(module: Any) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Mean over all tokens of -log p(target | tokens up to it), in nats.

    Args:
      module: (tokens, train) -> logits (B, T, V), with dropout as it likes.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {"tokens": (B, T), "targets": (B, T)} of
      integers below V.
    """

    def loss_fn(params, model_state, batch, key):
        logits, model_state = module.apply(
            {"params": params, **model_state},
            batch["tokens"],
            train=True,
            rngs={"dropout": key},
            mutable=list(model_state),
        )  # (B, T, V)
        if logits.dtype != jnp.float64:
            logits = logits.astype(jnp.float32)  # a bfloat16 network's loss is summed in float32
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return loss.mean(), (model_state, {})

    return loss_fn
