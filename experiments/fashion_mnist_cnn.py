"""A small CNN, below 100,000 parameters, on Fashion-MNIST.

Paper     Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine
          Learning Algorithms", arXiv 1708.07747
Command   python -m experiments.fashion_mnist_cnn
Hardware  2 CPU cores
Expected  test accuracy 93.49 % over three seeds
"""

import dataclasses
import functools
from typing import Any

import jax
import optax

import dlx
from dlx.data import images, mnist
from dlx.errors import check_ranges
from dlx.models import cnn
from dlx.tasks import classifier

CARD = {
    "system": "CNN",
    "paper": "Xiao, Rasul, Vollgraf 2017",
    "data": "Fashion-MNIST, 55,000 / 5,000 / 10,000 images",
    "metric": "test/accuracy",
    "unit": "%",
    "higher_is_better": True,
    "target": 93.2,
    "bar": {"value": 92.5, "source": "2 convolutions, < 100 K parameters; the data set's README"},
    "reported": None,
    "time": "35 min",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A small CNN on Fashion-MNIST."""

    channels: tuple[int, ...] = (32, 64, 64, 64)  # of each 3 x 3 convolution
    pool: tuple[bool, ...] = (True, True, False, True)  # whether a 2 x 2 maximum follows it
    dropout: float = 0.2  # rate before the classifier
    batch_size: int = 128  # examples a step
    learning_rate: float = 4e-3  # peak of a warm-up and cosine schedule
    weight_decay: float = 0.05  # AdamW's
    label_smoothing: float = 0.05  # share of the target spread over all classes
    shift: int = 2  # augmentation: pixels, beside mirroring
    ema: float = 0.999  # decay of the averaged parameters that are evaluated
    run: dlx.Run = dlx.Run(steps=430 * 30, log_every=86, eval_every=430 * 3, save_every=430 * 3)

    def __post_init__(self):
        if len(self.channels) != len(self.pool):
            raise dlx.BadInput(
                f"channels has {len(self.channels)} layers and pool {len(self.pool)}: give one "
                "value a layer"
            )
        if min(self.channels, default=0) < 1:
            raise dlx.BadInput(f"channels is {self.channels}: each layer needs 1 or more")
        if sum(self.pool) > 4:
            raise dlx.BadInput(f"pool {self.pool} leaves nothing of 28 x 28 pixels: take 4 or less")
        check_ranges(
            self,
            positive=("learning_rate", "batch_size"),
            not_negative=("weight_decay", "shift"),
            share=("dropout", "label_smoothing", "ema"),
        )


PRESETS = {
    "laptop": Config(),
    "paper": Config((32, 64), (True, True), dropout=0.4, shift=0),
    "test": Config(
        (4, 8), (True, True), batch_size=32, ema=0.9,
        run=dlx.Run(steps=60, log_every=10, eval_every=20, save_every=20),
    ),
}  # fmt: skip


def build(config: Config) -> dlx.Experiment:
    steps = config.run.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 20, steps)
    model: Any = cnn.SmallCNN(config.channels, config.pool, mnist.CLASSES, config.dropout)

    def augment(key, image):
        mirrored, moved = jax.random.split(key)
        return images.crop(moved, images.flip(mirrored, image), config.shift)

    return classifier.experiment(
        model,
        optax.adamw(schedule, weight_decay=config.weight_decay),
        functools.partial(mnist.load, "fashion_mnist"),
        shape=(28, 28, 1),
        names=mnist.FASHION_NAMES,
        batch_size=config.batch_size,
        seed=config.run.seed,
        prepare=images.normalise,  # 0 stays 0, the background that a shift brings in
        augment=augment,
        label_smoothing=config.label_smoothing,
        ema=config.ema,
    )


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
