"""The command line, on a real experiment: what it says, what it writes, what it leaves alone."""

import dataclasses
import functools
import inspect
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import dlx
from dlx import cli, guard
from dlx.data import digits
from dlx.experiment import Run
from experiments import digits_cnn

ROOT = Path(__file__).parents[1]
SMALL = (  # noqa: SIM905
    "--preset test --steps 4 --log-every 2 --eval-every 2 --save-every 2 --best validation/loss min"
).split()


@pytest.fixture(scope="module", autouse=True)
def entry():
    """The name that `python -m experiments.digits_cnn` gives; no classical baselines in this
    process, for they take longer than the rest; optax as it comes."""
    spec = types.SimpleNamespace(name="experiments.digits_cnn")
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(sys.modules["__main__"], "__spec__", spec)
        patch.setattr(digits_cnn, "baselines", dict)
        yield


def main(*args):
    """Runs the command line in this process -> its exit code."""
    with pytest.raises(SystemExit) as end:
        dlx.main(digits_cnn.Config, digits_cnn.build, digits_cnn.PRESETS, [*map(str, args)])
    return end.value.code


def process(*args, cwd, **kwargs):
    """Runs it in a process of its own, which has one device."""
    return subprocess.run(
        [sys.executable, "-m", "experiments.digits_cnn", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a complete run, what the run printed), by a process of its own."""
    folder = tmp_path_factory.mktemp("cli")
    done = process(*SMALL, "--workdir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run", done


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of that folder, to be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained[0], tmp_path / "run")
    return Path("run")


@pytest.fixture
def compiled():
    """The names of the programs that are compiled meanwhile."""
    names = []

    def listen(event, seconds, fun_name=None, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def files(folder):
    """{path: content} of a folder, but for the lock."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Help and parsing ---------------------------------------------------------------------------


def described(config_class):
    """{field: its comment} of a dataclass, from its source."""
    source = inspect.getsource(config_class)
    out = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.M))
    nested = {f.name for f in dataclasses.fields(config_class) if f.name == "run"}
    assert set(out) == {f.name for f in dataclasses.fields(config_class)} - nested
    return out


