"""What no file of dlx may do: run what a file says, or import against the layers."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dlx

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for top in ("dlx", "experiments") for p in (ROOT / top).rglob("*.py"))
FORBIDDEN = {
    "pickle": r"\b(?:c?pickle|cloudpickle|dill|joblib)\b",
    "eval(": r"(?<![\w.])eval\(",
    "exec(": r"(?<![\w.])exec\(",
    "yaml.load": r"yaml\.\w*load",
    "marshal": r"\bmarshal\b",
    "shelve": r"\bshelve\b",
    "torch.load": r"torch\.load",
    "allow_pickle=True": r"allow_pickle\s*=\s*(?!False\b)",
    "shell=True": r"shell\s*=\s*(?!False\b)|os\.(?:system|popen)",
    "pmap": r"\bpmap\b",
    "__import__": r"__import__",
}
HEAVY = ("tensorflow", "torch", "matplotlib", "orbax", "flax", "sklearn", "tensorflow_datasets")


def room(path):
    """dlx/nn/losses.py -> dlx.nn.losses"""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def code(text):
    """A source without comments and prose (strings with a blank): what is executed."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            node.value = ""
    return ast.unparse(tree)


def imported(text, module="", package=False):
    """Every module that a source imports, wherever in it, with what it takes from each."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + package] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            yield from ((source, a.name) for a in node.names)


def targets(path):
    """The modules that a file imports; `from dlx import guard` is dlx.guard."""
    text, found = path.read_text(), set()
    for source, name in imported(text, room(path), path.name == "__init__.py"):
        full = f"{source}.{name}" if name else source
        place = ROOT / Path(*full.split("."))
        found.add(full if place.with_suffix(".py").exists() or place.is_dir() else source)
    return found


def within(module, *tops):
    return any(module == top or module.startswith(top + ".") for top in tops)


def allowed(module):
    """What a module of this checkout may import of this checkout; None: anything of dlx."""
    parts = module.split(".")
    if within(module, "experiments.benchmarks"):
        return ("dlx", "experiments.benchmarks")
    if parts[0] == "experiments":
        return ("dlx",)
    if module == "dlx":
        return None
    rooms = {
        "errors": (),
        "experiment": ("dlx.errors",),
        "examples": ("dlx.errors",),
        "metrics": ("dlx.sharding", "dlx.examples", "dlx.errors"),
        "models": ("dlx.nn", "dlx.errors"),
        "nn": ("dlx.nn", "dlx.memory", "dlx.errors"),
        "data": ("dlx.data", "dlx.examples", "dlx.errors"),
        **dict.fromkeys(("checkpoint", "sharding", "step", "guard"), ("dlx.errors",)),
    }
    return rooms.get(parts[1])


def violations(module, modules):
    """The rules of layering that a module breaks by importing `modules`."""
    out, parts = [], module.split(".")
    rooms = allowed(module)
    for m in sorted(modules):
        ours = within(m, "dlx", "experiments", "tests")
        if ours and m != module:
            if parts[0] == "dlx" and not within(m, "dlx"):
                out.append(f"{module} imports {m}: dlx knows no experiment")
            elif rooms is not None and not within(m, *rooms):
                out.append(f"{module} imports {m}: allowed are {', '.join(rooms) or 'none'}")
            elif module == "dlx.loop" and within(
                m, "dlx.step", "dlx.models", "dlx.data", "dlx.nn", "experiments"
            ):
                out.append(f"{module} imports {m}: the loop sees only the contract")
            elif within(module, "dlx") and within(m, "dlx.tasks") and parts[1:2] != ["tasks"]:
                out.append(f"{module} imports {m}: only experiments know the tasks")
        if within(m, "orbax") and module != "dlx.checkpoint":
            out.append(f"{module} imports {m}: only dlx.checkpoint knows Orbax")
        if within(m, "flax") and not within(module, "dlx.models", "dlx.nn"):
            out.append(f"{module} imports {m}: only models and their parts know Flax")
        if within(m, "torch", "tensorflow") and not within(module, "experiments.benchmarks"):
            out.append(f"{module} imports {m}")
        if within(module, "dlx.models") and not (
            ours or within(m, "flax", "jax", "optax", "numpy") or standard(m)
        ):
            out.append(f"{module} imports {m}: a model needs flax, jax, optax and numpy")
    return out


def standard(module):
    return module.split(".")[0] in sys.stdlib_module_names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_what_a_file_says(path):
    text = code(path.read_text())
    for name, pattern in FORBIDDEN.items():
        assert not re.search(pattern, text), f"{name} in {path}"
    for call in re.finditer(r"extractall\(([^)]*)\)", text):
        assert re.search(r"""filter=['"]data['"]""", call[1]), f"unfiltered extractall in {path}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    assert violations(room(path), targets(path)) == []


