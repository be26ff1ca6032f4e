"""`python -m experiments.publish RUN...`: finished runs become the committed record of their
experiment, and the README's table is made anew from all records.

A RUN is a run folder, or a folder of seeds (seed0, seed1, ...). Without RUN only the table is made.
"""

import argparse
import datetime
import json
import math
import re
import statistics
import sys
from pathlib import Path

import dlx
from dlx import guard, runs, writers

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE.parent / "README.md"
BEGIN, END = "<!-- results: written by experiments.publish -->", "<!-- end of results -->"


def record(folders: list[Path]) -> dict:
    """One record of runs that differ by nothing but their seed.

    Raises:
      BadInput: a run is not finished, or the runs are of different configurations.
    """
    stored = [runs.config_of(f) for f in folders]
    for folder in folders:
        if not (folder / "result.json").exists():
            raise dlx.BadInput(f"{folder} is not finished: run its command again")
    first, name = guard.flat(stored[0]["config"]), stored[0]["experiment"]
    for folder, other in zip(folders, stored, strict=True):
        differ = [k for k, v in guard.flat(other["config"]).items() if first.get(k) != v]
        if other["experiment"] != name or set(differ) - {"run.seed"}:
            raise dlx.BadInput(f"{folder} differs from {folders[0]} in {', '.join(differ)}")
    results = [guard.read_json(f / "result.json") for f in folders]
    environments = [guard.read_json(f / "environment.json") for f in folders]
    module = runs.find_experiment(name)
    preset = stored[0]["preset"]
    card = module.CARD | module.CARD.get("presets", {}).get(preset, {})
    seeds = [r["seed"] for r in results]
    if len(set(seeds)) < len(seeds):
        raise dlx.BadInput(f"seeds {seeds}: each may be published once")

    def values(metric: str) -> list[float]:
        group, _, key = metric.partition("/")
        scale = 100 if card["unit"] == "%" else 1
        rows = [r["test"] if group == "test" else {k.removeprefix(f"{group}/"): v
                for k, v in r[group].items()} for r in results]  # fmt: skip
        if key == "error":
            return [round(scale * (1 - row["accuracy"]), 4) for row in rows]
        return [round(scale * row[key], 4) for row in rows]

    def mean(metric: str) -> float:
        return round(statistics.mean(values(metric)), 4)

    bar, env = card["bar"], environments[0]
    versions = [f"{name} {env['packages'][name]}" for name in ("jax", *card.get("packages", ()))]
    return {
        "experiment": name,
        "system": card["system"],
        "data": card["data"],
        "command": command(name, module, preset, stored[0]["config"], seeds),
        "preset": preset,
        "metric": card["metric"],
        "unit": card["unit"],
        "higher_is_better": card["higher_is_better"],
        "values": values(card["metric"]),
        "mean": mean(card["metric"]),
        "std": round(statistics.stdev(values(card["metric"])), 4) if len(seeds) > 1 else None,
        "seeds": seeds,
        "target": card["target"],
        "bar": {"value": bar.get("value") or mean(bar["metric"]), "source": bar["source"]},
        "paper": card["reported"],
        "parameters": results[0]["parameters"],
        "hardware": f"{env['processor']}, {env['cores']} core{'s' * (env['cores'] > 1)} "
        f"({env['device']}), "
        f"{', '.join(versions)}, Python {env['python']}",
        "wall_seconds": [round(seconds(f), 1) for f in folders],
        "commit": ", ".join(sorted({commit(e) for e in environments})),
        "date": datetime.date.today().isoformat(),
        "notes": card.get("notes", ""),
        "also": {label: mean(metric) for label, metric in card.get("also", {}).items()},
    }


def command(name: str, module, preset: str, config: dict, seeds: list[int]) -> str:
    """What reproduces the runs: the preset, and the fields that differ from it."""
    import dataclasses

    words = ["python", "-m", f"experiments.{name}"]
    if preset != next(iter(module.PRESETS)):
        words += ["--preset", preset]
    usual = guard.flat(json.loads(json.dumps(dataclasses.asdict(module.PRESETS[preset]))))
    for key, value in guard.flat(config).items():
        if usual.get(key) != value and key != "run.seed":
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{key.removeprefix('run.').replace('_', '-')}", text]
    whole = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    many = f"{seeds[0]}..{seeds[-1]}" if whole else ",".join(map(str, seeds))
    return " ".join([*words, *(["--seeds", many] if len(seeds) > 1 else ["--seed", str(seeds[0])])])


