"""Series in time: read, checked for gaps, cut into parts, scaled and seen through windows.

- "sunspots": yearly numbers, 1700 to 1987. Those of G. P. Zhang, "Time Series Forecasting Using a
  Hybrid ARIMA and Neural Network Model", Neurocomputing 2003: 221 years to learn from, 67 to test.
- "demand": hourly electricity demand of the state of Victoria, 150 days of 2012 from January on
  (R. Hyndman et al., the set vic_elec), in megawatts.
- "ett": ETTh1, oil temperature and six loads of an electricity transformer, hourly, of H. Zhou et
  al., "Informer", arXiv 2012.07436: 12, 4 and 4 months of 30 days.

The first two come with statsmodels, which is a dependency; it is not imported.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dlx.data import files
from dlx.errors import BadInput

PARTS = ("train", "validation", "test")
_STATSMODELS = "https://raw.githubusercontent.com/statsmodels/statsmodels/main/statsmodels/"
_SETS = {  # file, address, folder in statsmodels, sha256, where the parts end
    "sunspots": (
        "sunspots.csv", _STATSMODELS + "datasets/sunspots/", "datasets/sunspots",
        "f67889b1d9002cd5227f0e0ef54e35b419cdd85a31279adef6f73fb41e5c0a9b",
        (154, 221, 288),  # validation is as long as the test: six solar cycles
    ),
    "demand": (
        "mstl_elec_vic.csv", _STATSMODELS + "tsa/stl/tests/results/", "tsa/stl/tests/results",
        "e772d225333d969376ce7429e518c6a3b6b69d620c73c6c4959b806d3e947a23",
        (100 * 24, 120 * 24, 150 * 24),
    ),
    "ett": (
        "ETTh1.csv", "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/", "",
        "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
        (360 * 24, 480 * 24, 600 * 24),
    ),
}  # fmt: skip


class Series(NamedTuple):
    """D series at T equal steps.

    time: (T,) datetime64. values: (T, D) float64. columns: their names. ends: of the training, the
    validation and the test part, which follow one another; the last is T.
    """

    time: np.ndarray
    values: np.ndarray
    columns: tuple[str, ...]
    ends: tuple[int, int, int]

    def part(self, name: str) -> tuple[int, int]:
        """(first step, step after the last) of "train", "validation" or "test", or of two that
        follow one another: "train+validation"."""
        names = name.split("+")
        return (0, *self.ends)[PARTS.index(names[0])], self.ends[PARTS.index(names[-1])]


def load(name: str) -> Series:
    """A series by its name.

    Raises:
      BadInput: it is nowhere, is not the authors', or has a gap.
    """
    return _load(name, tuple(files.folders(name)))


@functools.cache
def _load(name: str, places: tuple) -> Series:
    """`places` only tells the cache apart: another DLX_DATA_DIR is another answer."""
    file, url, inside, digest, ends = _SETS[name]
    package = importlib.util.find_spec("statsmodels") if inside else None
    roots = (package.submodule_search_locations if package else None) or ()
    installed = [str(Path(root) / inside) for root in roots]
    path = files.find(name, file, url + file, digest, installed)
    time, values, columns = parse(files.payload(path, digest), str(path))
    return Series(time[: ends[-1]], values[: ends[-1]], columns, ends)


def parse(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """A table with a header, times in its first column -> time, values, columns as in `Series`.

    Raises:
      BadInput: it cannot be read, or `check` finds something.

    >>> parse(b"year,a\\n1999,1\\n2000,3\\n2001,5", "three")[1].tolist()
    [[1.0], [3.0], [5.0]]
    """
    try:
        header, *rows = [row for row in csv.reader(content.decode().splitlines()) if row]
        for i, row in enumerate(rows, 1):
            if row[0].strip() in ("", "NaT"):
                raise BadInput(f"{name} has no time in row {i}: give it one, or leave it out")
        time = np.array([row[0] for row in rows], np.datetime64)
        # An empty field is a value that is missing: `check` tells where.
        values = np.array([[float(x or "nan") for x in row[1:]] for row in rows])
        values = values.reshape(len(rows), len(header) - 1)
    except BadInput:
        raise
    except ValueError as e:
        raise BadInput(f"{name} is no table of times and numbers ({e}): mend it") from e
    check(time, values, name)
    return time, values, tuple(header[1:])


def check(time: np.ndarray, values: np.ndarray, name: str) -> None:
    """Whether a series is whole: models count steps and never see a clock.

    Args:
      time: (T,) datetime64.
      values: (T, D).
      name: for the message.

    Raises:
      BadInput: fewer than three steps, a time that is missing, doubled or out of step, or a value
        that is not finite.
    """
    if len(time) < 3 or len(time) != len(values):
        raise BadInput(f"{name} has {len(time)} times and {len(values)} rows: it needs 3 or more")
    if np.isnat(time).any():
        raise BadInput(f"{name} has no time in row {int(np.isnat(time).argmax()) + 1}: give it one")
    steps = np.diff(time)
    step = np.sort(steps)[len(steps) // 2]  # the usual one
    wrong = (steps != step) | (steps <= np.zeros_like(steps))
    if wrong.any():
        i = int(wrong.argmax())
        raise BadInput(
            f"{name}: {time[i + 1]} follows {time[i]} in row {i + 2} and the usual step is {step}: "
            "a series must be regular, without gaps; fill them or cut it there"
        )
    if not np.isfinite(values).all():
        i, d = np.argwhere(~np.isfinite(values))[0].tolist()
        raise BadInput(
            f"{name}: column {d + 1} is {values[i, d]} at {time[i]}: fill it or cut the series"
        )


class Scale(NamedTuple):
    """How values are seen by a model: their square roots where `root`, less the mean, over the
    standard deviation (D,) of the part that it learns from."""

    mean: np.ndarray
    std: np.ndarray
    root: bool = False


def scale(values: np.ndarray, root: bool = False) -> Scale:
    """Of (T, D) values to learn from.

    Raises:
      BadInput: a series is constant, or the root of a negative value is asked for.
    """
    if root and values.min() < 0:
        raise BadInput(f"root is True and a value is {values.min()}: there is no root of it")
    seen = np.sqrt(values) if root else values
    if (seen.std(0) == 0).any():
        column = int((seen.std(0) == 0).argmax()) + 1
        raise BadInput(f"column {column} is constant where models learn: leave it out")
    return Scale(seen.mean(0), seen.std(0), root)


def encode(values: np.ndarray, scale: Scale) -> np.ndarray:
    """(T, D) values -> what a model sees, float32."""
    seen = np.sqrt(values) if scale.root else values
    return ((seen - scale.mean) / scale.std).astype(np.float32)


def calendar(time: np.ndarray) -> np.ndarray:
    """Where an hour stands in its day and week: sine and cosine of the day's and week's turns and
    of the day's second, and whether it is Saturday or Sunday; (T,) -> (T, 7) float32."""
    hours = (time - np.datetime64("1970-01-05")) / np.timedelta64(1, "h")  # a Monday
    turns = 2 * np.pi * hours[:, None] / np.array([24, 12, 168])
    weekend = (hours // 24 % 7 >= 5)[:, None]
    return np.concatenate([np.sin(turns), np.cos(turns), weekend], 1).astype(np.float32)


def windows(
    inputs: np.ndarray, series: int, part: tuple[int, int], look_back: int, horizon: int
) -> dict[str, np.ndarray]:
    """Every window whose first target lies in a part: one for each of its n steps.

    Args:
      inputs: (T, D + K): series, then known inputs.
      series: D.
      part: (first step, step after the last). Where the first is below `look_back`, the first
        window is the first that is whole.
      look_back: L.
      horizon: H.

    Returns:
      {"x": (n, L, D + K), "y": (n, H, D), "whole": (n,) float32}, the arrays views of one. whole
      is 1 where all H targets lie in the part; the last H - 1 windows are not, and their targets
      beyond it are 0.

    Raises:
      BadInput: the part is shorter than the window.

    >>> w = windows(np.arange(5.0)[:, None], 1, (2, 5), 2, 2)
    >>> w["x"][..., 0].tolist(), w["y"][..., 0].tolist(), w["whole"].tolist()
    ([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]], [[2.0, 3.0], [3.0, 4.0], [4.0, 0.0]], [1.0, 1.0, 0.0])
    """
    first, last = max(part[0], look_back), part[1]
    if last - first < horizon:
        raise BadInput(
            f"look_back {look_back} and horizon {horizon} do not fit a part of steps {part[0]} to "
            f"{part[1]}: make them shorter"
        )
    beyond = np.zeros((horizon - 1, inputs.shape[1]), inputs.dtype)
    cut = np.concatenate([inputs[first - look_back : last], beyond])
    view = np.lib.stride_tricks.sliding_window_view(cut, look_back + horizon, 0)
    view = view.swapaxes(1, 2)  # (n, L + H, D + K)
    whole = (np.arange(len(view)) + horizon <= len(view)).astype(np.float32)
    return {"x": view[:, :look_back], "y": view[:, look_back:, :series], "whole": whole}
