"""ResNet-20, 0.27 M parameters, on Fashion-MNIST.

Paper     He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
          section 4.2
Command   python -m experiments.fashion_mnist_resnet
Hardware  2 CPU cores
Expected  test accuracy 94.34 % (seed 0) by the mean over an image and its mirror image, 94.29 % by
          the image alone; the goal is 94.5 %
"""

import dataclasses
import functools
from typing import Any

import jax
import optax

import dlx
from dlx.data import images, mnist
from dlx.errors import check_ranges
from dlx.models import resnet
from dlx.tasks import classifier

CARD = {
    "system": "ResNet-20",
    "paper": "He, Zhang, Ren, Sun 2015",
    "data": "Fashion-MNIST, 55,000 / 5,000 / 10,000 images; evaluated with the mirrored image",
    "metric": "test/accuracy",
    "unit": "%",
    "higher_is_better": True,
    "target": 94.5,
    "bar": {"value": 94.9, "source": "ResNet-18, 11 M parameters; the data set's README"},
    "reported": None,  # the paper has no figure on this data
    "time": "1 h",
    "notes": "At least 94.0 was asked for, 94.5 the goal. What it sees while it trains it knows no "
    "better (95.1 % of the distorted training images, 94.90 of the validation images), so it is "
    "small rather than overfitted. Ideas, on the validation images alone: logits added for the "
    "mirrored image 95.04 %, which is how it is evaluated now; for four shifts by a pixel as well "
    "95.08 %. The test images were read twice: by the image alone, which came first, it was "
    "94.29 %. Resumed several times, while layers' gradients were made faster; the last 430 steps "
    "again to evaluate anew. The seconds hold pauses and other work.",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A CIFAR ResNet on Fashion-MNIST."""

    depth: int = 20  # layers, 6 n + 2
    batch_size: int = 128  # examples a step
    learning_rate: float = 0.2  # peak of a one-cycle schedule
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 5e-4  # L2, of every parameter
    label_smoothing: float = 0.05  # share of the target spread over all classes
    shift: int = 2  # augmentation: pixels, beside mirroring
    cutout: int = 8  # augmentation: side of the square set to zero; 0: none
    ema: float = 0.998  # decay of the averaged parameters that are evaluated
    mirrored: bool = True  # evaluated together with the mirrored image, their logits averaged
    run: dlx.Run = dlx.Run(steps=430 * 30, log_every=43, eval_every=430 * 3, save_every=430)

    def __post_init__(self):
        resnet.CifarResNet(self.depth)
        check_ranges(
            self,
            positive=("learning_rate", "batch_size"),
            not_negative=("weight_decay", "shift", "cutout"),
            share=("momentum", "label_smoothing", "ema"),
        )


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        learning_rate=0.1, weight_decay=1e-4, label_smoothing=0.0, cutout=0, mirrored=False,
        run=dlx.Run(steps=64_000, log_every=100, eval_every=4_000, save_every=1_000),
    ),
    "test": Config(
        depth=8, batch_size=16, ema=0.9,
        run=dlx.Run(steps=24, log_every=4, eval_every=8, save_every=8),
    ),
}  # fmt: skip


def build(config: Config) -> dlx.Experiment:
    schedule = optax.cosine_onecycle_schedule(config.run.steps, config.learning_rate, 0.2)
    model: Any = resnet.CifarResNet(config.depth, mnist.CLASSES)

    def augment(key, image):
        mirrored, moved, hidden = jax.random.split(key, 3)
        image = images.crop(moved, images.flip(mirrored, image), config.shift)
        return images.cutout(hidden, image, config.cutout) if config.cutout else image

    return classifier.experiment(
        model,
        optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, config.momentum, nesterov=True),
        ),
        functools.partial(mnist.load, "fashion_mnist"),
        shape=(28, 28, 1),
        names=mnist.FASHION_NAMES,
        batch_size=config.batch_size,
        seed=config.run.seed,
        prepare=images.normalise,  # 0 stays 0, the background that a shift brings in
        augment=augment,
        label_smoothing=config.label_smoothing,
        ema=config.ema,
        mirrored=config.mirrored,
    )


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
