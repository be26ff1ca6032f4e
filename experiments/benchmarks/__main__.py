"""`python -m experiments.benchmarks`: the speed of a training step, dlx beside plain flax.linen and
PyTorch.

Each row is a model, each side of it a process of its own that starts from the same weights and sees
the same batch. The sides take turns, round after round, so that whatever else the machine does
slows all of them; what counts is the median of the rounds' ratios. A row whose first losses differ
by more than a ten-thousandth between two sides is refused.

It writes record.json and chart.png beside this file. PyTorch may live in another Python.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from dlx import guard
from experiments.benchmarks import worker

HERE = Path(__file__).parent
LEAST = 0.95  # times as fast, against flax and PyTorch's default; of scanned steps against single
COMPILE = 2.0  # times flax's seconds to compile
OVERHEAD = "overhead"  # beside the rows: what the loop adds to a step, and dlx to a start


@dataclasses.dataclass(frozen=True)
class Config:
    """The speed of a training step, dlx beside plain flax.linen and PyTorch."""

    rows: tuple[str, ...] = ()  # only these; none: all, and "overhead"
    sides: tuple[str, ...] = tuple(worker.SIDES)  # only these
    rounds: int = 9  # turns of each side
    seconds: float = 1.0  # a turn lasts about so long
    torch_python: str = sys.executable  # a Python that has PyTorch
    older_python: str = ""  # a Python with an older jax, as one more side
    out: Path = HERE  # folder of record.json and chart.png


class Side:
    """A worker's process."""

    def __init__(self, python: str, side: str, row: str, folder: str):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        words = [python, "-m", "experiments.benchmarks.worker", side, row, folder]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | worker.MALLOC.get(side, {}),
            cwd=HERE.parents[1],
        )  # fmt: skip
        self.report = self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            self.errors.seek(0)
            said = self.errors.read().strip().rpartition("\n")[2]
            self.close()
            raise RuntimeError(said or "it ended")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Of one step, as the mean of some."""
        self.process.stdin.write(f"{steps}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        said = self.answer()
        self.report["peak_mb"] = round(said["peak_mb"])
        return said["seconds"]

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()


def interval(ratios: np.ndarray) -> tuple[float, float]:
    """95 % of the medians of a thousand draws with replacement."""
    draws = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    low, high = np.percentile(np.median(draws, 1), [2.5, 97.5])
    return round(float(low), 3), round(float(high), 3)


def ratio(a: Any, b: Any) -> dict[str, float]:
    """Of the seconds of two sides, round by round."""
    return median(np.array(a) / np.array(b))


def median(values: np.ndarray, digits: int = 3) -> dict[str, float]:
    """With its interval."""
    low, high = interval(values)
    return {"median": round(float(np.median(values)), digits), "low": low, "high": high}


def limit() -> float:
    """FLOP/s of this machine's matrix product in float32, the best of some."""
    a = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        np.matmul(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def measure(row: str, config: Config, bar: Any) -> dict[str, Any]:
    """A row of the record; {"refused": why} where its sides do not compute the same."""
    sides = [s for s in worker.SIDES if s in ("flax", "dlx", *config.sides)]
    sides.sort(key=lambda s: s != "flax")  # it writes the weights
    pythons = {s: config.torch_python if s in worker.TORCH else sys.executable for s in sides}
    if config.older_python:
        sides.append("dlx, older jax")
        pythons["dlx, older jax"] = config.older_python
    running: dict[str, Side] = {}
    out: dict[str, Any] = {"sides": {}, "ratios": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in sides:
            bar.set_postfix_str(f"{row}: {name} compiles")
            try:
                running[name] = Side(pythons[name], name.partition(",")[0], row, folder)
            except RuntimeError as e:
                out["sides"][name] = {"failed": str(e)}
    wanted = np.array(running["flax"].report["losses"][:2])
    for name, side in running.items():
        found = np.array(side.report["losses"][:2])
        if name not in worker.LOOPS and not np.allclose(found, wanted, rtol=1e-4, atol=0):
            out["refused"] = f"the first losses are {found} ({name}) and {wanted} (flax)"
    if "refused" not in out:
        times = {name: [] for name in running}
        steps = {}
        for name, side in running.items():
            bar.set_postfix_str(f"{row}: {name} warms up")
            least = {"scan": worker.SCANNED}.get(name, 2 if name in worker.LOOPS else 1)
            turn = config.seconds / side.seconds(least) / least
            steps[name] = least * max(1, round(turn))
        for i in range(config.rounds):
            bar.set_postfix_str(f"{row}: round {i + 1} of {config.rounds}")
            order = list(running)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                times[name].append(running[name].seconds(steps[name]))
        flops = running["flax"].report["flops"]
        for name, side in running.items():
            t = np.array(times[name])
            out["sides"][name] = side.report | {
                "seconds": float(np.median(t)), "all": [round(x, 6) for x in t],
                "flops_per_second": flops / float(np.median(t)),
            }  # fmt: skip
            out["ratios"][name] = ratio(times[name], times["dlx"])  # how many times faster dlx is
        if {*worker.LOOPS} <= times.keys():
            out["end_to_end"] = ratio(times["constant"], times["fit"])
    for side in running.values():
        side.close()
    return out


def overheads(rounds: int) -> dict[str, list[float]]:
    """{what: the seconds of each round}."""
    words = [sys.executable, "-m", "experiments.benchmarks.overhead", str(rounds)]
    around = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        words, stdout=subprocess.PIPE, text=True, check=True, env=around, cwd=HERE.parents[1]
    )
    return json.loads(done.stdout)


def added(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """What dlx adds to a step and to a start, of the seconds that `overhead` took."""
    times = {name: np.array(t) for name, t in seconds.items()}
    jax = times["import jax"]
    return {
        "loop_us_k1": median(1e6 * (times["fit, K=1"] - times["bare, K=1"]), 1),
        "loop_ratio_k32": ratio(times["fit, K=32"], times["bare, K=32"]),
        "import_ratio": ratio(times["import dlx"], jax),
        "import_all_ratio": ratio(times["from dlx import *"], jax),
        "first_step_ratio": ratio(times["first step"], jax),
        "seconds": {name: float(np.median(t)) for name, t in times.items()},
    }


def table(record: dict[str, Any]) -> str:
    """What was found of the loop, beside what it may be."""
    lines = []

    def line(what: str, found: dict[str, float], bound: str) -> None:
        shown = f"{found['median']:g} ({found['low']:g} to {found['high']:g})"
        lines.append(f"{what:52}{shown:>28}   {bound}".rstrip())

    if found := record.get(OVERHEAD):
        line("the loop adds to a step, us", found["loop_us_k1"], "at most 250")
        line("32 steps in a call, of a bare loop's time", found["loop_ratio_k32"], "at most 1.5")
        line("import dlx, of import jax", found["import_ratio"], "at most 1.5")
        line("from dlx import *, of import jax", found["import_all_ratio"], "")
        line("first step of digits_cnn, of import jax", found["first_step_ratio"], "at most 4")
    for row, result in record["rows"].items():
        if "end_to_end" in result:
            line(f"{row}, data read, of one batch's speed", result["end_to_end"], "at least 0.97")
    return "\n".join(lines)


def short(record: dict[str, Any]) -> str:
    """What is below its bar, and why."""
    lines = []
    for row, found in record["rows"].items():
        sides, ratios = found["sides"], {k: v["median"] for k, v in found["ratios"].items()}
        said = [
            f"{ratios[side]:.2f} times as fast as {side}, not {LEAST}"
            for side in ("flax", "eager")
            if ratios.get(side, math.inf) < LEAST
        ]
        if "scan" in ratios and ratios["scan"] > 1 / LEAST:
            said.append(f"steps in one call take {ratios['scan']:.2f} times as long, not 1/{LEAST}")
        compiled = [sides.get(side, {}).get("compile_seconds") for side in ("dlx", "flax")]
        if all(compiled) and compiled[0] > COMPILE * compiled[1]:
            said.append(f"compiles {compiled[0] / compiled[1]:.1f} times as long, not {COMPILE}")
        if said:
            lines.append(f"{row}: {'; '.join(said)}. {found.get('why', '')}".strip())
    return "\n".join(lines)


def compared(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{side: {row: how many times faster dlx is}}, with the fastest of PyTorch as one more."""
    out: dict[str, dict[str, float]] = {}
    for row, found in record["rows"].items():
        ratios = {side: r["median"] for side, r in found["ratios"].items()}
        torch = [ratios[s] for s in ("eager", "channels-last", "compile") if s in ratios]
        if torch:
            ratios["the best of PyTorch"] = min(torch)
        for side, ratio in ratios.items():
            out.setdefault(side, {})[row] = ratio
    return out


def means(record: dict[str, Any]) -> dict[str, float]:
    """{side: geometric mean over the rows}."""
    sides = compared(record)
    return {
        s: math.exp(float(np.mean(np.log(list(r.values())))))
        for s, r in sides.items()
        if s != "dlx"
    }


def chart(record: dict[str, Any], path: Path) -> None:
    """Bars: each row's speed beside plain flax.linen and PyTorch."""
    from matplotlib.figure import Figure

    shown = {
        "flax": "plain flax.linen",
        "eager": "PyTorch",
        "the best of PyTorch": "best of PyTorch",
    }
    sides = {k: v for k, v in compared(record).items() if k in shown}
    rows = list(record["rows"])
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(sides))
    for i, (side, ratios) in enumerate(sides.items()):
        places = [rows.index(row) + (i + 0.5) * height - 0.4 for row in ratios]
        bars = axes.barh(places, list(ratios.values()), height, label=f"against {shown[side]}")
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [record["rows"][row]["what"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel(f"times as fast as the other, a training step on {record['cores']} cores")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    config = tyro.cli(Config)
    known = worker.rows()
    unknown = [r for r in config.rows if r not in (*known, OVERHEAD)]
    if unknown:
        raise SystemExit(f"rows {unknown[0]!r} is none of {', '.join(known)}, {OVERHEAD}")
    unknown = [s for s in config.sides if s not in worker.SIDES]
    if unknown:
        raise SystemExit(f"sides {unknown[0]!r} is none of {', '.join(worker.SIDES)}")
    rows = config.rows or (OVERHEAD, *known)
    around = guard.environment()
    record: dict[str, Any] = {
        "command": f"python -m experiments.benchmarks --rounds {config.rounds}",
        "processor": around["processor"],
        "commit": around["commit"],
        "date": datetime.date.today().isoformat(),
        "cores": len(os.sched_getaffinity(0)),
        "limit": limit(),
        "rounds": config.rounds,
        "rows": {},
    }
    with tqdm(rows, unit="row") as bar:
        for row in bar:
            if row == OVERHEAD:
                bar.set_postfix_str(row)
                record[row] = added(overheads(config.rounds))
                continue
            result = measure(row, config, bar)
            why = getattr(known[row], "WHY", {}).get(row)
            known_of = {"what": known[row].ROWS[row]} | ({"why": why} if why else {})
            record["rows"][row] = known_of | result
            line = [f"{row:12s}"]
            line += [f"{k} {v['median']:.2f}" for k, v in result["ratios"].items() if k != "dlx"]
            bar.write("  ".join(line) + result.get("refused", ""))
            record["limit"] = max(record["limit"], limit())
            # After each: it takes the better part of an hour, and Ctrl-C leaves what is there.
            (config.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
            chart(record, config.out / "chart.png")
    (config.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))
    print(short(record))
    for side, mean in means(record).items():
        print(f"dlx is {mean:.2f} times as fast as {side} (geometric mean)")


if __name__ == "__main__":
    main()