def one_line(help_text):
    """The help without its boxes and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", help_text).split())


def test_help_describes_every_field(tmp_path):
    done = process("--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    text = one_line(done.stdout)
    fields = described(digits_cnn.Config) | described(Run) | described(cli.Flags)
    assert len(fields) >= 25
    for field, comment in fields.items():
        flag = "--" + field.replace("_", "-")
        line = re.search(rf"{flag} (?:(?!--\w).)*?{re.escape(comment)}", text)
        assert line, f"{flag}: {comment}"
    for word in (*cli.COMMANDS, *digits_cnn.PRESETS, "--preset", digits_cnn.Config.__doc__):
        assert word in text
    assert ">>>" not in text and "dlx." not in text  # nothing of the code's own
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [["-h"], ["eval", "--help"], ["--preset", "test", "--help"]])
def test_help_wherever_it_is_asked_for(args, capsys):
    assert main(*args) == 0
    text = one_line(capsys.readouterr().out)
    assert "rate before the classifier" in text
    assert ("these are those of test" in text) == ("test" in args)


def parse(*args):
    return cli.parse(digits_cnn.Config, digits_cnn.PRESETS, list(args), "digits_cnn")


@pytest.mark.parametrize(
    "args",
    [
        ("--learning-rate", "0.5", "--log-every", "7", "--channels", "1", "2", "3", "--fresh"),
        ("--learning-rate=0.5", "--log-every=7", "--channels", "1", "2", "3", "--fresh"),
        ("--learning_rate", "0.5", "--log_every=7", "--channels", "1", "2", "3", "--fresh"),
        ("train", "--fresh", "--channels", "1", "2", "3", "--log-every", "7", "--learning-rate=.5"),
        ("--preset", "laptop", "--channels", "1", "2", "3", "--log-every", "7", "--fresh",
         "--learning-rate", "5e-1"),
    ],
)  # fmt: skip
def test_all_ways_to_write_a_flag(args):
    base = digits_cnn.PRESETS["laptop"]
    wanted = dataclasses.replace(
        base,
        learning_rate=0.5,
        channels=(1, 2, 3),
        run=dataclasses.replace(base.run, log_every=7),
    )
    assert parse(*args) == ("train", wanted, cli.Flags(fresh=True))


def test_best_and_switches():
    _, config, flags = parse("--best", "validation/accuracy", "max", "--profile", "--seeds", "0..2")
    assert config.run.best == ("validation/accuracy", "max")
    assert flags == cli.Flags(profile=True, seeds="0..2")
    assert parse("--best", "None")[1].run.best is None
    assert parse("--pool", "False", "False", "True")[1].pool == (False, False, True)


@pytest.mark.parametrize("preset", digits_cnn.PRESETS)
def test_presets(preset):
    for args in (["--preset", preset], [f"--preset={preset}"], ["train", "--preset", preset]):
        assert parse(*args) == ("train", digits_cnn.PRESETS[preset], cli.Flags())
    _, config, _ = parse("--dropout", "0.25", "--preset", preset)
    assert config == dataclasses.replace(digits_cnn.PRESETS[preset], dropout=0.25)


def test_the_first_preset_is_the_default():
    assert parse() == ("train", next(iter(digits_cnn.PRESETS.values())), cli.Flags())


@pytest.mark.parametrize(
    ("text", "seeds"), [("", None), ("3", [3]), ("0,2,5", [0, 2, 5]), ("1..4", [1, 2, 3, 4])]
)
def test_seeds(text, seeds):
    assert cli._seeds(text) == seeds


# ---- A run -------------------------------------------------------------------------------------


def test_a_run_in_a_pipe_prints_plain_lines(trained):
    folder, done = trained
    assert done.stderr == ""
    assert not re.search(r"[\r\x1b]", done.stdout)
    lines = done.stdout.splitlines()
    assert lines[0] == "digits_cnn: preset test, seed 0, 4 steps on 1 x cpu"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] in lines[1]
    for step, metric in [
        (2, "loss"), (2, "validation/accuracy"), (4, "loss"), (4, "validation/loss"),
        (4, "test/accuracy"),
    ]:  # fmt: skip
        assert any(re.match(rf"step +{step}/4 .*\b{metric} \d", line) for line in lines)
    result = json.loads((folder / "result.json").read_text())
    (said,) = [line for line in lines if "result at step" in line]
    assert said == f"digits_cnn: result at step {result['step']} of 4, seed 0"
    for key, value in result["validation"].items():
        assert any(line.split() == [key, f"{value:.4f}"] for line in lines)
    assert "run/ (README.txt says what)" in lines[-1] and "pictures" in lines[-1]


def test_the_folder_holds_what_its_readme_says(trained):
    folder, _ = trained
    assert {p.name for p in folder.iterdir()} == set(guard.FILES) - {"profile"}
    readme = (folder / "README.txt").read_text()
    for file, text in guard.FILES.items():
        assert re.search(rf"^{re.escape(file)} +{re.escape(text)}$", readme, re.M)


def test_result(trained):
    result = json.loads((trained[0] / "result.json").read_text())
    assert set(result) == {"step", "steps", "seed", "parameters", "validation", "test"}
    assert result["step"] in (2, 4) and result["steps"] == 4 and result["seed"] == 0
    config = digits_cnn.PRESETS["test"]
    shapes = jax.eval_shape(digits_cnn.build(config).init, jax.random.key(0), None)
    assert result["parameters"] == sum(x.size for x in jax.tree.leaves(shapes.params))
    assert set(result["validation"]) == {"validation/accuracy", "validation/loss"}
    assert set(result["test"]) >= {"accuracy", "loss", "accuracy_svc", "accuracy_1nn"}
    assert result["test"]["accuracy_svc"] > 0.95  # the bar is a real one
    log = rows(trained[0] / "metrics.jsonl")
    losses = {r["step"]: r["validation/loss"] for r in log if "validation/loss" in r}
    assert result["step"] == min(losses, key=losses.__getitem__)
    assert result["validation"]["validation/loss"] == losses[result["step"]]


def test_the_log_knows_no_clock(trained):
    log = rows(trained[0] / "metrics.jsonl")
    kinds = [(r["step"], sorted({k.split("/")[0] for k in r} - {"step"})) for r in log]
    assert kinds == [
        (2, ["train"]), (2, ["validation"]), (4, ["train"]), (4, ["validation"]), (4, ["test"]),
    ]  # fmt: skip
    names = {k for r in log for k in r}
    assert {"train/loss", "train/accuracy", "train/grad_norm", "test/accuracy"} <= names
    assert not [n for n in names if re.search("tim|second|speed|date|clock", n)]


def test_the_clock_has_a_log_of_its_own(trained):
    log = rows(trained[0] / "timing.jsonl")
    assert {k for r in log for k in r} <= {
        "step", "timing/seconds", "timing/steps_per_second", "timing/examples_per_second",
    }  # fmt: skip
    seconds = [r["timing/seconds"] for r in log]
    assert len(seconds) >= 3 and seconds == sorted(seconds) and seconds[0] > 0


def test_environment(trained):
    environment = json.loads((trained[0] / "environment.json").read_text())
    assert set(environment) == {
        "packages", "python", "device", "platform", "processor", "cores", "commit", "clean",
        "command", "mesh",
    }  # fmt: skip
    assert environment["packages"]["jax"] == jax.__version__
    assert set(environment["packages"]) >= {"jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert environment["device"] == "1 x cpu" and environment["platform"] == "cpu"
    assert environment["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert environment["command"].startswith("python -m experiments.digits_cnn --preset test")
    assert environment["cores"] >= 1 and environment["processor"]


def test_configuration(trained):
    stored = json.loads((trained[0] / "config.json").read_text())
    _, config, _ = parse(*SMALL)
    assert stored == json.loads(
        json.dumps(
            {"experiment": "digits_cnn", "preset": "test", "config": dataclasses.asdict(config)}
        )
    )


def test_pictures(trained):
    pictures = sorted((trained[0] / "pictures").glob("*"))
    assert "curves.png" in [p.name for p in pictures] and len(pictures) >= 3
    for path in pictures:
        with Image.open(path) as image:
            assert image.format == "PNG" and image.mode == "RGB"
            pixels = np.asarray(image)
        assert min(pixels.shape[:2]) >= 100
        assert len(np.unique(pixels @ np.array([65536, 256, 1]))) >= 10  # something is drawn
        assert 0.01 < (pixels != 255).any(-1).mean() < 0.99


def test_tensorboard_holds_the_rows_of_the_log(trained):
    from tensorboardX.proto import event_pb2

    (path,) = (trained[0] / "tensorboard").iterdir()
    content, at, found = path.read_bytes(), 0, {}
    while at < len(content):  # length, its checksum, an event, its checksum
        (length,) = struct.unpack_from("<Q", content, at)
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
        for value in event.summary.value:
            found[event.step, value.tag] = value.simple_value
        at += 12 + length + 4
    wanted = {
        (r["step"], k): np.float32(v)
        for r in rows(trained[0] / "metrics.jsonl")
        for k, v in r.items()
        if k != "step"
    }
    assert {k: v for k, v in found.items() if "timing/" not in k[1]} == wanted
    assert (4, "timing/seconds") in found


# ---- Once more ---------------------------------------------------------------------------------


def test_a_complete_run_says_so(run, compiled, capsys):
    before = files(run)
    del compiled[:]
    assert main(*SMALL, "--workdir", "run") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "run is complete; --fresh trains it anew"
    result = json.loads((run / "result.json").read_text())
    assert f"result at step {result['step']} of 4, seed 0" in out[1]
    assert ["test/accuracy", f"{result['test']['accuracy']:.4f}"] in [line.split() for line in out]
    assert compiled == [] and files(run) == before


def test_what_may_change_in_a_folder(run, capsys):
    assert main(*SMALL, "--workdir", "run", "--keep", 9, "--steps-per-call", 2) == 0
    assert "run is complete" in capsys.readouterr().out


def test_a_run_is_resumed(run, capsys):
    """On eight devices where it had one: to the digits that a log shows, the same end."""
    wanted = rows(run / "metrics.jsonl")
    (run / "result.json").unlink()
    (run / "checkpoints" / "4.json").unlink()
    assert main(*SMALL, "--workdir", "run") == 0
    out = capsys.readouterr().out
    assert "resuming run at step 2" in out and "result at step" in out
    found = rows(run / "metrics.jsonl")
    assert found[:2] == wanted[:2]
    for a, b in zip(found, wanted, strict=True):
        shared = {k: v for k, v in b.items() if k not in ("test/accuracy_svc", "test/accuracy_1nn")}
        assert list(a) == list(shared)
        assert a == pytest.approx(shared, rel=1e-4)


def test_another_configuration_is_refused(run):
    before = files(run)
    done = process(*SMALL, "--dropout", 0.25, "--workdir", "run", cwd=Path.cwd())
    assert done.returncode == 2
    assert done.stderr.startswith("error: run was made with another configuration (dropout 0.3 ->")
    assert done.stderr.count("\n") == 1 and files(run) == before


def test_a_typo_in_a_process_of_its_own(tmp_path):
    done = process("--stepz", 10, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --stepz: did you mean --steps?\n"
    assert not list(tmp_path.iterdir())


# ---- eval, summary, load ------------------------------------------------------------------------


def printed(text):
    """(the numbers for people, the line of JSON) of eval."""
    *lines, last = text.splitlines()
    pairs = [line.split() for line in lines if re.fullmatch(r"  [\w/]+ +-?[\d.]+", line)]
    return dict(pairs), json.loads(last)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_eval_prints_what_the_run_recorded(run, split):
    """In a process like the run's own, to the last digit."""
    result = json.loads((run / "result.json").read_text())
    before = files(run)
    args = [] if split == "validation" else ["--split", "test"]
    done = process("eval", "--workdir", "run", *args, cwd=Path.cwd())
    assert (done.returncode, done.stderr) == (0, "")
    assert f"run: checkpoint of step {result['step']}" in done.stdout
    wanted = result["validation"]
    if split == "test":
        wanted = {f"test/{k}": v for k, v in result["test"].items()}
    people, exact = printed(done.stdout)
    assert exact == wanted
    assert people == {k: f"{v:.4f}" for k, v in wanted.items()}
    assert files(run) == before


