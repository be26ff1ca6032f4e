"""A multi-layer perceptron on MNIST, without augmentation.

Paper     Rumelhart, Hinton, Williams, "Learning representations by back-propagating errors", 1986;
          dropout by Srivastava et al., 2014
Command   python -m experiments.mnist_mlp
Hardware  2 CPU cores; the published record says which machine and how long
Expected  test error 1.3 %; the bar, a tanh network of 500 units without dropout, has 1.65 %
"""

import dataclasses
import functools
from typing import Any

import optax

import dlx
from dlx.data import images, mnist
from dlx.errors import check_ranges
from dlx.models import mlp
from dlx.tasks import classifier

CARD = {
    "system": "MLP",
    "paper": "Rumelhart, Hinton, Williams 1986",
    "data": "MNIST, 55,000 / 5,000 / 10,000 images",
    "metric": "test/error",
    "unit": "%",
    "higher_is_better": False,
    "target": 1.35,
    "bar": {"value": 1.65, "source": "MLP of the Theano tutorials, their text"},
    "reported": None,
    "time": "8 min",
    "notes": "The runs shared two cores with other work; alone a step takes 23 ms, a run 400 s.",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A multi-layer perceptron on MNIST."""

    features: tuple[int, ...] = (1024, 1024, 512)  # units of each hidden layer
    dropout: float = 0.4  # rate after each hidden layer
    batch_size: int = 128  # examples a step
    learning_rate: float = 1e-3  # peak of a warm-up and cosine schedule
    weight_decay: float = 0.01  # AdamW's
    label_smoothing: float = 0.1  # share of the target spread over all classes
    ema: float = 0.999  # decay of the averaged parameters that are evaluated
    run: dlx.Run = dlx.Run(steps=430 * 40, log_every=86, eval_every=430 * 4, save_every=430 * 4)

    def __post_init__(self):
        if min(self.features, default=0) < 1:
            raise dlx.BadInput(f"features is {self.features}: each layer needs 1 or more")
        check_ranges(
            self,
            positive=("learning_rate", "batch_size"),
            not_negative=("weight_decay",),
            share=("dropout", "label_smoothing", "ema"),
        )


PRESETS = {
    "laptop": Config(),
    "paper": Config((500,), dropout=0.0, label_smoothing=0.0),
    "test": Config(
        (32, 32), batch_size=64, ema=0.9,
        run=dlx.Run(steps=60, log_every=10, eval_every=20, save_every=20),
    ),
}  # fmt: skip


def build(config: Config) -> dlx.Experiment:
    steps = config.run.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 20, steps)
    model: Any = mlp.MLP(config.features, mnist.CLASSES, config.dropout)
    return classifier.experiment(
        model,
        optax.adamw(schedule, weight_decay=config.weight_decay),
        functools.partial(mnist.load, "mnist"),
        shape=(28, 28, 1),
        names="0123456789",
        batch_size=config.batch_size,
        seed=config.run.seed,
        prepare=functools.partial(images.normalise, mean=(0.1307,), std=(0.3081,)),
        label_smoothing=config.label_smoothing,
        ema=config.ema,
    )


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
