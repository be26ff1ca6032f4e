"""What keeps a run safe: one process a folder, one configuration a folder, finite states, signals.

Nothing here is on the way of a batch. `dlx.fit` uses the first half; only the command line
installs the signal handlers.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dlx.errors import BadInput

FILES = {  # everything a run writes: the folder's README, and all that --fresh removes
    "README.txt": "this list",
    "config.json": "the configuration; a run with another one is refused in this folder",
    "environment.json": "package versions, device, git commit, command of the newest start",
    "metrics.jsonl": "a row a log window or evaluation; a function of configuration and seed",
    "timing.jsonl": "what the clock said: seconds, steps and examples a second",
    "result.json": "the final metrics; there when the run is complete",
    "checkpoints": "a folder a saved step, and beside it a record with every file's sha256",
    "pictures": "learning curves and the experiment's own pictures, PNG",
    "tensorboard": "the same metrics as TensorBoard events",
    "profile": "traces of --profile, for TensorBoard or Perfetto",
    ".lock": "held by the process that trains here",
}
TITLE = "A run folder of dlx."  # README.txt's first line
# How the names begin that may differ between a folder and its resumption.
FREE = ("run.steps_per_call", "run.keep", "sample.")
EVALUATION = ("beams", "alpha", "mirrored")  # what is trained does not depend on them


# ---- the run folder ---------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds the folder for this process; the system lets go of it however the process ends.

    Raises:
      BadInput: another process holds it, or the folder cannot be written.
    """
    import fcntl

    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a+"))
        except OSError as e:
            why = f"cannot write to {folder}: {e.strerror}"
            raise BadInput(f"{why}; choose another --workdir") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise BadInput(
                f"{folder} is in use by {owner}: wait for it, stop it, or choose another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises:
      BadInput: it cannot be parsed (named with line and column).
    """
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as e:
        at = f" (line {e.lineno}, column {e.colno})" if isinstance(e, json.JSONDecodeError) else ""
        raise BadInput(f"{path} is damaged{at}: mend it, or start over with --fresh") from e


def write_json(path: Path, value: Any) -> None:
    """Writes all of it or nothing, whenever the process dies."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    draft.replace(path)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"run.steps": 100, ...}: nested mappings as dotted names."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    out: dict[str, Any] = {}
    for k, v in config.items():
        out |= flat(v, f"{prefix}.{k}" if prefix else str(k))
    return out


def check_config(
    folder: Path, config: Mapping[str, Any], fresh: bool = False, trained: bool = False
) -> None:
    """Makes `folder` the run of `config`, or finds that it is.

    Args:
      fresh: what is there is removed.
      trained: it is only read, and may be decoded by another search than its own.

    Raises:
      BadInput: the folder belongs to another configuration, or to something else entirely.
    """
    path = folder / "config.json"
    fresh_ours = fresh and _ours(folder)
    if fresh and path.exists():
        if not fresh_ours:
            raise BadInput(
                f"{path} is not of dlx, so --fresh removes nothing: choose another --workdir"
            )
        erase(folder)
    if not path.exists():
        # What a start leaves that died before its first line; a folder of seeds or phases.
        known = {".lock", "config.json.tmp", *(["README.txt"] if _ours(folder) else [])}
        strangers = sorted(
            p.name for p in folder.iterdir() if p.name not in known and not _is_run(p)
        )
        if strangers and not fresh_ours:
            raise BadInput(
                f"{folder} holds {strangers[0]!r} and no config.json, so it is no run folder: "
                "choose another --workdir"
            )
        erase(folder)
        readme = "\n".join(f"{name:18}{text}" for name, text in FILES.items())
        (folder / "README.txt").write_text(f"{TITLE}\n\n{readme}\n")
        write_json(path, config)
        return
    old, new = flat(read_json(path)), flat(json.loads(json.dumps(config)))
    differ = [
        f"{k} {old.get(k, 'absent')} -> {new.get(k, 'absent')}"[:39]
        for k in {**old, **new}
        if not k.removeprefix("config.").startswith(FREE)
        and k != "preset"
        and not (trained and k.removeprefix("config.") in EVALUATION)
        and old.get(k, "absent") != new.get(k, "absent")
    ]
    if differ:
        shown = ", ".join(d.removeprefix("config.") for d in differ[:3])
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise BadInput(
            f"{folder} was made with another configuration ({shown}{more}): "
            + ("give what it was made with" if trained else "--fresh starts over")
            + ", or choose another --workdir"
        )


def _ours(folder: Path) -> bool:
    """Whether dlx made the folder: only then may anything in it be removed."""
    readme = folder / "README.txt"
    if readme.is_file() and readme.read_text(errors="replace").startswith(TITLE):
        return True
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and ("run" in config or "run" in flat_keys(config))


def flat_keys(config: Mapping[str, Any]) -> set[str]:
    inner = config.get("config")
    return set(inner) if isinstance(inner, dict) else set()


def _is_run(path: Path) -> bool:
    return path.is_dir() and ((path / "config.json").exists() or (path / ".lock").exists())


def erase(folder: Path) -> None:
    """Removes what a run writes and nothing else: `--workdir ~ --fresh` must cost nobody a home."""
    for name in FILES:
        path = folder / name
        if name == ".lock":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_disk(folder: Path, abstract: Any) -> None:
    """Raises BadInput where two checkpoints of such a state would not fit."""
    need = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    free = shutil.disk_usage(folder).free
    if free < need:
        raise BadInput(
            f"{folder} has {free:,} bytes free and two checkpoints take {need / 1e3:,.0f} kB: "
            "free some, or choose another --workdir"
        )


def environment() -> dict[str, Any]:
    """Versions, devices, git commit and command: what else a result depends on."""
    import importlib.metadata
    import platform
    import subprocess

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    names = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
        "scikit-learn",
        "statsmodels",
        "sacrebleu",
        "tokenizers",
    )
    device, changes = jax.devices()[0], git("status", "--porcelain")
    return {
        "packages": {n: importlib.metadata.version(n) for n in names},
        "python": platform.python_version(),
        "device": f"{jax.device_count()} x {device.device_kind}",
        "platform": device.platform,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "commit": git("rev-parse", "HEAD"),
        "clean": None if changes is None else not changes,
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }  # fmt: skip