def test_eval_without_a_validation_part(run, monkeypatch, capsys):
    build = digits_cnn.build

    @functools.wraps(build)
    def bare(config):
        return build(config)._replace(evals={})

    monkeypatch.setattr(digits_cnn, "build", bare)
    assert main("eval", "--workdir", "run") == 2
    assert "has no validation part, it trains on all: --split test" in capsys.readouterr().err


def test_eval_on_eight_devices(run, capsys, cached):
    result = json.loads((run / "result.json").read_text())["validation"]
    cached(True)
    assert main("eval", "--workdir", "run", "--mesh", "data=4,fsdp=2") == 0
    assert not jax.config.jax_enable_compilation_cache  # or programs may wait for each other
    _, exact = printed(capsys.readouterr().out)
    assert exact["validation/accuracy"] == result["validation/accuracy"]
    assert exact["validation/loss"] == pytest.approx(result["validation/loss"], rel=1e-5)


def test_summary(tmp_path, monkeypatch, compiled, capsys):
    monkeypatch.chdir(tmp_path)
    del compiled[:]
    assert main("summary", "--preset", "test", "--batch-size", 16) == 0
    out = capsys.readouterr().out
    config = dataclasses.replace(digits_cnn.PRESETS["test"], batch_size=16)
    shapes = jax.eval_shape(digits_cnn.build(config).init, jax.random.key(0), None)
    n = sum(x.size for x in jax.tree.leaves(shapes.params))
    assert "digits_cnn, preset test" in out
    assert re.search(rf"^parameters +{n:,}$", out, re.M)
    assert re.search(rf"^gradients +{4 * n / 1000:.1f} kB$", out, re.M)
    assert re.search(r"^state +[\d.]+ kB ", out, re.M)
    flops = re.search(r"^FLOPs a step +([\d,]+) \(([\d,]+) an example\)$", out, re.M)
    total, each = (int(x.replace(",", "")) for x in flops.groups())
    assert total > 1e5 and each == round(total / 16)
    assert compiled == [] and not list(tmp_path.iterdir())


