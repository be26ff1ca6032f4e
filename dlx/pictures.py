"""Pictures as arrays: every function gives (height, width, 3) uint8, ready for a PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dlx import sharding


def figure(width: float, height: float) -> Any:
    """A matplotlib figure of that many inches that belongs to no window. Its layout is the
    caller's: matplotlib's automatic ones take longer than the drawing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=100)
    FigureCanvasAgg(fig)
    return fig


def array(fig: Any) -> np.ndarray:
    """A figure as (height, width, 3) uint8."""
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3].copy()


def curves(rows: Iterable[Mapping[str, float]]) -> np.ndarray:
    """Learning curves: a panel a metric, training and evaluations in it together."""
    rows = list(rows)
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            group, _, metric = name.partition("/")
            if metric and group != "test":
                lines.setdefault(metric, {}).setdefault(group, []).append((row["step"], value))
    n = max(len(lines), 1)
    fig = figure(4.5 * n, 3.4)
    fig.subplots_adjust(left=0.6 / 4.5 / n, right=1 - 0.2 / 4.5 / n, bottom=0.15, top=0.9)
    panels = fig.subplots(1, n, squeeze=False)[0]
    for panel, (metric, groups) in zip(panels, lines.items(), strict=False):
        for group, points in groups.items():
            x, y = zip(*points, strict=True)
            panel.plot(x, y, label=group, marker="." if len(x) < 30 else None)
        positive = [v for points in groups.values() for _, v in points if v > 0]
        if "loss" in metric and positive and max(positive) > 20 * min(positive):
            panel.set_yscale("log")
        panel.set(title=metric, xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend()
    return array(fig)


def classifier(
    predict: Callable[[Any, Any], Any],
    data: Callable[[], Mapping[str, np.ndarray]],
    names: Sequence[str],
) -> dict[str, Callable[[Any], np.ndarray]]:
    """The `pictures` of an image classifier: "confusion", and "mistakes", the 25 images to whose
    class the network gives the least probability.

    Args:
      predict: (state, images (N, H, W, C)) -> logits (N, classes).
      data: opens {"image", "label"}; validation data, for pictures are looked at.
      names: of the classes.
    """
    probabilities = jax.jit(lambda state, image: jax.nn.softmax(predict(state, image)))

    def results(state: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        opened = data()
        found = sharding.fetch(probabilities(state, opened["image"]))
        return opened["image"], opened["label"], found

    def matrix(state: Any) -> np.ndarray:
        _, label, p = results(state)
        return confusion(label, p.argmax(-1), names)

    def mistakes(state: Any) -> np.ndarray:
        image, label, p = results(state)
        worst = np.argsort(p[np.arange(len(label)), label], kind="stable")[:25]
        guess, wrong = p.argmax(-1), p.argmax(-1) != label
        titles = []
        for i in worst.tolist():
            true = names[int(label[i])]
            other = f" taken for {names[int(guess[i])]}"
            titles.append(true + (other if wrong[i] else f" ({p[i, label[i]]:.0%})"))
        shown = image[worst, ..., 0] if image.shape[-1] == 1 else image[worst]
        return grid(shown, titles, wrong[worst].tolist())

    return {"confusion": matrix, "mistakes": mistakes}


def confusion(labels: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Confusion matrix: rows are the true classes, columns the predicted ones, counts inside."""
    n = len(names)
    counts = np.zeros((n, n), int)
    np.add.at(counts, (labels, predicted), 1)
    inches = 0.45 * n + 1.5
    fig = figure(inches, inches)
    fig.subplots_adjust(left=0.8 / inches, right=1 - 0.2 / inches, bottom=0.6 / inches)
    panel = fig.subplots()
    # Colour by row share, so that a rare class is as visible as a common one.
    panel.imshow(counts / np.maximum(counts.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(counts), strict=True):
        panel.text(j, i, counts[i, j], ha="center", va="center", fontsize=8,
                   color="white" if counts[i, j] > counts[i].sum() / 2 else "black")  # fmt: skip
    panel.set(xticks=range(n), yticks=range(n), xticklabels=names, yticklabels=names)
    panel.set(xlabel="predicted", ylabel="true", title=f"{(labels != predicted).sum()} of "
              f"{len(labels)} wrong")  # fmt: skip
    return array(fig)


def grid(images: np.ndarray, titles: Sequence[str], wrong: Sequence[bool] = ()) -> np.ndarray:
    """Images (N, H, W) or (N, H, W, 3) in a near-square grid; the titles of wrong ones are red."""
    N, H, W = images.shape[:3]
    columns = int(np.ceil(np.sqrt(N)))
    lines = -(-N // columns)
    top, side = max(round(0.3 * H), 1), max(round(0.1 * W), 1)  # room for a title; a gap
    high, wide = top + H, W + side
    light = images.max() if images.ndim == 4 else images.min()  # what shows as white
    sheet = np.full((lines * high, columns * wide, *images.shape[3:]), light, images.dtype)
    fig = figure(1.3 * columns, 1.4 * lines)
    panel = fig.add_axes((0.01, 0.01, 0.98, 0.98))  # one for all: each takes matplotlib 20 ms
    panel.axis("off")
    for i, image in enumerate(images):
        y, x = i // columns * high + top, i % columns * wide
        sheet[y : y + H, x : x + W] = image
        panel.text(x + (W - 1) / 2, y - 1, titles[i], fontsize=7, ha="center", va="bottom",
                   color="red" if i < len(wrong) and wrong[i] else "black")  # fmt: skip
    panel.imshow(sheet, cmap="gray_r")
    return array(fig)
