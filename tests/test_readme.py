"""The README is true: its code runs, its table is the records', its figures have a source."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import publish

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def run(args, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_python_blocks_run(tmp_path):
    """All of them, in order, as one script: the notebook's."""
    notebook = [b for b in blocks("python") if "__main__" not in b]
    (tmp_path / "notebook.py").write_text("\n".join(notebook))
    done = run(["-W", "error", "notebook.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(4, 8, 16) " in done.stdout


def test_own_experiment_runs(tmp_path):
    (block,) = [b for b in blocks("python") if "__main__" in b]
    (tmp_path / "spiral.py").write_text(block)
    done = run(["spiral.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/spiral/result.json").read_text())
    assert result["validation"]["validation/accuracy"] > 0.95
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 50


def test_commands_run(tmp_path):
    lines = [line for b in blocks("bash") for line in b.splitlines()]
    commands = [shlex.split(x, comments=True)[1:] for x in lines if x.startswith("python -m")]
    assert len(commands) >= 7
    for command in commands:
        done = run(command, tmp_path)
        assert done.returncode == 0, (command, done.stderr)


def test_ci_runs_the_test_command_of_the_readme():
    command = blocks("bash")[1].strip()
    assert command.endswith("pytest") and command in (ROOT / ".ci/run").read_text().splitlines()


def test_table_is_that_of_the_records():
    table = re.search(f"{re.escape(publish.BEGIN)}\n(.*?){re.escape(publish.END)}", README, re.S)
    assert table is not None and table[1].strip() == publish.table().strip()


def test_figures_outside_the_table_have_no_place_in_the_readme():
    """A percentage in the prose would have no command beside it."""
    prose = re.sub(f"{re.escape(publish.BEGIN)}.*?{re.escape(publish.END)}", "", README, flags=re.S)
    assert not re.findall(r"\d\s*%", prose)


@pytest.mark.parametrize("path", sorted(publish.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_records(path):
    """Every key is there, the mean is that of the values, a figure from memory stays out."""
    r = json.loads(path.read_text())
    keys = (
        "experiment system data command preset metric unit higher_is_better values mean std seeds"
    )
    keys += " target bar paper parameters hardware wall_seconds commit date notes also"
    assert set(r) == set(keys.split())
    assert len(r["values"]) == len(r["seeds"]) == len(r["wall_seconds"])
    assert r["mean"] == pytest.approx(sum(r["values"]) / len(r["values"]), abs=1e-3)
    assert "with changes" not in r["commit"]
    words = r["command"].removeprefix("python -m experiments.")
    row = next(x for x in publish.table().splitlines() if f"[`{words}`]" in x)
    if r["paper"] is not None and r["paper"]["status"] == "memory":
        assert r["paper"]["source"] not in row


def test_a_figure_from_memory_is_left_out_of_the_table(tmp_path, monkeypatch):
    record = {
        "experiment": "x", "system": "X", "data": "d", "command": "c", "metric": "m", "unit": "%",
        "higher_is_better": False, "mean": 1.0, "std": None, "seeds": [0], "target": 2, "also": {},
        "bar": {"value": 3.0, "source": "s"}, "parameters": 1, "wall_seconds": [1.0],
        "hardware": "h", "date": "2026-01-01", "commit": "abc",
        "paper": {"value": 4.75, "source": "somebody", "status": "memory"},
    }  # fmt: skip
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps(record))
    assert "4.75" not in publish.table()
    record["paper"]["status"] = "confirmed"
    (tmp_path / "x.json").write_text(json.dumps(record))
    assert "4.75" in publish.table()