def test_the_walk_sees_everything():
    """The rules above look at what is there."""
    names = {room(p) for p in SOURCES}
    assert {"dlx", "dlx.loop", "dlx.checkpoint", "dlx.models.cnn", "dlx.nn.losses"} <= names
    assert {"experiments.digits_cnn", "dlx.data.digits"} <= names
    assert "dlx.guard" in targets(ROOT / "dlx" / "loop.py")
    assert "dlx.models.cnn" in targets(ROOT / "experiments" / "digits_cnn.py")
    assert "orbax.checkpoint" in targets(ROOT / "dlx" / "checkpoint.py")
    assert [p for p in SOURCES if "flax.linen" in targets(p)]


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("experiments.a", "from experiments import digits_cnn"),
        ("experiments.a", "import experiments.digits_cnn"),
        ("experiments.a", "from . import digits_cnn"),
        ("experiments.a", "import flax.linen as nn"),
        ("experiments.a", "import torch"),
        ("dlx.models.a", "from dlx.models import cnn"),
        ("dlx.models.a", "from .cnn import SmallCNN"),
        ("dlx.models.a", "from dlx import sharding"),
        ("dlx.models.a", "import dlx"),
        ("dlx.models.a", "import scipy"),
        ("dlx.loop", "from dlx import step"),
        ("dlx.loop", "from dlx.models import cnn"),
        ("dlx.loop", "from dlx.data.digits import load"),
        ("dlx.loop", "def f():\n    from .nn import losses"),
        ("dlx.nn.losses", "from dlx import step"),
        ("dlx.data.arrays", "from dlx import sharding"),
        ("dlx.checkpoint", "from dlx.sharding import path_of"),
        ("dlx.guard", "from dlx import checkpoint"),
        ("dlx.step", "from dlx.metrics import means"),
        ("dlx.metrics", "from dlx import step"),
        ("dlx.examples", "from dlx.data import arrays"),
        ("dlx.runs", "from orbax.checkpoint import v1"),
        ("dlx.runs", "from experiments import digits_cnn"),
        ("dlx.step", "from flax import linen"),
        ("dlx.data.arrays", "if True:\n    import tensorflow.data"),
    ],
)
def test_each_rule_bites(module, line, monkeypatch, tmp_path):
    path = tmp_path / Path(*module.split(".")).with_suffix(".py")
    for folder in ("dlx/models", "dlx/nn", "dlx/data", "experiments"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "__init__.py").touch()
    for source in SOURCES:  # so that names resolve as they do here
        (tmp_path / source.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source.relative_to(ROOT)).touch()
    path.write_text(line)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert violations(module, targets(path))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "yaml.full_load(f)",
        "import marshal",
        "import shelve",
        "torch.load(f)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "run(x, shell=True)",
        "os.system(x)",
        "tar.extractall(path)",
        "jax.pmap(f)",
        "__import__(name)",
    ],
)
def test_each_pattern_bites(line, tmp_path):
    path = tmp_path / "a.py"
    path.write_text(line)
    with pytest.raises(AssertionError):
        test_no_file_runs_what_a_file_says(path)
    path.write_text(
        f'"""Never {line}"""\nmodel.eval(x)\ntar.extractall(path, filter="data")\n# {line}\n'
    )
    test_no_file_runs_what_a_file_says(path)


def test_import_dlx_is_light():
    """It costs little more than `import jax`, and never TensorFlow."""
    code = f"""
import sys, dlx
print(sorted(m for m in {HEAVY!r} if m in sys.modules))
names = [getattr(dlx, name) for name in dlx.__all__]
print(sorted(m for m in {("tensorflow", "torch", "tensorflow_datasets")!r} if m in sys.modules))
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stdout + done.stderr


def test_every_public_name_is_there():
    for name in dlx.__all__:
        assert getattr(dlx, name) is not None
    assert {*dlx.__all__} <= {*dir(dlx)}
    with pytest.raises(AttributeError, match="nonsense"):
        _ = dlx.nonsense