def test_load(run):
    result = json.loads((run / "result.json").read_text())
    loaded = dlx.load(run)
    _, config, _ = parse(*SMALL)
    assert loaded.config == config and loaded.step == result["step"]
    assert set(loaded.variables) == {"params", "batch_stats"}
    part = digits.load()["validation"]
    logits = np.asarray(loaded.predict(part["image"]))
    assert logits.shape == (180, 10)
    accuracy = float((logits.argmax(1) == part["label"]).mean())
    assert accuracy == pytest.approx(result["validation"]["validation/accuracy"], rel=1e-12)
    # The averaged parameters are what validation chose, and what predicts.
    for a, b in zip(
        jax.tree.leaves(loaded.variables["params"]), jax.tree.leaves(loaded.state.ema), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert dlx.load(str(run), digits_cnn.build, digits_cnn.Config).step == loaded.step


# ---- Flags of a run -----------------------------------------------------------------------------


def test_profile_and_fresh(tmp_path, monkeypatch, capsys):
    """A trace in the folder; started over, without one, the run gives the same bytes."""
    monkeypatch.chdir(tmp_path)
    args = ["--preset", "test", "--workdir", "run", "--steps", 8, "--log-every", 4]
    assert main(*args, "--profile") == 0
    assert "trace written to run/profile" in capsys.readouterr().out
    traces = [p for p in Path("run/profile").rglob("*") if p.is_file()]
    assert any(p.name.endswith(".xplane.pb") for p in traces)
    assert max(p.stat().st_size for p in traces) > 1000
    before = files(Path("run"))
    Path("run/notes.txt").write_text("mine")
    assert main(*args, "--fresh") == 0
    out = capsys.readouterr().out
    assert "complete" not in out and "resuming" not in out
    after = files(Path("run"))
    assert after.pop("notes.txt") == b"mine"
    assert not Path("run/profile").exists()
    same = ("metrics.jsonl", "result.json", "config.json", "README.txt", "pictures/curves.png")
    assert [f for f in same if after[f] != before[f]] == []
    assert after["timing.jsonl"] != before["timing.jsonl"]


def test_several_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(*SMALL, "--workdir", "run", "--seeds", "0,2") == 0
    out = capsys.readouterr().out
    assert sorted(p.name for p in Path("run").iterdir()) == ["seed0", "seed2"]
    results = [json.loads(Path(f"run/seed{s}/result.json").read_text()) for s in (0, 2)]
    assert [r["seed"] for r in results] == [0, 2]
    losses = [r["validation"]["validation/loss"] for r in results]
    assert losses[0] != losses[1]
    assert "digits_cnn: 2 seeds" in out
    spread = f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}"
    assert any(line.split(maxsplit=1) == ["validation/loss", spread] for line in out.splitlines())
    # eval takes the same flag; --seed 2 alone is the same run.
    assert main("eval", "--workdir", "run", "--seeds", "0,2") == 0
    assert capsys.readouterr().out.count("validation/loss") == 4
    assert main(*SMALL, "--workdir", "run/seed2", "--seed", 2) == 0
    assert "run/seed2 is complete" in capsys.readouterr().out


