"""Two processes over loopback against one: the same batches, losses, files and ends.

    python -m tests.test_processes PORT PROCESS FOLDER

is what one of two processes computes for `test_meshes_across_processes`.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import dlx
from dlx import checkpoint, processes, sharding
from tests import test_sharding

ROOT = Path(__file__).parents[1]
DIGITS = ("-m", "experiments.digits_cnn", "--preset", "test")
SLOW = ("-m", "tests.slow_experiment", "--steps", "4000", "--log-every", "50", "--eval-every",
        "1000", "--save-every", "100")  # fmt: skip


# ---- Two processes -----------------------------------------------------------------------------


def free_port(low=0, high=0):
    """A port that nobody listens on; of a range, where one is given."""
    for port in range(low, high) if high else [0]:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return s.getsockname()[1]
    raise AssertionError("no port is free")


class Pair:
    """Processes of one command, killed when the test ends, their outputs shown when it fails."""

    def __init__(self, folder, words, each, devices=1):
        """each: a process's (further words, further environment)."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "XLA_FLAGS"))}
        env |= {"JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
        self._files = [(folder / f"out{i}", folder / f"err{i}") for i in range(len(each))]
        self.running = []
        for (out, err), (more, further) in zip(self._files, each, strict=True):
            with open(out, "w") as a, open(err, "w") as b:
                self.running.append(subprocess.Popen(
                    [sys.executable, *words, *more], env=env | further, cwd=ROOT, stdout=a, stderr=b
                ))  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for p in self.running:
            p.kill()
            p.wait()

    def outputs(self):
        return [(a.read_text(), b.read_text()) for a, b in self._files]

    def shown(self):
        return "".join(
            f"\n==== process {i}, {name}\n{text}"
            for i, pair in enumerate(self.outputs())
            for name, text in zip(("stdout", "stderr"), pair, strict=True)
        )

    def ends(self, *codes, seconds=300):
        end = time.monotonic() + seconds
        while any(p.poll() is None for p in self.running) and time.monotonic() < end:
            time.sleep(0.1)
        assert [p.poll() for p in self.running] == list(codes), self.shown()

    def until(self, path, seconds=200):
        """Waits for a file."""
        end = time.monotonic() + seconds
        while not path.exists():
            assert all(p.poll() is None for p in self.running), self.shown()
            assert time.monotonic() < end, self.shown()
            time.sleep(0.02)


def by_flags(folder, words, devices=1, second=()):
    """second: further words of process 1."""
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    return Pair(folder, words, [([*flags, "0"], {}), ([*flags, "1", *second], {})], devices)


def by_slurm(folder, words):
    """Nothing but what srun sets; jax takes the port from the number of the job."""
    low = 65536 - 4096
    variables = {"SLURM_JOB_ID": str(free_port(low, 65536) - low), "SLURM_NTASKS": "2",
                 "SLURM_STEP_NODELIST": "127.0.0.1"}  # fmt: skip
    each = [([], variables | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}) for i in range(2)]
    return Pair(folder, words, each)


def alone(folder, words, devices=2):
    with Pair(folder, words, [([], {})], devices) as one:
        one.ends(0)


def same_end(folder, wanted):
    for name in ("metrics.jsonl", "result.json"):
        assert (folder / name).read_bytes() == (wanted / name).read_bytes(), name


@pytest.fixture(scope="module")
def slow_alone(tmp_path_factory):
    """The run folder of one process with two devices."""
    folder = tmp_path_factory.mktemp("alone")
    alone(folder, [*SLOW, "--workdir", str(folder / "run")])
    return folder / "run"


