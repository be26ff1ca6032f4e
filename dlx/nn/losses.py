"""Loss functions for `dlx.make_step` that several models share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dlx.errors import BadInput

Variables = Any


def classification(
    module: Any,
    *,
    inputs: str = "image",
    label_smoothing: float = 0.0,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    mix: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Cross-entropy of a linen classifier, as a loss_fn.

    Args:
      module: (inputs, train) -> logits (B, C), with dropout and batch statistics as it likes.
      inputs: their name in the batch.
      label_smoothing: e in [0, 1): targets are (1 - e) one-hot + e / C.
      augment: (key, inputs) -> inputs, within the compiled step.
      mix: (key, inputs, targets (B, n)) -> both, each example with others of the batch, after it:
        ``functools.partial(images.mixup, alpha=0.2)``. The accuracy is that of the labels.

    Raises:
      BadInput: the labels are no integers (B,); those of (B, 1) would be broadcast silently.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {inputs: (B, ...), "label": (B,)}; its
      metric is the accuracy on the (augmented) batch.
    """

    def loss_fn(params, model_state, batch, key):
        dropout, augmentation = jax.random.split(key)
        x, label = batch[inputs], batch["label"]
        if label.shape != x.shape[:1] or not jnp.issubdtype(label.dtype, jnp.integer):
            found = f"{label.dtype} of shape {label.shape}"
            raise BadInput(f"label is {found}: give integers of shape ({x.shape[0]},)")
        if augment is not None:
            x = augment(augmentation, x)
        share = None
        if mix is not None:  # how much of every example is in each, whatever the classes are
            x, share = mix(jax.random.fold_in(augmentation, 1), x, jnp.eye(len(x), dtype=x.dtype))
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
        target = target if share is None else share.astype(target.dtype) @ target
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
