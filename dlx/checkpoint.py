"""Checkpoints: Orbax holds the arrays, a sealed record beside each step vouches for them.

    checkpoints/300/        what Orbax wrote
    checkpoints/300.json    format, shapes, sha256 of every file, and the loop's own record

The record is written last and by rename: a step without one is unfinished. Orbax itself loads
flipped bits without a word, so nothing is restored before its digests have been compared. Where a
run has several processes all of them save and restore the arrays, and process 0 alone removes,
digests and records.
This is the only file that knows Orbax.
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dlx.errors import BadInput

FORMAT = 1  # of the record; a reader refuses what is newer than itself


class Damaged(Exception):
    """A checkpoint that must not be used; the message names the file."""


# ---- reading ----------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    """The steps that have a record, oldest first; whether they are whole is `verify`'s to say."""
    return sorted(int(p.stem) for p in folder.glob("*.json") if p.stem.isdecimal())


def verify(folder: Path, step: int) -> dict[str, Any]:
    """The record of a step whose every byte is as it was written.

    Raises:
      Damaged: a file is missing, added or changed (named).
      BadInput: a newer dlx wrote it.
    """
    path = folder / f"{step}.json"
    try:
        text = path.read_text()
        record = json.loads(text)["record"]
        intact = text == _seal(record) and isinstance(record["format"], int)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        intact, record = False, {}
    if not intact:
        raise Damaged(f"{path} is damaged")
    if record["format"] > FORMAT:
        raise BadInput(
            f"{path} has format {record['format']} and this dlx reads up to {FORMAT}: "
            "update dlx, or choose another --workdir"
        )
    if not {"files", "leaves"} <= record.keys():
        raise Damaged(f"{path} is damaged")
    found = _digests(folder / str(step))
    for name in sorted({*found, *record["files"]}):
        if found.get(name) != record["files"].get(name):
            what = "missing" if name not in found else "damaged"
            what = what if name in record["files"] else "not part of the checkpoint"
            raise Damaged(f"{folder / str(step) / name} is {what}")
    return record


def newest(
    folder: Path,
    usable: Callable[[int, dict[str, Any]], bool] = lambda step, record: True,
    notify: Callable[[str], None] = print,
) -> tuple[int, dict[str, Any]] | None:
    """(step, record) of the newest whole checkpoint that is `usable`; names what it passes over."""
    for step in reversed(steps(folder)):
        try:
            record = verify(folder, step)
        except Damaged as e:
            notify(f"{e}: the checkpoint before it is used")
            continue
        if usable(step, record):
            return step, record
    return None


def sweep(folder: Path, notify: Callable[[str], None] = print) -> None:
    """Removes what a killed save left behind."""
    if not folder.exists():
        return
    good = {str(s) for s in steps(folder)}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.stem.isdecimal():
            continue
        if path.name not in good:
            notify(f"removing {path}: its save was not finished")
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def discard_after(folder: Path, step: int) -> None:
    """Removes the checkpoints that a run has gone back before: they must not count as newest."""
    for later in steps(folder):
        if later > step:
            _remove(folder, later)


def _remove(folder: Path, step: int) -> None:
    """The record first: without it, what is left is unfinished and swept."""
    (folder / f"{step}.json").unlink(missing_ok=True)
    for path in (folder / str(step), *folder.glob(f"{step}.orbax-checkpoint-tmp*")):
        shutil.rmtree(path, ignore_errors=True)


def restore(folder: Path, step: int, record: Mapping[str, Any], abstract: Any) -> Any:
    """The state of a verified step, on the shardings of `abstract` (any mesh).

    Args:
      abstract: pytree of jax.ShapeDtypeStruct with shardings.

    Raises:
      BadInput: the saved tree has other leaves, shapes or dtypes (the first is named).
    """
    from orbax.checkpoint import v1 as ocp

    saved, wanted = record["leaves"], spec(abstract)
    differ = [k for k in {**saved, **wanted} if saved.get(k) != wanted.get(k)]
    differ.sort(key=lambda k: k in saved and k in wanted)  # what is absent says most
    if differ:
        k, more = differ[0], f" and {len(differ) - 1} more" if len(differ) > 1 else ""
        shown = f"{k}: saved {saved.get(k, 'absent')}, wanted {wanted.get(k, 'absent')}{more}"
        raise BadInput(f"{folder / str(step)} holds another model ({shown}): choose another folder")
    data = jax.tree.map(_abstract_data, abstract)
    tree = ocp.load(str(folder.absolute() / str(step)), {"state": data})
    return jax.tree.map(_from_data, tree["state"], abstract)


