"""`python -m experiments`: every experiment with its system, paper, data, target and time."""

import ast
from pathlib import Path

from dlx import runs


def card(name: str) -> dict:
    """An experiment's CARD, read without importing it."""
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CARD":
            return ast.literal_eval(node.value)
    raise SystemExit(f"experiments/{name}.py has no CARD")


def main() -> None:
    rows = [("experiment", "system", "paper", "data", "target", "time")]
    for name in runs.experiments():
        c = card(name)
        sign = ">=" if c["higher_is_better"] else "<="
        goal = "" if c["target"] is None else f" {sign} {c['target']}"
        target = f"{c['metric']}{goal} {c['unit']}"
        rows.append((name, c["system"], c["paper"], c["data"], target, c["time"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    print("\npython -m experiments.NAME --help tells what each takes")


if __name__ == "__main__":
    main()