def _processor() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---- finite states ----------------------------------------------------------------------------


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """() bool: every floating leaf is finite. One scalar leaves the device."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in leaves] or [jnp.bool_(True)]).all()


# ---- signals (the command line only) ----------------------------------------------------------


class Stopped(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, raised in the main thread; `fit` saves and lets it through."""


unsaved = threading.Event()  # set by fit while it holds a step that no checkpoint has
heard = threading.Event()  # set by fit when `Stopped` has come to where it is caught
_received = threading.Event()
_whole_process = threading.Event()  # nobody needs it after its run has stopped


def leave() -> None:
    """Ends the process with 75 where it is a command's own, once all is on disk. To unwind can
    crash: an interrupted compilation leaves threads that still read what would be freed."""
    if _whole_process.is_set():
        jax.distributed.shutdown()  # with the other processes, where there are any
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(75)


def _ignores_exceptions(frame: Any) -> bool:
    """Python prints and forgets what is raised in a destructor, and in a callback of the garbage
    collector, as JAX has one."""
    callbacks = [getattr(x, "__code__", None) for x in gc.callbacks]
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code in callbacks:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def signals(whole_process: bool = False) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGUSR1 raise `Stopped`, once; a second one cannot spoil the save.

    A Python handler waits for C++ to return, and a compilation takes long. So a watcher thread
    is woken too: where there is nothing to save it ends the process at once, with 75.

    Once the process has joined others, JAX itself receives SIGTERM and tells them all, and the
    loop asks it where to stop; so the other signals are passed on as SIGTERM.
    """
    wanted = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    too_early = threading.Event()
    read, write = os.pipe()
    os.set_blocking(write, False)

    def handler(number, frame):
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)
        elif _ignores_exceptions(frame):
            too_early.set()
        elif not (_received.is_set() or heard.is_set()):
            _received.set()
            raise Stopped(signal.Signals(number).name)

    def watch():
        pending = raised = 0
        while True:
            # Where the handler found that an exception would be lost, or where it was lost all
            # the same, the signal comes again: a quarter of a second later, or a second after the
            # exception, until it is heard. While C++ holds the handler back nothing is lost.
            if not select.select([read], [], [], 0.25 if pending else None)[0]:
                raised = raised + 1 if _received.is_set() else 0
                if not unsaved.is_set() or heard.is_set():
                    pending = raised = 0
                elif raised > 4 or too_early.is_set():
                    raised = 0
                    too_early.clear()
                    _received.clear()
                    os.kill(os.getpid(), pending)
                continue
            byte = os.read(read, 1)[0]
            if not byte:
                return
            if byte not in wanted or jax.distributed.is_initialized():
                continue
            pending = byte
            if not unsaved.is_set():
                print("stopped: nothing new to save; the same command goes on", file=sys.stderr)
                sys.stdout.flush()
                os._exit(75)

    before = {s: signal.signal(s, handler) for s in wanted}
    wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="dlx-signals", daemon=True)
    watcher.start()
    if whole_process:
        _whole_process.set()
    try:
        yield
    finally:
        _whole_process.clear()
        signal.set_wakeup_fd(wakeup)
        for s, old in before.items():
            signal.signal(s, old)
        os.write(write, b"\0")
        watcher.join()
        os.close(read)
        os.close(write)
        _received.clear()
        heard.clear()
