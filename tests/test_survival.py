"""Real processes are killed, stopped and starved; the same command then ends bitwise the same.

Every comparison is with an undisturbed run of the same configuration: the bytes of metrics.jsonl
and result.json, and every bit of the restored states. Nothing here is allowed a tolerance.
"""

import collections
import contextlib
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlx
from dlx import checkpoint, feed, guard, runs, sharding

ROOT = Path(__file__).parents[1]
DIGITS = ("experiments.digits_cnn", "--preset", "test")
SLOW = ("tests.slow_experiment",)
STOPPED = 75
CACHE = "-".join([  # its own: a kill may cut off what is there
    os.environ["JAX_COMPILATION_CACHE_DIR"], "survival", os.environ.get("PYTEST_XDIST_WORKER", "")
])  # fmt: skip


# ---- processes --------------------------------------------------------------------------------


class Process:
    """`python -m ...` in a process of its own, its output in a file."""

    alive: ClassVar[list] = []
    logs: ClassVar[Path]

    def __init__(self, folder, command, *more, **environment):
        self.log = self.logs / f"{time.monotonic_ns()}"
        self.begun = time.monotonic()
        with open(self.log, "w") as out:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", *command, "--workdir", str(folder), *more],
                cwd=ROOT,
                env=os.environ
                | {"JAX_COMPILATION_CACHE_DIR": CACHE, "PYTHONFAULTHANDLER": "1"}
                | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.alive.append(self)

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def wait_for(self, text, timeout=120):
        """Until the process has printed a text."""
        end = time.monotonic() + timeout
        while text not in self.output:
            assert self.popen.poll() is None, f"it ended before {text!r}:\n{self.output}"
            assert time.monotonic() < end, f"no {text!r} in {timeout} s:\n{self.output}"
            time.sleep(0.01)
        return self

    def send(self, number):
        """A signal -> (exit code, seconds until it ended)."""
        begun = time.monotonic()
        self.popen.send_signal(number)
        return self.end(), time.monotonic() - begun

    def kill_after(self, seconds):
        """kill -9 at that age; whether it came in time."""
        try:
            self.popen.wait(max(0, self.begun + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.popen.kill()
        return self.end() == -signal.SIGKILL

    def end(self, timeout=240):
        """Its exit code; where it does not end, what its threads are at."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.send_signal(signal.SIGABRT)
            self.popen.wait(10)
            raise AssertionError(f"alive after {timeout} s:\n{self.output}") from None
        finally:
            self.popen.kill()
            self.popen.wait()
            self.alive.remove(self)


@pytest.fixture(scope="module", autouse=True)
def logs(tmp_path_factory):
    # What a shell starts in the background may ignore Ctrl-C, and hands that on.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    Process.logs = tmp_path_factory.mktemp("output")


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    for process in list(Process.alive):
        process.popen.kill()
        process.end()


def complete(folder, command, *more, **environment):
    """Runs to the end -> the output."""
    process = Process(folder, command, *more, **environment)
    assert process.end() == 0, process.output
    return process.output


def one_line(process, *texts):
    """The last line says it all and there is no traceback."""
    lines = process.output.splitlines()
    assert "Traceback" not in process.output, process.output
    assert all(text in lines[-1] for text in texts), process.output


# ---- outcomes ---------------------------------------------------------------------------------


def experiment_of(command):
    if command[0] == SLOW[0]:
        from tests import slow_experiment as module
    else:
        from experiments import digits_cnn as module
    return module


def states(folder, command):
    """{step: {path: bytes}} of every whole checkpoint, {} where there is none."""
    module, out = experiment_of(command), {}
    stored = runs.config_of(folder)["config"]
    config = runs.structure(stored, module.Config, folder)
    experiment = module.build(config)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        abstract = jax.eval_shape(experiment.init, jax.random.key(0), None)
    abstract = sharding.place(abstract, sharding.make_mesh("data=1", jax.devices()[:1]))
    saved = folder / "checkpoints"
    for step in checkpoint.steps(saved):
        with contextlib.suppress(checkpoint.Damaged):
            state = checkpoint.restore(saved, step, checkpoint.verify(saved, step), abstract)
            out[step] = {
                sharding.path_of(path): np.asarray(
                    jax.random.key_data(x) if "key" in str(x.dtype) else x
                ).tobytes()
                for path, x in jax.tree_util.tree_leaves_with_path(state)
            }
    return out


def outcome(folder, command):
    """(bytes of metrics.jsonl, bytes of result.json, states)."""
    files = [(folder / name).read_bytes() for name in ("metrics.jsonl", "result.json")]
    return *files, states(folder, command)


def assert_same(folder, command, expected, every_step=True):
    """A run ended as the undisturbed one; where it was stopped on purpose it may keep the
    checkpoints of other steps, and the last and the best must be the same."""
    metrics, result, saved = outcome(folder, command)
    assert metrics == expected[0]
    assert result == expected[1]
    wanted = expected[2]
    if not every_step:
        best = guard.read_json(folder / "result.json")["step"]
        wanted = {s: wanted[s] for s in {best, max(wanted)}}
        saved = {s: x for s, x in saved.items() if s in wanted}
    assert sorted(saved) == sorted(wanted)
    assert saved == wanted
    names = {
        n for step in checkpoint.steps(folder / "checkpoints") for n in (f"{step}.json", f"{step}")
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} == names


class Reference:
    """An undisturbed run."""

    def __init__(self, folder, command):
        os.makedirs(CACHE, exist_ok=True)
        cached, begun = [""], time.monotonic()
        while cached != sorted(os.listdir(CACHE)):  # until nothing had to be compiled
            cached = sorted(os.listdir(CACHE))
            shutil.rmtree(folder, ignore_errors=True)
            begun = time.monotonic()
            if "Error reading persistent" in complete(folder, command):
                shutil.rmtree(CACHE)  # cut off by a kill: it would stay so
                os.makedirs(CACHE)
        self.seconds = time.monotonic() - begun
        self.folder, self.command = folder, command
        self.expected = outcome(folder, command)

    def copy(self, folder):
        """A run that was killed before its result was written."""
        shutil.copytree(self.folder, folder)
        (folder / "result.json").unlink()
        return folder


@pytest.fixture(scope="module")
def digits(logs, tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("digits") / "run", DIGITS)


@pytest.fixture(scope="module")
def slow(logs, tmp_path_factory):
    return Reference(tmp_path_factory.mktemp("slow") / "run", SLOW)


# ---- kill -9 ----------------------------------------------------------------------------------


def phase(folder, output):
    """Where a process was killed, as far as its output and its folder tell."""
    saved = folder / "checkpoints"
    names = {p.name for p in saved.iterdir()} if saved.exists() else set()
    rows = [line for line in output.splitlines() if line.startswith("step")]
    if not output:
        return "import"
    if {n for n in names if n.isdecimal()} != {n[:-5] for n in names if n.endswith(".json")}:
        return "save"
    if [n for n in names if "tmp" in n]:
        return "save"
    if not rows:
        return "compile"
    step, _, steps = rows[-1].split()[1].partition("/")
    if "validation" in rows[-1] and step == steps:
        return "test"
    return "train"


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(("name", "kills"), [("digits", 6), ("slow", 19)])
def test_kills_at_random_moments(name, kills, tmp_path, capsys, request):
    """kill -9 uniformly over a run's life, again and again until it completes; then another."""
    reference = request.getfixturevalue(name)
    command, seconds = reference.command, reference.seconds
    rng, counted, lives = random.Random(0), collections.Counter(), 0
    moments = [(i + rng.random()) / kills for i in range(kills)]  # of a life, evenly spread
    rng.shuffle(moments)
    while counted.total() < kills:
        folder = tmp_path / f"life{lives}"
        while counted.total() < kills and not (folder / "result.json").exists():
            anew = not folder.exists()
            moment = moments.pop() if moments else rng.random()
            process = Process(folder, command)
            if process.kill_after(moment * seconds):
                counted[phase(folder, process.output)] += 1
            else:
                assert process.popen.returncode == 0, process.output
                if anew:  # the machine may have become faster
                    seconds = min(seconds, time.monotonic() - process.begun)
        complete(folder, command)
        assert_same(folder, command, reference.expected)
        lives += 1
    with capsys.disabled():
        print(f"\n{kills} kills over {lives} runs of {seconds:.0f} s: {dict(counted)}")


POINTS = {  # of a save -> whether the step counts as saved
    "before": False,
    "writing": False,
    "written": False,
    "sealed": False,
    "committed": True,
    "pruning": True,
}


@pytest.mark.slow
def test_kills_at_every_point_of_a_save(slow, tmp_path):
    """Nothing before the last commit is lost, and leftovers are swept at the next start."""
    folder, start = tmp_path / "run", 0
    for point, saved in POINTS.items():
        process = Process(folder, SLOW, "--keep", "1", DIE=point)
        assert process.end() == -signal.SIGKILL, (point, process.output)
        first, second = (start // 20 + 1) * 20, (start // 20 + 2) * 20
        start = second if saved else first
        assert checkpoint.newest(folder / "checkpoints")[0] == start, point
        left = {p.name for p in (folder / "checkpoints").iterdir()}
        torn = left != {f"{start}", f"{start}.json"}
        assert torn or point in ("before", "writing"), (point, left)
    said = complete(folder, SLOW, "--keep", "1")
    assert f"resuming {folder} at step {start}" in said and "was not finished" in said
    assert_same(folder, SLOW, slow.expected, every_step=False)
    assert checkpoint.steps(folder / "checkpoints") == [200]


@pytest.mark.slow
def test_cut_off_entries_of_the_compilation_cache(slow, tmp_path):
    """A kill can cut off what JAX was writing there: the next start compiles anew."""
    cache = tmp_path / "cache"
    for name in ("whole", "cut"):
        said = complete(tmp_path / name, SLOW, JAX_COMPILATION_CACHE_DIR=str(cache))
        assert ("Error reading persistent compilation cache" in said) == (name == "cut")
        assert_same(tmp_path / name, SLOW, slow.expected)
        for path in cache.glob("*-cache"):
            path.write_bytes(path.read_bytes()[:-9])


# ---- signals ----------------------------------------------------------------------------------

PHASES = {
    signal.SIGTERM: ("data", "train", "evaluate", "copy", "save", "test"),
    signal.SIGINT: ("train", "evaluate", "save"),
    signal.SIGUSR1: ("data", "train", "copy"),
}


@pytest.mark.slow
def test_signals_in_every_phase(slow, tmp_path):
    """SIGTERM, Ctrl-C and SIGUSR1: exit 75 at once, saved, and the same command goes on."""

    def life(number):
        folder, before = tmp_path / number.name, 0
        for where in PHASES[number]:
            process = Process(folder, SLOW, SLOW=where).wait_for(f"in {where}")
            code, seconds = process.send(number)
            assert code == STOPPED, (where, process.output)
            assert seconds < 15, (where, seconds)  # it waits 30 s there
            assert "the same command goes on" in process.output, (where, process.output)
            assert "Traceback" not in process.output, (where, process.output)
            step, _ = checkpoint.newest(folder / "checkpoints")
            assert step > before or where == "test", (where, step)
            if where == "data":  # it is read ahead of the steps
                assert before + 6 - feed.AHEAD - 1 <= step <= before + 6
            elif where == "train":
                assert step >= before + 9 - feed.AHEAD - 1
            elif where in ("evaluate", "copy"):  # not "save": steps go on while it is written
                assert step % {"evaluate": 50, "copy": 20}[where] == 0, (where, step)
            if where != "test":
                assert f"stopped at step {step}, saved in" in process.output
            before = step
        assert f"resuming {folder} at step {before}" in complete(folder, SLOW)
        assert_same(folder, SLOW, slow.expected, every_step=False)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(life, PHASES))


INTERRUPTED = """
import os, random, signal, sys, threading, tempfile
import jax, jax.numpy as jnp, numpy as np
import dlx
from dlx import checkpoint, guard

def init(key, given):
    return {"step": jnp.int32(0), "keys": list(jax.random.split(key, 8))}

def step(state, batch):
    keys = [jax.random.fold_in(k, state["step"]) for k in state["keys"]]
    return {"step": state["step"] + 1, "keys": keys}, {"x": batch["x"].mean()}

os._exit = lambda code: None  # the watcher's: this process has many runs
rng, run = random.Random(0), dlx.Run(steps=10**6, save_every=10**6, log_every=7)
for i in range(30):
    def data(first_step, rows):
        for t in range(10**6):
            if t == 5:
                threading.Timer(rng.uniform(0.02, 0.1), os.kill, (os.getpid(), 15)).start()
            yield {"x": np.zeros(1, np.float32)}
    folder = tempfile.mkdtemp(dir=sys.argv[2])
    try:
        with guard.signals():
            dlx.fit(dlx.Experiment(init, step, data), run, workdir=folder, writers=[])
    except guard.Stopped:
        print("saved", checkpoint.steps(guard.Path(folder) / "checkpoints"), flush=True)
"""


@pytest.mark.slow
def test_an_interrupt_never_loses_the_state(tmp_path, monkeypatch):
    """SIGTERM while a step runs that has donated the state, PRNG keys in it: 30 of 30 are saved."""
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = Process(tmp_path, ("interrupted",), PYTHONPATH=path)
    assert process.end() == 0, process.output
    assert "stopped within a step" not in process.output, process.output
    assert process.output.count("saved [") == 30 and "saved []" not in process.output


SWALLOWED = """
import gc, os, signal, sys, weakref
import jax.numpy as jnp, numpy as np
import dlx
from dlx import guard

def killed(*ignored):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):  # here the handler runs
        pass

class Thing:
    pass

class Doomed:
    def __del__(self):
        killed()

def destructor():
    Doomed()

def collector():
    gc.callbacks.append(killed)
    gc.collect()
    gc.callbacks.remove(killed)

def reference():
    thing = Thing()
    gone = weakref.ref(thing, killed)
    del thing

def data(first_step, rows):
    for t in range(10**9):
        yield {"x": np.full(1, t, np.float32)}

def step(state, batch):
    return state + 1, {"x": batch["x"].mean()}

def writer(step, values):
    if step == 50:
        globals()[os.environ["WHERE"]]()

with guard.signals(whole_process=True):
    dlx.fit(dlx.Experiment(lambda key, given: jnp.zeros(()), step, data),
            dlx.Run(steps=10**9, log_every=50, eval_every=10**9, save_every=10**9),
            workdir=sys.argv[2], writers=[writer])
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["destructor", "collector", "reference"])
def test_a_signal_comes_again_where_python_ignores_exceptions(where, tmp_path):
    """The run stops and is saved all the same, and silently where the place can be told."""
    (tmp_path / "swallowed.py").write_text(SWALLOWED)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = Process(tmp_path / "run", ("swallowed",), PYTHONPATH=path, WHERE=where)
    assert process.end() == STOPPED, process.output
    assert ("Exception ignored in" in process.output) == (where == "reference"), process.output
    assert "saved in" in process.output
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0] > 50


@pytest.mark.slow
def test_two_signals_do_not_spoil_the_save(slow, tmp_path):
    """An impatient second and third Ctrl-C while the checkpoint is being written."""
    folder = tmp_path / "run"
    process = Process(folder, SLOW, SLOW="save").wait_for("in save")
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        process.popen.send_signal(number)
        time.sleep(0.3)
    assert process.end() == STOPPED, process.output
    assert "Traceback" not in process.output, process.output
    assert checkpoint.newest(folder / "checkpoints")[0] >= 20
    complete(folder, SLOW)
    assert_same(folder, SLOW, slow.expected, every_step=False)


@pytest.mark.slow
def test_signals_while_importing(slow, tmp_path):
    """Before the first line: the system's own end or ours, and nothing left that disturbs."""
    folder = tmp_path / "run"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = Process(folder, SLOW, SLOW="import").wait_for("in import")
        code, seconds = process.send(number)
        assert code in (-number, 128 + number, STOPPED) and seconds < 5, (code, process.output)
    for wait in (0.5, 1.0):
        process = Process(folder, SLOW)
        time.sleep(wait)
        code, _ = process.send(signal.SIGTERM)
        assert code in (-signal.SIGTERM, 143, STOPPED), process.output
    complete(folder, SLOW)
    assert_same(folder, SLOW, slow.expected)


LONG = (*SLOW, "--gammas", "10", "--steps", "40")


@pytest.mark.slow
def test_signals_while_compiling(tmp_path):
    """XLA does not look up while it compiles; with nothing to save the process ends at once."""
    caches = str(tmp_path / "warm")
    process = Process(tmp_path / "a", LONG, JAX_LOG_COMPILES="1", JAX_COMPILATION_CACHE_DIR=caches)
    process.wait_for("Compiling jit(advance)")
    begun = time.monotonic()
    process.wait_for("step  5")
    assert time.monotonic() - begun > 2  # long enough to be hit, and to be told from waiting
    assert process.end() == 0, process.output
    expected = outcome(tmp_path / "a", LONG)
    folder = tmp_path / "b"

    def stopped(number, name):
        cold = str(tmp_path / name)
        process = Process(folder, LONG, JAX_LOG_COMPILES="1", JAX_COMPILATION_CACHE_DIR=cold)
        process.wait_for("Compiling jit(advance)")
        time.sleep(0.3)
        code, seconds = process.send(number)
        assert code == STOPPED, process.output
        assert "the same command goes on" in process.output
        assert "step  5" not in process.output
        assert seconds < 1, seconds

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        stopped(number, f"cold{number}")
        assert checkpoint.steps(folder / "checkpoints") == []
    # With a checkpoint: resumed, it compiles again and there is still nothing new to save.
    process = Process(folder, LONG, SLOW="train", JAX_COMPILATION_CACHE_DIR=caches)
    assert process.wait_for("in train").send(signal.SIGTERM)[0] == STOPPED
    before = checkpoint.steps(folder / "checkpoints")
    stopped(signal.SIGTERM, "cold")
    assert checkpoint.steps(folder / "checkpoints") == before != []
    # Within an evaluation there are steps to save: that is done, and the exit is in order too.
    for path in (tmp_path / "warm").glob("jit_sums*"):
        path.unlink()
    process = Process(folder, LONG, JAX_LOG_COMPILES="1", JAX_COMPILATION_CACHE_DIR=caches)
    process.wait_for("Compiling jit(sums)")
    time.sleep(0.3)
    code, seconds = process.send(signal.SIGTERM)
    assert code == STOPPED and seconds < 15, (code, seconds, process.output)
    assert "stopped at step 40, saved in" in process.output
    complete(folder, LONG, JAX_COMPILATION_CACHE_DIR=caches)
    assert_same(folder, LONG, expected, every_step=False)


# ---- damage -----------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 4
    path.write_bytes(whole)


def largest(folder, step):
    paths = (folder / "checkpoints" / f"{step}").rglob("*")
    return max((p for p in paths if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.slow
def test_damaged_checkpoints(slow, tmp_path):
    """The newest cut off, flipped, gone; the best flipped; all of them: what is whole is used."""
    steps = checkpoint.steps(slow.folder / "checkpoints")
    assert steps == [160, 180, 200]
    damages = {  # -> the step that is left to go on from
        "cut off": ([(truncate, 200)], 180),
        "flipped": ([(flip, 200)], 180),
        "two": ([(flip, 200), (Path.unlink, 180)], 160),
        "all": ([(flip, 200), (flip, 180), (truncate, 160)], 0),
    }

    def life(name):
        folder, (done, start) = slow.copy(tmp_path / name.replace(" ", "")), damages[name]
        named = [largest(folder, step) for _, step in done]
        for (damage, _), path in zip(done, named, strict=True):
            damage(path)
        said = complete(folder, SLOW)
        for path in named:
            assert sum(str(path) in line for line in said.splitlines()) == 1, said
        assert (f"resuming {folder} at step {start}" in said) == (start > 0), said
        assert_same(folder, SLOW, slow.expected)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(life, damages))


@pytest.mark.slow
def test_a_damaged_best_checkpoint(tmp_path):
    """The best one may become the result, so a run goes back before it."""
    command = (*SLOW, "--best", "validation/loss", "max", "--keep", "2")
    reference = Reference(tmp_path / "reference", command)
    best = guard.read_json(reference.folder / "result.json")["step"]
    assert best == 50 and checkpoint.steps(reference.folder / "checkpoints") == [50, 180, 200]
    folder = reference.copy(tmp_path / "run")
    damaged = largest(folder, best)
    flip(damaged)
    said = complete(folder, command)
    assert str(damaged) in said and "the best so far" in said
    assert "resuming" not in said  # nothing whole is left before it
    assert_same(folder, command, reference.expected)


@pytest.mark.slow
def test_a_complete_run_is_left_alone(slow, tmp_path):
    """The same command once more reports, and trains nothing; without checkpoints it says so."""
    folder = Path(shutil.copytree(slow.folder, tmp_path / "run"))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert "is complete" in complete(folder, SLOW)
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}
    assert before == after


# ---- one folder, several processes or seeds -----------------------------------------------------


@pytest.mark.slow
def test_two_processes_on_one_folder(slow, tmp_path):
    """The second is told who is there; the folder is free as soon as that one is dead."""
    folder = tmp_path / "run"
    first = Process(folder, SLOW, SLOW="data").wait_for("in data")
    try:
        for more in ((), ("--fresh",)):
            second = Process(folder, SLOW, *more)
            assert second.end() == 2, second.output
            one_line(second, "error: ", f"process {first.popen.pid} on ", str(folder))
            assert len([x for x in second.output.splitlines() if "error" in x]) == 1
        assert first.popen.poll() is None
    finally:
        first.popen.kill()
        first.end()
    complete(folder, SLOW)
    assert_same(folder, SLOW, slow.expected)


@pytest.mark.slow
def test_several_seeds_survive_a_kill(slow, tmp_path):
    """A folder a seed, each the run that its seed alone makes."""
    folder = tmp_path / "runs"
    process = Process(folder, SLOW, "--seeds", "0..1").wait_for("seed 1,")
    while process.output.count("step  60") < 2:
        time.sleep(0.02)
        assert process.popen.poll() is None, process.output
    process.popen.kill()
    assert process.end() == -signal.SIGKILL
    assert (folder / "seed0" / "result.json").exists()
    assert not (folder / "seed1" / "result.json").exists()
    said = complete(folder, SLOW, "--seeds", "0..1")
    assert f"{folder / 'seed0'} is complete" in said
    assert f"resuming {folder / 'seed1'} at step" in said
    assert sorted(p.name for p in folder.iterdir()) == ["seed0", "seed1"]
    assert_same(folder / "seed0", SLOW, slow.expected)
    complete(tmp_path / "alone", SLOW, "--seed", "1")
    expected = outcome(tmp_path / "alone", SLOW)
    assert expected[0] != slow.expected[0]
    assert_same(folder / "seed1", SLOW, expected)


# ---- divergence -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_that_diverges(tmp_path):
    """Exit 1 and one line; every checkpoint is finite."""
    command = (*DIGITS, "--learning-rate", "1e30", "--save-every", "1", "--log-every", "1")
    folder = tmp_path / "run"
    process = Process(folder, command)
    assert process.end() == 1, process.output
    saved = states(folder, command)
    assert saved and max(saved) < 20
    one_line(process, "diverged: ", "not finite at step", f"good checkpoint is step {max(saved)}")
    assert checkpoint.steps(folder / "checkpoints") == sorted(saved)
    for state in saved.values():
        for path, data in state.items():
            if path.startswith(("params", "ema", "opt_state/0/mu", "batch_stats")):
                assert np.isfinite(np.frombuffer(data, np.float32)).all(), path


def diverging(shown):
    """The state overflows at step 13; the metric shows it, or does not."""

    def init(key, given):
        return {"w": jnp.ones((4,)), "step": jnp.int32(0)}

    def step(state, batch):
        w = jnp.where(state["step"] == 12, jnp.inf, state["w"])
        return {"w": w, "step": state["step"] + 1}, {"loss": w[0] if shown else jnp.float32(1)}

    return dlx.Experiment(init, step)


@pytest.mark.parametrize(
    ("shown", "named"),
    [(True, "loss not finite at step 13"), (False, "state is not finite at step 20")],
)
def test_a_state_that_is_not_finite_is_never_saved(shown, named, tmp_path, mesh):
    """Even where every metric is: the step that is named is the first, or that of the save."""
    run = dlx.Run(steps=40, log_every=20, eval_every=10, save_every=10)
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=rf"{named}.*last good checkpoint is step 10"):
            dlx.fit(diverging(shown), run, workdir=tmp_path / "run", writers=[], mesh=mesh)
        assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10]


