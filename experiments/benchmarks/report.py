"""What a record of the benchmark says: lines beside what was wanted, means, and a chart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

LEAST = 0.95  # times as fast, against flax and PyTorch's default; of scanned steps against single
COMPILE = 2.0  # times flax's seconds to compile
END_TO_END = 0.97  # of the speed on one batch, data read and augmented
MEANS = {"flax": 1.6, "the best of PyTorch": 1.0}  # geometric, over the rows
OVERHEAD = {  # of the loop and of a start: what it is, and the most that it may be
    "loop_us_k1": ("the loop adds to a step, us", 250),
    "loop_ratio_k32": ("32 steps in a call, of a bare loop's time", 1.5),
    "import_ratio": ("import dlx, of import jax", 1.5),
    "import_all_ratio": ("from dlx import *, of import jax", None),
    "first_step_ratio": ("first step of digits_cnn, of import jax", 4),
}


def table(record: dict[str, Any]) -> str:
    """What was found of the loop, beside what it may be."""
    lines = []

    def line(what: str, found: dict[str, float], bound: str) -> None:
        shown = f"{found['median']:g} ({found['low']:g} to {found['high']:g})"
        lines.append(f"{what:52}{shown:>28}   {bound}".rstrip())

    if found := record.get("overhead"):
        for key, (what, most) in OVERHEAD.items():
            line(what, found[key], f"at most {most}" if most else "")
    for row, result in record["rows"].items():
        if "end_to_end" in result:
            line(
                f"{row}, data read, of one batch's speed",
                result["end_to_end"],
                f"at least {END_TO_END}",
            )
    return "\n".join(lines)


def short(record: dict[str, Any]) -> str:
    """What is below its bar, and why."""
    lines = []
    for key, (what, most) in OVERHEAD.items():
        if most and (found := record.get("overhead", {}).get(key, {}).get("median", 0)) > most:
            lines.append(f"{what}: {found:g}, not {most}")
    for side, mean in means(record).items():
        if mean < MEANS.get(side, 0):
            lines.append(f"geometric mean: {mean:.2f} times as fast as {side}, not {MEANS[side]}")
    for row, found in record["rows"].items():
        sides, ratios = found["sides"], {k: v["median"] for k, v in found["ratios"].items()}
        said = [
            f"{ratios[side]:.2f} times as fast as {side}, not {LEAST}"
            for side in ("flax", "eager")
            if ratios.get(side, math.inf) < LEAST
        ]
        if "scan" in ratios and ratios["scan"] > 1 / LEAST:
            said.append(f"steps in one call take {ratios['scan']:.2f} times as long, not 1/{LEAST}")
        if (whole := found.get("end_to_end", {}).get("median", 1)) < END_TO_END:
            said.append(f"{whole:.2f} of one batch's speed with data read, not {END_TO_END}")
        compiled = [sides.get(side, {}).get("compile_seconds") for side in ("dlx", "flax")]
        if all(compiled) and compiled[0] > COMPILE * compiled[1]:
            said.append(f"compiles {compiled[0] / compiled[1]:.1f} times as long, not {COMPILE}")
        if said:
            lines.append(f"{row}: {'; '.join(said)}. {found['why']}".strip())
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