def commit(environment: dict) -> str:
    changed = "" if environment["clean"] else " with changes"
    return f"{(environment['commit'] or 'unknown')[:12]}{changed}"


def seconds(folder: Path) -> float:
    """Of all starts together, as each one's last row of timing.jsonl has it."""
    total = last = 0.0
    for row in writers.read(folder / "timing.jsonl"):
        now = row.get("timing/seconds", 0.0)
        total, last = total + (last if now < last else 0.0), now
    return total + last


def decimals(value: float, unit: str) -> int:
    """Two of a percentage; of others so many that four digits are shown.

    >>> decimals(93.5, "%"), decimals(0.375, "nats"), decimals(28.4, "BLEU"), decimals(454.2, "MW")
    (2, 4, 2, 1)
    """
    return 2 if unit == "%" or not value else max(0, 3 - math.floor(math.log10(abs(value))))


def shown(value: float, unit: str) -> str:
    return f"{value:.{decimals(value, unit)}f}"


def table() -> str:
    """The README's table, and under it a line a record on where it was made and what stands beside
    its figure; from all records."""
    lines = [
        "| `python -m experiments.`… | system, data | metric | ours: mean ± sd (seeds) | target | "
        "bar | paper | parameters | seconds a seed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for path in sorted(RESULTS.glob("*.json")):
        r = json.loads(path.read_text())
        unit = r["unit"]
        words = r["command"].removeprefix("python -m experiments.")
        spread = f" ± {r['std']:.{decimals(r['mean'], unit)}f}" if r["std"] is not None else ""
        paper = r["paper"] or {"status": "memory"}
        # A figure that nobody has read in its source stays out of the README.
        known = paper["status"] != "memory"
        sign = "≥" if r["higher_is_better"] else "≤"
        cells = [
            f"[`{words}`](experiments/{r['experiment']}.py)",
            f"{r['system']}, {r['data']}",
            f"{r['metric']}, {r['unit']}",
            f"**{shown(r['mean'], unit)}**{spread} ({len(r['seeds'])})",
            f"{sign} {r['target']}",
            f"{shown(r['bar']['value'], unit)} ({r['bar']['source']})",
            f"{paper['value']} ({paper['source']}, {paper['status']})" if known else "–",
            f"{r['parameters']:,}",
            f"{statistics.median(r['wall_seconds']):,.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        beside = "; ".join(f"{k} {shown(v, unit)}" for k, v in r["also"].items())
        notes.append(
            f"- [`{path.stem}`](experiments/results/{path.name}): {r['hardware']}, {r['date']}, "
            f"{r['commit']}." + (f" Beside it: {beside}." if beside else "")
        )
    return "\n".join([*lines, "", "Where each was made, in the same order:", "", *notes])


def write_table() -> None:
    text = README.read_text()
    pattern = re.compile(f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", re.DOTALL)
    if not pattern.search(text):
        raise dlx.BadInput(f"{README.name} lacks the lines {BEGIN} and {END}")
    README.write_text(pattern.sub(lambda m: f"{m[1]}{table()}\n{m[2]}", text))


def expand(folder: Path) -> list[Path]:
    seeds = sorted(folder.glob("seed*"), key=lambda p: int(p.name.removeprefix("seed")))
    return seeds if seeds and not (folder / "config.json").exists() else [folder]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.publish", description=__doc__)
    parser.add_argument("run", nargs="*", type=Path, help="finished run folders")
    folders = [f for run in parser.parse_args().run for f in expand(run)]
    try:
        if folders:
            made = record(folders)
            presets = runs.find_experiment(made["experiment"]).PRESETS
            usual = made["preset"] == next(iter(presets))
            suffix = "" if usual else f"_{made['preset']}"
            path = RESULTS / f"{made['experiment']}{suffix}.json"
            guard.write_json(path, made)
            print(f"{path.relative_to(HERE.parent)}: {made['mean']} {made['unit']}")
        write_table()
    except dlx.BadInput as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
