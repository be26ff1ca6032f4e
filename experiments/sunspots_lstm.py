"""Small LSTMs on what autoregression leaves of the yearly sunspot numbers, 1700 to 1987.

Paper     Zhang, "Time Series Forecasting Using a Hybrid ARIMA and Neural Network Model", 2003
Command   python -m experiments.sunspots_lstm
          python -m experiments.sunspots_lstm --learn train      (validation on 1854 to 1920)
Hardware  2 CPU cores
Expected  MSE of one step 252.5 over five seeds on the 67 years from 1921 on. AR(9) has 305.2; AR(9)
          of the square roots, 230.8, is better still
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
    "system": "LSTM ensemble and autoregression",
    "paper": "Zhang 2003",
    "data": "yearly sunspots, 221 / 67 years, one step ahead",
    "metric": "test/mse_1",
    "unit": "squared number",
    "higher_is_better": False,
    "target": 280.0,
    "bar": {"metric": "test/mse_1_ar", "source": "AR(9) by least squares on the same split"},
    "also": {
        "AR(9) of square roots": "test/mse_1_ar_root",
        "ARIMA(2,0,1)": "test/mse_1_sarima",
        "linear": "test/mse_1_linear",
        "11 years before": "test/mse_1_naive",
        "11 years ahead, ours": "test/mse",
        "11 years ahead, AR(9)": "test/mse_ar",
        "in the 90 % interval, one step": "test/coverage_1",
    },
    "reported": {"value": 280.2, "source": "ARIMA and a network", "status": "memory"},
    "time": "1 min",
    "notes": "The configuration was chosen on 1854 to 1920, learning from the years before; then "
    "all 221 years to 1920 are learnt from. LSTMs of 20 years without the linear map, chosen alike "
    "and tested before these, had 462 +- 31.",
}
PERIOD = 11  # years of a solar cycle


@dataclasses.dataclass(frozen=True)
class Config:
    """LSTMs on yearly sunspots."""

    learn: Literal["train", "train+validation"] = "train+validation"  # years: to 1853, or to 1920
    look_back: int = 9  # years of a window
    horizon: int = 11  # years ahead that are learnt together
    units: int = 16  # of each LSTM
    members: int = 8  # LSTMs that differ by their initial weights
    batch_size: int = 112  # windows a step
    learning_rate: float = 3e-3  # peak of a warm-up and cosine schedule
    weight_decay: float = 0.01  # AdamW's
    dropout: float = 0.2  # rate of what the head takes in
    ridge: float = 0.03  # penalty of the linear map, which is fitted first and stays
    run: dlx.Run = dlx.Run(steps=400, log_every=20, eval_every=100, save_every=200)

    def __post_init__(self):
        names = ("look_back", "horizon", "units", "members", "batch_size", "learning_rate")
        check_ranges(
            self, positive=names, not_negative=("weight_decay", "ridge"), share=("dropout",)
        )


PRESETS = {
    "laptop": Config(),
    "paper": Config(),
    "test": Config(
        "train", units=4, members=2, batch_size=16,
        run=dlx.Run(steps=60, log_every=10, eval_every=20, save_every=20,
                    best=("validation/mse_1", "min")),
    ),
}  # fmt: skip


def task_of(config: Config) -> forecasting.Task:
    return forecasting.Task(
        functools.partial(series.load, "sunspots"),
        columns=1,
        look_back=config.look_back,
        horizon=config.horizon,
        learn=config.learn,
        root=True,  # the spread of counts grows with them
    )


def build(config: Config) -> dlx.Experiment:
    encoder = rnn.RNN(config.units)
    member = forecast.Forecaster(encoder, config.horizon, dropout=config.dropout)
    model: Any = forecast.Ensemble(member, config.members)

    def start(params):
        windows = task_of(config).windows(config.learn)
        return forecast.with_linear(params, classical.weights(windows, config.ridge))

    steps = config.run.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 10, steps)
    return forecasting.experiment(
        model,
        forecast.beside_linear(optax.adamw(schedule, weight_decay=config.weight_decay)),
        forecast.gaussian(model),
        forecast.mixture,
        task_of(config),
        batch_size=config.batch_size,
        seed=config.run.seed,
        start=start,
        rows=functools.partial(rows, dataclasses.replace(config, run=dlx.Run())),
    )


@functools.cache
def rows(config: Config) -> dict[str, np.ndarray]:
    """The classical forecasts of the test part; all learn from the years before it."""
    whole = task_of(dataclasses.replace(config, learn="train+validation"))
    found = whole.load()
    part, H = found.part("test"), config.horizon
    end, lags = part[0], range(1, 10)
    values, roots = found.values, series.encode(found.values, whole.scale()).astype(float)
    learn, test = whole.windows(whole.learn), whole.windows("test")
    return {
        "naive": classical.seasonal_naive(values, PERIOD, part, H),
        "ar": classical.autoregression(values, lags, end, part, H)[0],
        "ar_root": whole.decode(*classical.autoregression(roots, lags, end, part, H))[0],
        "sarima": classical.sarima(values, (2, 0, 1), (0, 0, 0, 0), end, part, H),
        "linear": whole.decode(classical.linear(learn, test, config.ridge))[0],
    }


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