# ---- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True
        )
    except OSError as e:
        pytest.skip(f"no file system can be mounted: {e}")
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place, left):
    """Takes all of a disk but `left` bytes; returns what to remove."""
    ballast = place / "ballast"
    with open(ballast, "wb", buffering=0) as f:
        free = shutil.disk_usage(place).free - left
        while free > 0:
            try:
                free -= f.write(bytes(min(free, 4096)))
            except OSError as e:
                assert e.errno == errno.ENOSPC
                break
    return ballast


@pytest.mark.slow
@pytest.mark.parametrize("left", [16384, 0], ids=["checkpoints do not fit", "nothing fits"])
def test_the_disk_fills_up(left, slow, disk, tmp_path):
    """Training goes on or stops with a clear line; what was saved loads; with room it ends."""
    folder, go = disk / "run", tmp_path / "go"
    process = Process(folder, SLOW, SLOW="data").wait_for("in data")
    assert process.send(signal.SIGTERM)[0] == STOPPED
    process = Process(folder, SLOW, SLOW="data", GO=str(go)).wait_for("in data")
    before = states(folder, SLOW)
    (step,) = before
    assert 6 - feed.AHEAD - 1 <= step <= 6  # batches are read ahead of the steps
    ballast = fill(disk, left)
    go.touch()
    code = process.end()
    assert code in (1, 2), process.output  # for its end is not on disk
    # Orbax and asyncio may write tracebacks of their threads between any two of our lines.
    assert re.search(r"error: .*No space left.*same command", process.output), process.output
    assert "dlx/cli.py" not in process.output and "step  10/200" in process.output
    assert states(folder, SLOW) == before
    ballast.unlink()
    assert f"resuming {folder} at step {step}" in complete(folder, SLOW)
    assert_same(folder, SLOW, slow.expected)


@pytest.mark.slow
def test_a_disk_that_is_too_small_is_told_at_once(disk, tmp_path):
    """Two checkpoints must fit: known before anything compiles."""
    ballast = fill(disk, 200_000)
    process = Process(disk / "run", SLOW)
    assert process.end() == 2, process.output
    one_line(process, "free and two checkpoints take", "--workdir")
    ballast.unlink()
