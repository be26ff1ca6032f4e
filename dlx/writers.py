"""Where a run's numbers go: a list of callables ``writer(step, {name: float})``.

Names come grouped: "train/loss", "validation/accuracy", "test/accuracy", "timing/seconds". A
writer of your own is a function; Weights & Biases, for one, is
``lambda step, metrics: wandb.log(metrics, step=step)``.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlx import metrics
from dlx.errors import BadInput

Writer = Callable[[int, Mapping[str, float]], None]


def is_timing(name: str) -> bool:
    """Timings depend on the clock, so they stay out of metrics.jsonl."""
    return name.startswith("timing/")


def row(step: int, metrics: Mapping[str, float]) -> str:
    """A line of metrics.jsonl."""
    return json.dumps({"step": step, **metrics}) + "\n"


def append(path: Path, wanted: Callable[[str], bool]) -> Writer:
    """Appends the wanted names as lines of JSON."""

    def write(step: int, values: Mapping[str, float]) -> None:
        chosen = {k: v for k, v in values.items() if wanted(k)}
        if chosen:
            with open(path, "a") as f:
                f.write(row(step, chosen))

    return write


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a last line that was cut off is left out.

    Raises:
      BadInput: the file cannot be read.
    """
    try:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as e:
        raise BadInput(f"{path} is damaged: mend it, or start over with --fresh") from e


def cut(path: Path, size: int) -> None:
    """Cuts a file back to its first `size` bytes."""
    if path.exists():
        with open(path, "r+b") as f:
            f.truncate(size)
            f.flush()
            os.fsync(f.fileno())


def tensorboard(folder: Path, first_step: int) -> Writer:
    """TensorBoard events; what an earlier start wrote from `first_step` on is superseded."""
    from tensorboardX import SummaryWriter

    board = SummaryWriter(
        str(folder), purge_step=first_step if first_step else None, write_to_disk=True
    )

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()

    write.close = board.close  # type: ignore[attr-defined]
    return write


def progress(total: int, first_step: int = 0) -> Writer:
    """A bar with loss, accuracy, speed and time left, and a line an evaluation; where the output
    is no terminal, a plain line a row."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    digits = len(str(total))
    bar = tqdm(
        total=total,
        initial=first_step,
        disable=not live,
        unit="step",
        dynamic_ncols=True,
        leave=False,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left",
    )

    def write(step: int, values: Mapping[str, float]) -> None:
        first = ("loss", "accuracy")  # what people look for
        names = sorted(values, key=lambda k: k.split("/", 1)[-1] not in first)
        shown = {k: values[k] for k in names if not is_timing(k)}
        unit = "examples" if "timing/examples_per_second" in values else "steps"
        rate = values.get(f"timing/{unit}_per_second")
        speed = "" if rate is None else f"{rate:,.0f} {unit}/s"
        if live and any(k.startswith("train/") for k in shown):
            brief = {k.removeprefix("train/"): v for k, v in shown.items()}
            text = [f"{k} {brief[k]:.4g}" for k in ("loss", "accuracy") if k in brief]
            bar.set_postfix_str("  ".join(filter(None, [*text, speed])), refresh=False)
            bar.update(step - bar.n)
        elif shown:
            text = [f"{k.removeprefix('train/')} {v:.4g}" for k, v in shown.items()]
            if rate is not None:
                left = (total - step) / values["timing/steps_per_second"]
                text += [speed, f"{left:,.0f} s left"]
            say(f"step {step:{digits}d}/{total}  {'  '.join(text)}")
        elif step >= total:
            bar.close()

    write.close = bar.close  # type: ignore[attr-defined]
    return write


def files(folder: Path, first_step: int) -> list[Writer]:
    """The writers of a run folder."""
    return [
        append(folder / "metrics.jsonl", lambda name: not is_timing(name)),
        append(folder / "timing.jsonl", is_timing),
        tensorboard(folder / "tensorboard", first_step),
    ]


def say(text: str) -> None:
    """A line for people, above the bar where there is one."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def curves(folder: Path, rows: Iterable[Mapping[str, float]]) -> None:
    """The learning curves' picture."""
    from dlx import pictures

    png(folder / "pictures" / "curves.png", pictures.curves(rows))