@pytest.mark.slow
def test_flags_start_two_processes_that_equal_one(tmp_path):
    """Batch statistics, dropout and EMA included; to the byte, for a sum of two has one order."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone(tmp_path, [*DIGITS, "--workdir", str(one)])
    with by_flags(tmp_path, [*DIGITS, "--workdir", str(two)]) as pair:
        pair.ends(0, 0)
        (said, _), (nothing, _) = pair.outputs()
    same_end(two, one)
    assert "result at step" in said and "step 10/60" in said
    assert not [line for line in nothing.splitlines() if "[Gloo]" not in line]
    files = {p.relative_to(two) for p in two.rglob("*") if "checkpoints" not in p.parts}
    wanted = {p.relative_to(one) for p in one.rglob("*") if "checkpoints" not in p.parts}
    assert {p for p in files if "tfevents" not in p.name} == {
        p for p in wanted if "tfevents" not in p.name
    }
    assert len(list(two.rglob("*tfevents*"))) == 1
    environment = json.loads((two / "environment.json").read_text())
    assert environment["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    # Again: both find it complete. And a run that was asked for differently ends both.
    with by_flags(tmp_path, [*DIGITS, "--workdir", str(two)]) as pair:
        pair.ends(0, 0)
        assert "is complete" in pair.outputs()[0][0]
    with by_flags(tmp_path, [*DIGITS, "--workdir", str(two), "--seed", "1"]) as pair:
        pair.ends(2, 2)
        for _, err in pair.outputs():
            assert [line for line in err.splitlines() if line.startswith("error: ")] == [
                err.splitlines()[-1]
            ], err
            assert "another configuration" in err, err


ALONE = {  # what process 1 alone is given, and what both say
    "--seed 1": "process 1 has run.seed 1, process 0 has 0: start all with the same",
    "--mesh data=4": "process 1 has mesh 'data=4', process 0 has '': start all with the same",
    "--data-dir /no/data": "data_dir '/no/data' is no folder: correct it",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", ALONE)
def test_what_one_process_alone_is_asked_for_ends_both(words, tmp_path):
    run = tmp_path / "run"
    with by_flags(tmp_path, [*DIGITS, "--workdir", str(run)], second=words.split()) as pair:
        pair.ends(2, 2)
        for _, err in pair.outputs():
            said = [line for line in err.splitlines() if "[Gloo]" not in line]
            assert said == [f"error: {ALONE[words]}"], err
    assert not run.exists()


@pytest.mark.slow
def test_slurm_starts_two_processes_that_survive_kill_9(tmp_path, slow_alone):
    run = tmp_path / "run"
    words = [*SLOW, "--workdir", str(run)]
    with by_slurm(tmp_path, words) as pair:
        pair.until(run / "checkpoints" / "500.json")
        for p in pair.running:
            p.send_signal(signal.SIGKILL)
        pair.ends(-9, -9)
    assert not (run / "result.json").exists()
    with by_slurm(tmp_path, words) as pair:
        pair.ends(0, 0)
        assert re.search(r"resuming .* at step \d+00\n", pair.outputs()[0][0]), pair.shown()
    same_end(run, slow_alone)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_at_one_step(tmp_path, slow_alone):
    run = tmp_path / "run"
    words = [*SLOW, "--workdir", str(run)]
    with by_flags(tmp_path, words) as pair:
        pair.until(run / "checkpoints" / "200.json")
        pair.running[1].send_signal(signal.SIGTERM)
        pair.ends(75, 75)
        stopped = re.search(r"stopped at step (\d+), saved", pair.outputs()[0][0])
        assert stopped, pair.shown()
    step = int(stopped[1])
    assert 200 < step < 4000 and (run / "checkpoints" / f"{step}.json").exists()
    with by_flags(tmp_path, words) as pair:
        pair.ends(0, 0)
        assert f"at step {step}" in pair.outputs()[0][0]
    same_end(run, slow_alone)


# ---- Meshes ------------------------------------------------------------------------------------

RULES = test_sharding.RULES
MESHES = [
    ("data=4", (), (0, 2, 1, 3)),  # a process's rows are not side by side
    ("data=2,fsdp=2", (), (0, 1, 2, 3)),
    ("fsdp=2,tensor=2", RULES, (0, 1, 2, 3)),
    ("fsdp=2,tensor=2", RULES, (0, 2, 1, 3)),  # both processes need the whole batch
]


def losses(spec, rules, order):
    """What ten steps log, and the state."""
    devices = jax.devices()
    state, history = dlx.fit(
        test_sharding.experiment(np.float32, rules),
        dlx.Run(steps=test_sharding.STEPS, log_every=1),
        mesh=dlx.make_mesh(spec, [devices[i] for i in order]),
        writers=[],
    )
    return [row[k] for row in history for k in sorted(row) if k != "step"], state


def child(port, process, folder):
    """Prints {"losses": of each mesh, ...} as process 0 and 1 have them."""
    processes.start(f"127.0.0.1:{port}", 2, int(process))
    out = {"losses": [], "sums": []}
    for mesh in MESHES:
        found, state = losses(*mesh)
        out["losses"].append(found)
        whole = sharding.fetch(state.params["dense1"]["kernel"])
        out["sums"].append(float(np.abs(whole).sum()))
    # Saved on one mesh, restored on another.
    spec, rules, _ = MESHES[2]
    path = Path(folder)
    run = dlx.Run(steps=5, log_every=1, save_every=5)
    short = test_sharding.experiment(np.float32, rules)
    state, _ = dlx.fit(short, run, mesh=dlx.make_mesh(spec), workdir=path, writers=[])
    mesh = dlx.make_mesh("data=2,fsdp=2")
    step, record = processes.told(lambda: checkpoint.newest(path / "checkpoints"))
    abstract = jax.eval_shape(short.init, jax.random.key(0), None)
    abstract = sharding.place(abstract, mesh)
    restored = checkpoint.restore(path / "checkpoints", step, record, abstract)
    out["restored"] = [
        np.array_equal(sharding.fetch(a), sharding.fetch(b))
        for a, b in zip(
            jax.tree.leaves((restored.params, restored.opt_state)),
            jax.tree.leaves((state.params, state.opt_state)),
            strict=True,
        )
    ]
    # What only one process finds wrong, all are told.
    good = test_sharding.experiment(np.float32)

    def data(first_step, rows):
        if process == "1":
            raise dlx.BadInput("a file is missing on this host: copy it")
        return good.data(first_step, rows)

    out["said"] = []
    unruly = good._replace(rules=(("no leaf", PartitionSpec()),))
    own = int(process)
    for bad, changes in [
        (good._replace(data=data), {}),
        (unruly, {}),
        (good, {"run": dlx.Run(steps=5 + own)}),
        (good, {"mesh": dlx.make_mesh(("data=4", "fsdp=4")[own])}),
        (good, {"workdir": path / process}),
        (good, {"config": {"rate": own}}),
    ]:
        try:
            dlx.fit(bad, **{"run": run, "mesh": mesh, "writers": [], **changes})
        except dlx.BadInput as e:
            out["said"].append(str(e))
    print(json.dumps(out), flush=True)


SAID = [
    "a file is missing",
    "matches no leaf",
    "process 1 has run.steps 6, process 0 has 5",
    "process 1 has mesh.data 1, process 0 has 4",
    "process 1 has workdir",
    "process 1 has rate 1, process 0 has 0",
]


@pytest.mark.slow
def test_meshes_across_processes(tmp_path):
    port = str(free_port())
    each = [([port, str(i), str(tmp_path / "run")], {}) for i in range(2)]
    with Pair(tmp_path, ["-m", "tests.test_processes"], each, devices=2) as pair:
        pair.ends(0, 0)
        first, second = (json.loads(out.splitlines()[-1]) for out, _ in pair.outputs())
    assert first == second
    assert first["restored"] and all(first["restored"])
    for said, wanted in zip(first["said"], SAID, strict=True):
        assert wanted in said
    for mesh, found, total in zip(MESHES, first["losses"], first["sums"], strict=True):
        wanted, state = losses(*mesh)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, err_msg=str(mesh))
        np.testing.assert_allclose(total, float(abs(state.params["dense1"]["kernel"]).sum()), 1e-6)


# ---- How they start ----------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """The calls of jax.distributed.initialize; none is made."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "TPU_")):
            monkeypatch.delenv(name)
    return calls


def test_an_ordinary_machine_starts_nothing(started):
    processes.start()
    assert started == []


SRUN = dict.fromkeys(processes.SLURM, "1") | {"SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("variables", "starts"),
    [
        (SRUN, True),
        (SRUN | {"SLURM_NTASKS": "1"}, False),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, False),  # of sbatch
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, True),
    ],
)
def test_variables_tell_of_others(variables, starts, started, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    processes.start()
    assert [a for a, _ in started] == [()] * starts  # jax finds out by itself


def test_flags_come_before_variables(started, monkeypatch):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    processes.start("host:1234", 4, 3)
    assert [a for a, _ in started] == [("host:1234", 4, 3)]


def test_a_port_in_use_is_told(started):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(dlx.BadInput, match=rf"port {port} cannot be had \(.* in use\): give"):
            processes.start(f"127.0.0.1:{port}", 2, 0)
        assert started == []
        processes.start(f"127.0.0.1:{port}", 2, 1)  # process 0 opens it, not this one
    processes.start(f"127.0.0.1:{port}", 2, 0)
    assert [a[2] for a, _ in started] == [1, 0]


if __name__ == "__main__":
    child(*sys.argv[1:])
