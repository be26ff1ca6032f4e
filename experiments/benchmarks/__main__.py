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
import shutil
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
from experiments.benchmarks import report, worker

HERE = Path(__file__).parent
COMPARED = 2  # first losses: further ones differ as roundings grow
OVERHEAD = "overhead"  # beside the rows: what the loop adds to a step, and dlx to a start


@dataclasses.dataclass(frozen=True)
class Config:
    """The speed of a training step, dlx beside plain flax.linen and PyTorch."""

    rows: tuple[str, ...] = ()  # only these; none: all, and "overhead"
    sides: tuple[str, ...] = tuple(worker.SIDES)  # only these beside flax and dlx
    rounds: int = 9  # turns of each side
    seconds: float = 1.0  # a turn lasts about so long; of "fit" and "scan", a few times
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

    def turn(self, steps: int) -> dict[str, float]:
        """{"seconds": of one step, as the mean of some}."""
        self.process.stdin.write(f"{steps}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        said = self.answer()
        self.report["peak_mb"] = round(said["peak_mb"])
        return said

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
                if name in ("flax", "dlx"):  # which all others are compared with
                    raise SystemExit(f"{row}: {name} failed: {e}") from e
                out["sides"][name] = {"failed": str(e)}
    wanted = np.array(running["flax"].report["losses"][:COMPARED])
    for name, side in running.items():
        found = np.array(side.report["losses"][:COMPARED])
        if name != "fit" and not np.allclose(found, wanted, rtol=1e-4, atol=0):
            out["refused"] = f"the first losses are {found} ({name}) and {wanted} (flax)"
    if "refused" not in out:
        times: dict[str, list[float]] = {name: [] for name in running}
        shares: list[float] = []
        singly: list[float] = []
        steps = {}
        for name, side in running.items():
            bar.set_postfix_str(f"{row}: {name} warms up")
            least = {"scan": worker.SCANNED, "fit": 2}.get(name, 1)
            turn = config.seconds / side.turn(least)["seconds"] / least
            steps[name] = least * max(1, round(turn))
        for i in range(config.rounds):
            bar.set_postfix_str(f"{row}: round {i + 1} of {config.rounds}")
            order = list(running)
            for name in order[i % len(order) :] + order[: i % len(order)]:
                said = running[name].turn(steps[name])
                times[name].append(said["seconds"])
                if name == "fit":
                    shares.append(said["share"])
                if name == "scan":
                    singly.append(said["singly"])
        flops, most = running["flax"].report["flops"], limit()
        for name, side in running.items():
            t = np.array(times[name])
            out["sides"][name] = side.report | {
                "seconds": float(np.median(t)), "all": [round(x, 6) for x in t],
                "flops_per_second": flops / float(np.median(t)),
                "share_of_limit": round(flops / float(np.median(t)) / most, 3),
            }  # fmt: skip
            beside = singly if name == "scan" else times["dlx"]
            out["ratios"][name] = ratio(times[name], beside)  # how many times faster dlx is
        if shares:
            out["end_to_end"] = median(np.array(shares))
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


def command(config: Config) -> str:
    """The command line that gives this configuration; PYTHON stands for a path of some machine."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "out" or value == field.default:
            continue
        shown = "PYTHON" if "python" in field.name else value
        shown = " ".join(shown) if isinstance(shown, tuple) else shown
        words.append(f" --{field.name.replace('_', '-')} {shown}")
    return "python -m experiments.benchmarks" + "".join(words)


def main() -> None:
    config = tyro.cli(Config)
    known = worker.rows()
    unknown = [r for r in config.rows if r not in (*known, OVERHEAD)]
    if unknown:
        raise SystemExit(f"rows {unknown[0]!r} is none of {', '.join(known)}, {OVERHEAD}")
    unknown = [s for s in config.sides if s not in worker.SIDES]
    if unknown:
        raise SystemExit(f"sides {unknown[0]!r} is none of {', '.join(worker.SIDES)}")
    if config.rounds < 1:
        raise SystemExit(f"rounds is {config.rounds}: give 1 or more")
    for python in filter(None, (config.torch_python, config.older_python)):
        if shutil.which(python) is None:
            raise SystemExit(f"{python} is no Python that can be started: correct the path")
    config.out.mkdir(parents=True, exist_ok=True)
    rows = config.rows or (OVERHEAD, *known)
    around = guard.environment()
    record: dict[str, Any] = {
        "command": command(config),
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
            why = getattr(known[row], "WHY", {}).get(row, "")
            record["rows"][row] = {"what": known[row].ROWS[row], "why": why} | result
            line = [f"{row:12s}"]
            line += [f"{k} {v['median']:.2f}" for k, v in result["ratios"].items() if k != "dlx"]
            bar.write("  ".join(line) + result.get("refused", ""))
            record["limit"] = max(record["limit"], limit())
            # After each: it takes the better part of an hour, and Ctrl-C leaves what is there.
            (config.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
            report.chart(record, config.out / "chart.png")
    (config.out / "record.json").write_text(json.dumps(record, indent=1) + "\n")
    print(report.table(record))
    print(report.short(record))
    for side, mean in report.means(record).items():
        print(f"dlx is {mean:.2f} times as fast as {side} (geometric mean)")


if __name__ == "__main__":
    main()