def test_a_run_that_diverges(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [a.replace("4", "40") for a in SMALL]
    assert main(*args, "--workdir", "run", "--learning-rate", 1e38, "--dropout", 0) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("diverged: ") and captured.err.count("\n") == 1
    assert re.search(r"not finite at step \d+", captured.err)
    assert "learning rate" in captured.err and "checkpoint" in captured.err
    assert not Path("run/result.json").exists()
    train = [r for r in rows(Path("run/metrics.jsonl")) if "train/loss" in r]
    assert np.isfinite([v for r in train for v in r.values()]).all()


# ---- What is not ours ---------------------------------------------------------------------------


def test_fresh_leaves_foreign_files_alone(run):
    """Notes that somebody put into a run folder stay there."""
    (run / "notes.txt").write_text("mine")
    (run / "old").mkdir()
    (run / "old" / "checkpoints").mkdir()
    (run / "old" / "checkpoints" / "1.json").write_text("mine")
    guard.erase(run)
    assert set(files(run)) == {"notes.txt", "old/checkpoints/1.json"}


HOMES = {
    "a home": ["documents/thesis.tex", "pictures/holiday.jpg", "README.txt", ".profile"],
    "pictures alone": ["pictures/holiday.jpg"],
    "a readme alone": ["README.txt"],
    "another program's": ["config.json", "checkpoints/model.pt", "README.txt", "result.json"],
    "a configuration alone": ["config.json"],
}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_what_is_no_run_folder_is_never_touched(home, fresh, tmp_path, monkeypatch, capsys):
    """The names that a run writes are common ones: a folder of pictures is no leftover."""
    monkeypatch.chdir(tmp_path)
    for file in HOMES[home]:
        path = tmp_path / "home" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"name": "mine"}')
    before = files(tmp_path / "home")
    assert main(*SMALL, "--workdir", "home", *fresh) == 2
    assert "--workdir" in capsys.readouterr().err
    assert files(tmp_path / "home") == before


def test_fresh_follows_no_link(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "holiday.jpg").write_text("mine")
    shutil.rmtree(run / "pictures")
    (run / "pictures").symlink_to(elsewhere, target_is_directory=True)
    guard.erase(run)
    assert (elsewhere / "holiday.jpg").read_text() == "mine"
    assert not (run / "pictures").is_symlink()
