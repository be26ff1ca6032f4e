"""ResNet-20 on CIFAR-10: thirty epochs of a one-cycle schedule, and the paper's 64,000 steps.

Paper     He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
          section 4.2 and table 6
Command   python -m experiments.cifar10_resnet
          python -m experiments.cifar10_resnet --preset paper    (the whole schedule, 50,000 images)
Hardware  2 CPU cores, about an hour where nothing else runs (400 images a second)
Expected  test error 8.98 % after thirty epochs (seed 0) by the mean over an image and its mirror
          image, 9.77 % by the image alone. The whole schedule has no record yet: 8.75 % in the
          paper, 8.27 % its best reproduction known, both by the image alone; its first steps
          are in experiments/results/unfinished
"""

import dataclasses
from typing import Any, Literal

import jax
import optax

import dlx
from dlx.data import cifar10, images
from dlx.errors import check_ranges
from dlx.models import resnet
from dlx.tasks import classifier

CARD = {
    "system": "ResNet-20",
    "paper": "He, Zhang, Ren, Sun 2015",
    "data": "CIFAR-10, 45,000 / 5,000 / 10,000 images, 30 epochs; evaluated with the "
    "mirrored image",
    "metric": "test/error",
    "unit": "%",
    "higher_is_better": False,
    "target": 9.5,
    "bar": {"value": 8.27, "source": "akamaster's pytorch_resnet_cifar10, 200 epochs, its README"},
    "reported": {"value": 8.75, "source": "table 6, 64,000 steps", "status": "second-hand"},
    "time": "1 h",
    "notes": "By the image alone the test error is 9.77 %, which misses the target; the paper's "
    "and the bar's are by the image alone. The test images were read twice: that figure came "
    "first, and the mirrored image after it, because with it 91.44 % of the validation images are "
    "right and 90.38 without. Resumed several times; trained at eb3e9c8 and before, the last 352 "
    "steps again to evaluate anew. The seconds hold pauses and other work.",
    "presets": {
        "paper": {
            "notes": "",
            "time": "5 h",
            "data": "CIFAR-10, 50,000 / 10,000 images, 64,000 steps, the last one tested",
            "target": 8.75,
        }
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A CIFAR ResNet on CIFAR-10."""

    depth: int = 20  # layers, 6 n + 2
    train: Literal["train", "train+validation"] = "train"  # images: 45,000, or all 50,000
    schedule: Literal["one-cycle", "steps"] = "one-cycle"  # steps: a tenth at 50 and at 75 %
    batch_size: int = 128  # examples a step
    learning_rate: float = 0.2  # the highest of the schedule
    momentum: float = 0.9  # of the gradient
    nesterov: bool = True  # momentum looks ahead
    weight_decay: float = 5e-4  # L2, of every parameter
    label_smoothing: float = 0.0  # share of the target spread over all classes
    pad: int = 4  # augmentation: a random crop of the padded image, beside mirroring
    mirrored: bool = True  # evaluated together with the mirrored image, their logits averaged
    run: dlx.Run = dlx.Run(steps=352 * 30, log_every=44, eval_every=352 * 3, save_every=352)

    def __post_init__(self):
        resnet.CifarResNet(self.depth)
        check_ranges(
            self,
            positive=("learning_rate", "batch_size"),
            not_negative=("weight_decay", "pad"),
            share=("momentum", "label_smoothing"),
        )


PRESETS = {
    "laptop": Config(),
    "paper": Config(
        train="train+validation", schedule="steps", learning_rate=0.1, nesterov=False,
        weight_decay=1e-4, mirrored=False,
        run=dlx.Run(steps=64_000, log_every=100, eval_every=4_000, save_every=500),
    ),
    "test": Config(
        depth=8, batch_size=16, run=dlx.Run(steps=24, log_every=4, eval_every=8, save_every=8)
    ),
}  # fmt: skip


def build(config: Config) -> dlx.Experiment:
    steps, rate = config.run.steps, config.learning_rate
    if config.schedule == "one-cycle":
        schedule = optax.cosine_onecycle_schedule(steps, rate, 0.2)
    else:
        schedule = optax.piecewise_constant_schedule(rate, {steps // 2: 0.1, steps * 3 // 4: 0.1})
    model: Any = resnet.CifarResNet(config.depth, cifar10.CLASSES)

    def prepare(image):
        return images.normalise(image, cifar10.MEAN, cifar10.STD)

    def augment(key, image):
        mirrored, moved = jax.random.split(key)
        return images.crop(moved, images.flip(mirrored, image), config.pad)

    return classifier.experiment(
        model,
        optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, config.momentum, config.nesterov),
        ),
        cifar10.load,
        shape=(32, 32, 3),
        names=cifar10.NAMES,
        batch_size=config.batch_size,
        seed=config.run.seed,
        prepare=prepare,
        augment=augment,
        label_smoothing=config.label_smoothing,
        mirrored=config.mirrored,
        train=config.train,
    )


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
