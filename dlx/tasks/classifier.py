"""The Experiment of an image classifier: what a dozen experiments would write alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from dlx import metrics, pictures
from dlx.data import arrays
from dlx.experiment import Experiment
from dlx.nn import losses
from dlx.step import make_step, train_state


def experiment(
    model: Any,
    tx: optax.GradientTransformation,
    load: Callable[[], Mapping[str, Mapping[str, np.ndarray]]],
    *,
    shape: tuple[int, int, int],
    names: Sequence[str],
    batch_size: int,
    seed: int,
    prepare: Callable[[jax.Array], jax.Array] | None = None,
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    label_smoothing: float = 0.0,
    ema: float | None = None,
    mirrored: bool = False,
    train: str = "train",
    eval_batch: int = 500,
) -> Experiment:
    """Cross-entropy on shuffled images; accuracy and loss on validation and test images.

    Args:
      model: a linen module, (images (B, H, W, C), train) -> logits (B, classes).
      tx: optimizer.
      load: opens {"train", "validation", "test"}: {"image": (N, H, W, C), "label": (N,)}; called
        when data is first needed.
      shape: (H, W, C) of an image.
      names: of the classes.
      batch_size: images a step.
      seed: of the order of the images.
      prepare: images as they are stored -> the model's input, in training and evaluation.
      augment: (key, prepared images) -> images, in training only.
      label_smoothing: share of the target that is spread over all classes.
      ema: decay of averaged parameters, which are then the ones that are evaluated.
      mirrored: what is evaluated, and what predicts, is the mean of the logits for an image and for
        it mirrored left to right.
      train: the split to train on. Where it holds the validation images, there is no evaluation.
      eval_batch: images an evaluation takes at once.
    """

    def ready(image: jax.Array) -> jax.Array:
        return image if prepare is None else prepare(image)

    def augmented(key: jax.Array, image: jax.Array) -> jax.Array:
        return ready(image) if augment is None else augment(key, ready(image))

    def part(name: str) -> Callable[[], Mapping[str, np.ndarray]]:
        return lambda: load()[name]

    def init(key: jax.Array, given: Any) -> Any:
        variables = model.init(key, np.zeros((1, *shape), np.float32))
        return train_state(key, variables, tx, ema=ema is not None)

    def predict(state: Any, image: jax.Array) -> jax.Array:
        image = ready(image)
        logits = model.apply(state.variables, image)
        if mirrored:
            logits = (logits + model.apply(state.variables, image[:, :, ::-1])) / 2
        return logits  # (B, classes)

    def measure(state: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        logits, label = predict(state, batch["image"]), batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return {"accuracy": metrics.correct(logits, label), "loss": loss}

    evals, shown = {}, {}
    if "validation" not in train:
        evals["validation"] = metrics.evaluator(measure, part("validation"), eval_batch)
        shown = pictures.classifier(predict, part("validation"), names)
    loss_fn = losses.classification(model, label_smoothing=label_smoothing, augment=augmented)
    return Experiment(
        init=init,
        step=make_step(loss_fn, tx, ema=ema),
        data=arrays.batches(part(train), batch_size, seed, len(names) or None),
        evals=evals,
        test=metrics.evaluator(measure, part("test"), eval_batch),
        pictures=shown,
        predict=predict,
    )