def spec(tree: Any) -> dict[str, str]:
    """{path: "float32[3,4]"} of every leaf."""
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}"
        for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# ---- writing ----------------------------------------------------------------------------------


class Saver:
    """Saves in the background, in a thread that no signal can interrupt.

    `save` returns when the arrays have been copied, so that the caller may donate them. A full
    disk is told and survived: training goes on, and the checkpoints before stay. The last save's
    failure is raised by `wait`. All processes of a run must make the same calls.
    """

    def __init__(
        self,
        folder: Path,
        keep: Callable[[list[int], Mapping[str, Any]], set[int]],
        notify: Callable[[str], None] = print,
    ):
        """keep: (steps on disk, newest record) -> the steps that stay. A pure function: what is
        kept does not depend on when a process died."""
        self._folder, self._keep, self._notify = folder, keep, notify
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "dlx-save")
        self._future: concurrent.futures.Future[None] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Starts saving `state` (arrays only) as `step`; overwrites it where it is there."""
        try:
            self.wait()
        except Exception as e:  # tensorstore's own kinds among them
            self._notify(f"the last checkpoint was not saved ({e}): training goes on")
        copied = threading.Event()
        self._future = self._pool.submit(self._save, step, state, dict(record), copied)
        copied.wait()

    def amend(self, step: int, record: Mapping[str, Any]) -> None:
        """Rewrites the record of a saved step, and prunes by it."""
        self.wait()
        if jax.process_index() == 0:
            self._future = self._pool.submit(self._amend, step, dict(record))

    def wait(self) -> None:
        """Returns when everything is on disk; raises what the last save died of."""
        future, self._future = self._future, None
        if future is not None:
            try:
                future.result()
            except KeyboardInterrupt:
                self._future = future
                raise
            except Exception as e:  # tensorstore's own kinds among them
                if "No space left" in str(e):
                    raise OSError(errno.ENOSPC, "No space left on device", str(self._folder)) from e
                raise

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _save(self, step, state, record, copied):
        from orbax.checkpoint import v1 as ocp

        path, first = self._folder.absolute() / str(step), jax.process_index() == 0
        try:
            if first:
                _remove(self._folder, step)
            data = {"state": jax.tree.map(_to_data, state)}  # a dict: a state may be one array
            response = ocp.save_async(str(path), data)
            record |= {"format": FORMAT, "leaves": spec(state)}
            del state, data
            copied.set()
            response.result()  # all processes have written
        except Exception:
            if first:
                _remove(self._folder, step)
            raise
        finally:
            copied.set()
        if first:
            self._commit(step, record | {"files": _digests(path)})

    def _amend(self, step, record):
        old = verify(self._folder, step)
        self._commit(step, {k: old[k] for k in ("format", "leaves", "files")} | record)

    def _commit(self, step, record):
        draft = self._folder / f"{step}.json.tmp"
        with open(draft, "w") as f:
            f.write(_seal(record))
            f.flush()
            os.fsync(f.fileno())
        draft.replace(self._folder / f"{step}.json")
        on_disk = steps(self._folder)
        for old in sorted(set(on_disk) - self._keep(on_disk, record)):
            _remove(self._folder, old)


def _seal(record: Mapping[str, Any]) -> str:
    """A record with its own sha256; read back, it must be this text to the byte."""
    body = json.dumps(record, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({"record": record, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def _digests(folder: Path) -> dict[str, str]:
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as f:
            out[path.relative_to(folder).as_posix()] = hashlib.file_digest(f, "sha256").hexdigest()
    return out


# PRNG keys are saved as the integers they are made of: every reader knows integers. Of an empty
# array, which Orbax refuses, a single zero is saved.
_IMPL = {"key<fry>": "threefry2x32", "key<rbg>": "rbg", "key<urbg>": "unsafe_rbg"}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_data(x: Any) -> Any:
    x = jax.random.key_data(x) if _is_key(x) else x
    return x if x.size else jnp.pad(x.ravel(), (0, 1))  # lies where the state lies


def _from_data(x: Any, like: Any) -> Any:
    if not like.size:
        x = jnp.zeros(_data_shape(like).shape, x.dtype)
    if _is_key(like):
        x = jax.random.wrap_key_data(x, impl=_IMPL[str(like.dtype)])
    return jax.device_put(x, like.sharding)


def _data_shape(x: Any) -> Any:
    return jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x


def _abstract_data(x: Any) -> Any:
    """Shape, dtype and place of what `_to_data` made."""
    data, place = _data_shape(x), x.sharding
    if _is_key(x) or not x.size:
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(data.shape if x.size else (1,), data.dtype, sharding=place)