def png(path: Path, image: np.ndarray) -> None:
    """Writes (height, width, 3) or (height, width) uint8 as PNG; makes the folder."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(image)).save(path)


class Log:
    """A run's rows: those written, those still on the device, and who is told of them."""

    def __init__(
        self,
        rows: Mapping[tuple[int, str], dict[str, float]],
        writers: list[Writer],
        examples: int,
    ):
        """rows: of earlier starts, {(step, kind): row}; examples: a step, 0 where that is none."""
        self._rows = dict(rows)
        self._pending: list[tuple[int, Any]] = []
        self._writers, self._examples = writers, examples
        self._begun, self._idle = time.perf_counter(), 0.0
        self._marks: collections.deque[tuple[int, float]] = collections.deque(maxlen=8)

    @property
    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl."""
        return list(self._rows.values())

    def emit(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Tells all writers, and keeps what does not depend on the clock; a row once only."""
        if (step, kind) in self._rows:
            return
        kept = {k: v for k, v in values.items() if not is_timing(k)}
        if kept:
            self._rows[step, kind] = {"step": step, **kept}
        for write in self._writers:
            write(step, values)

    def later(self, step: int, window: Any) -> None:
        """A window of metrics that the device may still be computing; a step's once only."""
        if (step, "train") not in self._rows and step not in [s for s, _ in self._pending]:
            self._pending.append((step, window))

    def flush(self) -> None:
        """Fetches and writes what is pending.

        Raises:
          FloatingPointError: a metric was not finite; names it and its first step.
        """
        while self._pending:
            step, window = self._pending[0]
            window = jax.device_get(window)
            metrics.check_window(window)
            values = {f"train/{k}": v for k, v in metrics.means(window["sums"]).items()}
            self.emit(step, "train", values | self._timing(step))
            self._pending.pop(0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluations and saves do not count as training time."""
        begun = time.perf_counter()
        yield
        self._idle += time.perf_counter() - begun

    def _timing(self, step: int) -> dict[str, float]:
        """Speed over the last rows: one alone is blurred, for rows are fetched late. The first
        row, which compiles, is the mark that the others are measured from. A row that an interrupt
        fell into comes a second time, and has no speed."""
        total = time.perf_counter() - self._begun
        out = {"timing/seconds": total}
        before, then = self._marks[0] if self._marks else (step, 0.0)
        if step > before and total - self._idle > then:
            rate = (step - before) / (total - self._idle - then)
            out["timing/steps_per_second"] = rate
            if self._examples:
                out["timing/examples_per_second"] = rate * self._examples
        self._marks.append((step, total - self._idle))
        return out

    def end(self, step: int) -> None:
        """The last row of timing.jsonl: what this start cost."""
        self.emit(step, "end", {"timing/seconds": time.perf_counter() - self._begun})

    def close(self) -> None:
        """Closes the writers that have something to close."""
        for write in self._writers:
            if close := getattr(write, "close", None):
                close()

    def rewrite(self, path: Path) -> None:
        """All rows anew: an interrupt may have fallen into the writing of one."""
        draft = path.with_name(path.name + ".tmp")
        draft.write_text("".join(json.dumps(r) + "\n" for r in self._rows.values()))
        draft.replace(path)


class Profile:
    """A trace of a few calls of a step, after the first ones have compiled."""

    def __init__(self, folder: Path | None):
        self._folder, self._calls, self._on = folder, 0, False

    def __enter__(self) -> None:
        self._calls += 1
        if self._folder is not None and self._calls == 3:
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def __exit__(self, *error: object) -> None:
        if self._calls == 7:
            self.stop()

    def stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
            say(f"trace written to {self._folder}")
