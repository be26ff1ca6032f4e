"""The Experiment of a forecaster: what several experiments would write alike.

One protocol for the network and for every row beside it. A forecast is made at each step of a part
from what came before it, of the next H steps. "_1" are the scores of the first of them, over all n
steps of the part; without it they are the mean over all H, at the n - H + 1 steps whose horizon
lies in the part. No step is left out, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlx import metrics, pictures, sharding
from dlx.data import arrays, series
from dlx.experiment import Experiment
from dlx.step import make_step, train_state

Z90 = 1.6448536269514722  # a normal value lies within so many deviations in 90 of 100 cases


class Task(NamedTuple):
    """What is forecast from what.

    load: opens the series. columns: D. look_back: L. horizon: H. learn: the part to learn from,
    "train" or "train+validation"; scaling is from it alone. root: models see square roots.
    known: the calendar stands beside the series. standard: scores are of standardised values.
    """

    load: Callable[[], series.Series]
    columns: int
    look_back: int
    horizon: int
    learn: str = "train"
    root: bool = False
    known: bool = False
    standard: bool = False

    @property
    def width(self) -> int:
        """D + K, columns of a window."""
        return self.columns + (7 if self.known else 0)

    def windows(self, part: str) -> dict[str, np.ndarray]:
        """`series.windows` of scaled values; to learn from, only those that are whole."""
        found = self.load()
        inputs = series.encode(found.values, self.scale())
        if self.known:
            inputs = np.concatenate([inputs, series.calendar(found.time)], 1)
        made = series.windows(inputs, self.columns, found.part(part), self.look_back, self.horizon)
        n = len(made["whole"]) - (self.horizon - 1 if part == self.learn else 0)
        return {k: v[:n] for k, v in made.items()}

    def scale(self) -> series.Scale:
        found = self.load()
        return series.scale(found.values[: found.part(self.learn)[1]], self.root)

    def decode(self, mean: Any, deviation: Any = 0.0) -> tuple[Any, Any, Any]:
        """Scaled -> (expected value, low, high): in the series' own units, the ends of the interval
        that should hold 90 % of the values. NumPy or JAX arrays (..., D)."""
        if self.standard:
            return mean, mean - Z90 * deviation, mean + Z90 * deviation
        at, std, root = self.scale()
        at, std = at.astype(np.float32), std.astype(np.float32)
        mean, deviation = mean * std + at, deviation * std
        low, high = mean - Z90 * deviation, mean + Z90 * deviation
        if not root:
            return mean, low, high
        return mean**2 + deviation**2, low.clip(0) ** 2, high.clip(0) ** 2


def experiment(
    model: Any,
    tx: optax.GradientTransformation,
    loss: Callable[..., Any],
    predict: Callable[[Any], Any],
    task: Task,
    *,
    batch_size: int,
    seed: int,
    rows: Callable[[], Mapping[str, np.ndarray]],
    start: Callable[[Any], Any] | None = None,
    eval_batch: int = 256,
) -> Experiment:
    """A network's forecasts of a part, and the rows beside it.

    Args:
      model: a linen module, (windows (B, L, D + K), train) -> anything.
      tx: optimizer.
      loss: a loss function for `dlx.make_step`, of a batch {"x", "y"}.
      predict: what the model returns -> (mean, log scale or None), (B, H, D) each.
      task: what is forecast.
      batch_size: windows a step.
      seed: of their order.
      rows: {name: forecasts (n, H, D) of the test part, decoded}; computed once, at the test.
      start: parameters as the model makes them -> those to start from; opens data if it likes.
      eval_batch: windows an evaluation takes at once.
    """

    def init(key: jax.Array, given: Any) -> Any:
        window = np.zeros((1, task.look_back, task.width), np.float32)
        variables = model.init(key, window)
        if start is not None:
            variables = variables | {"params": start(variables["params"])}
        return train_state(key, variables, tx)

    def forecast(state: Any, x: jax.Array) -> tuple[Any, Any, Any]:
        mean, log_scale = predict(model.apply(state.variables, x))
        if log_scale is None:
            return task.decode(mean)[0], None, None
        return task.decode(mean, jnp.exp(log_scale))

    def measure(state: Any, batch: Mapping[str, jax.Array]) -> dict[str, Any]:
        value, low, high = forecast(state, batch["x"])
        y = task.decode(batch["y"])[0]
        errors = {"mse": (value - y) ** 2, "mae": jnp.abs(value - y)}
        if low is not None:
            errors["coverage"] = ((low <= y) & (y <= high)).astype(jnp.float32)
        out: dict[str, Any] = {f"{k}_1": e[:, 0].mean(-1) for k, e in errors.items()}
        return out | {k: (e.mean((1, 2)), batch["whole"]) for k, e in errors.items()}

    def part(name: str) -> Callable[[], Mapping[str, np.ndarray]]:
        return lambda: task.windows(name)

    evaluate = metrics.evaluator(measure, part("test"), eval_batch)

    def test(state: Any) -> dict[str, float]:
        """The test part, read once: the network, then the rows beside it."""
        out = evaluate(state)
        made = task.windows("test")
        y = task.decode(made["y"])[0]
        for name, found in rows().items():
            out |= {f"{k}_{name}": v for k, v in scores(found, y, made["whole"]).items()}
        return out

    shown = jax.jit(forecast)

    def draw(name: str) -> Callable[..., np.ndarray]:
        def image(state: Any, key: Any = None) -> np.ndarray:
            made = task.windows(name)
            found = task.load()
            first = found.part(name)[1] - len(made["whole"])
            n = min(len(made["whole"]), 10 * task.horizon)
            bands = jax.tree.map(sharding.fetch, shown(state, made["x"][-n:]))
            start = first + len(made["whole"]) - n
            truth = task.decode(made["y"][-n:])[0][:, 0, -1]
            column = found.columns[task.columns - 1]
            learnt = " (learnt from)" if name in task.learn.split("+") else ""
            return plot(found.time[start:][:n], truth, bands, column, name + learnt)

        return image

    held = task.learn == "train"
    training = part(task.learn)
    return Experiment(
        init=init,
        step=make_step(loss, tx),
        data=arrays.batches(lambda: {k: training()[k] for k in "xy"}, batch_size, seed),
        evals={"validation": metrics.evaluator(measure, part("validation"), eval_batch)}
        if held
        else {},
        test=test,
        pictures={"forecast": draw("validation")},
        predict=forecast,
        sample=draw("test"),
    )


def scores(forecasts: np.ndarray, y: np.ndarray, whole: np.ndarray) -> dict[str, float]:
    """{"mse_1", "mae_1", "mse", "mae"} as the head of this file says.

    Args:
      forecasts, y: (n, H, D).
      whole: (n,), not 0 where all H targets are in the part.
    """
    errors = {"mse": (forecasts - y) ** 2, "mae": np.abs(forecasts - y)}
    out = {f"{k}_1": float(e[:, 0].mean()) for k, e in errors.items()}
    return out | {k: float(e[whole > 0].mean()) for k, e in errors.items()}


def plot(
    time: np.ndarray,
    truth: np.ndarray,
    bands: Any,
    column: str,
    part: str,
) -> np.ndarray:
    """The last series of a part, and its forecasts with their 90 % intervals: a panel of one step
    ahead, and one of horizons laid end to end.

    Args:
      time: (n,) of the first targets.
      truth: (n,) values.
      bands: expected value, low and high, (n, H, D) each; the last two may be None.
      column: the series' name.
      part: its part's.
    """
    n, H, _ = bands[0].shape
    t = time.astype(object) if time.dtype != np.dtype("datetime64[Y]") else 1970 + time.astype(int)
    starts = np.arange(0, max(n - H + 1, 1), H)
    at = (starts[:, None] + np.arange(H)).ravel()
    at = at[at < n]
    fig = pictures.figure(9, 5.6)
    fig.subplots_adjust(left=0.08, right=0.98, bottom=0.08, top=0.93, hspace=0.35)
    panels = fig.subplots(2, 1)
    ahead = [None if b is None else b[:, 0, -1] for b in bands]
    many = [None if b is None else b[starts, :, -1].ravel()[: len(at)] for b in bands]
    titles = ("one step ahead", f"{H} steps ahead, from {len(starts)} starts")
    for panel, where, (value, low, high), title in zip(
        panels, (np.arange(n), at), (ahead, many), titles, strict=True
    ):
        panel.plot(t, truth, color="black", lw=1, label="true")
        panel.plot(t[where], value, color="tab:blue", lw=1, label="forecast")
        if low is not None:
            panel.fill_between(
                t[where], low, high, color="tab:blue", alpha=0.25, lw=0, label="90 %"
            )
            inside = ((low <= truth[where]) & (truth[where] <= high)).mean()
            title += f"; {inside:.0%} within the interval"
        panel.set_title(f"{column}, {part}: {title}", fontsize=9)
        panel.grid(alpha=0.3)
        panel.tick_params(labelsize=7)
    panels[0].legend(fontsize=7, ncols=3)
    return pictures.array(fig)
