"""DLinear on ETTh1, seven hourly series of a transformer, 96 hours ahead; a GRU on the same.

Paper     Zeng, Chen, Zhang, Xu, "Are Transformers Effective for Time Series Forecasting?",
          arXiv 2205.13504
Command   python -m experiments.etth1_dlinear
          python -m experiments.etth1_dlinear --preset gru
Hardware  2 CPU cores
Expected  test MSE 0.3750 over five seeds (the paper: 0.375); the GRU 0.3944, behind a linear
          map by least squares, 0.3702
"""

import dataclasses
import functools
from typing import Any, Literal

import numpy as np
import optax

import dlx
from dlx.data import series
from dlx.errors import check_ranges
from dlx.models import forecast, rnn
from dlx.tasks import classical, forecasting

CARD = {
    "system": "DLinear",
    "paper": "Zeng, Chen, Zhang, Xu 2022",
    "data": "ETTh1, 12 / 4 / 4 months by the hour, 336 to 96 hours, standardised",
    "metric": "test/mse",
    "unit": "variance",
    "higher_is_better": False,
    "target": 0.380,
    "bar": {"metric": "test/mse_linear", "source": "one linear map by least squares"},
    "also": {
        "mean absolute error": "test/mae",
        "a day before": "test/mse_day",
        "AR(24)": "test/mse_ar",
        "one hour": "test/mse_1",
        "one hour, AR(24)": "test/mse_1_ar",
    },
    "reported": {"value": 0.375, "source": "table 2", "status": "memory"},
    "time": "5 min",
    "presets": {
        "gru": {"system": "GRU and autoregression", "reported": None, "time": "30 min"},
    },
    "notes": "Every one of the 2,785 test windows counts; the published code leaves out the last "
    "batch.",
}
SERIES = 7


@dataclasses.dataclass(frozen=True)
class Config:
    """DLinear, or a GRU, on ETTh1."""

    model: Literal["dlinear", "gru"] = "dlinear"  # the network
    look_back: int = 336  # hours of a window
    horizon: int = 96  # hours ahead
    kernel: int = 25  # DLinear: hours of the moving average
    units: int = 64  # the GRU's
    dropout: float = 0.3  # the GRU's: rate of what the head takes in
    batch_size: int = 32  # windows a step
    learning_rate: float = 5e-3  # of Adam; halved after every epoch
    epoch: int = 256  # steps between halvings; an epoch has 256
    run: dlx.Run = dlx.Run(
        steps=2560, log_every=64, eval_every=256, save_every=256, best=("validation/mse", "min")
    )

    def __post_init__(self):
        names = ("look_back", "horizon", "kernel", "units", "batch_size", "learning_rate", "epoch")
        check_ranges(self, positive=names, share=("dropout",))


PRESETS = {
    "laptop": Config(),
    "paper": Config(),
    "gru": Config("gru", learning_rate=1e-3, epoch=512),
    "test": Config(
        look_back=24, horizon=6, kernel=5, batch_size=16, epoch=20,
        run=dlx.Run(steps=60, log_every=10, eval_every=20, save_every=20,
                    best=("validation/mse", "min")),
    ),
}  # fmt: skip


def task_of(config: Config, learn: str = "train") -> forecasting.Task:
    return forecasting.Task(
        functools.partial(series.load, "ett"),
        columns=SERIES,
        look_back=config.look_back,
        horizon=config.horizon,
        learn=learn,
        standard=True,
    )


def build(config: Config) -> dlx.Experiment:
    if config.model == "dlinear":
        model: Any = forecast.DLinear(config.horizon, config.kernel)
        loss, predict = forecast.squared(model), lambda mean: (mean, None)
    else:
        encoder = rnn.RNN(config.units, cell="gru")
        model = forecast.Forecaster(encoder, config.horizon, SERIES, config.dropout)
        loss, predict = forecast.gaussian(model), lambda out: out
    schedule = optax.exponential_decay(config.learning_rate, config.epoch, 0.5, staircase=True)
    return forecasting.experiment(
        model,
        optax.adam(schedule),
        loss,
        predict,
        task_of(config),
        batch_size=config.batch_size,
        seed=config.run.seed,
        rows=functools.partial(rows, dataclasses.replace(config, run=dlx.Run())),
    )


@functools.cache
def rows(config: Config) -> dict[str, np.ndarray]:
    """The classical forecasts of the test part; all learn from the training months alone, as the
    network does."""
    task = task_of(config)
    found = task.load()
    (_, end), part = found.part("train"), found.part("test")
    values = series.encode(found.values, task.scale()).astype(float)
    learn, test = task.windows("train"), task.windows("test")
    return {
        "day": classical.seasonal_naive(values, 24, part, config.horizon),
        "ar": classical.autoregression(values, range(1, 25), end, part, config.horizon)[0],
        "linear": classical.linear(learn, test, 1e-3),
    }


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
