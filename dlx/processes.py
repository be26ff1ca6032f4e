"""Several processes, one run: how they start, and how they agree.

Every process computes the same program on its part of the devices. Process 0 alone reads and
writes the files of the run folder, and tells the others what it found; what ends one, ends all.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import socket
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlx.errors import BadInput

# ---- How they start ----------------------------------------------------------------------------

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
# A process that ends alone must not wait for the others much longer: they wait for its data.
SHUTDOWN = 30  # seconds


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins the other processes, where there are any. Must come before a device is touched.

    Args:
      coordinator: HOST:PORT of process 0, the same everywhere; empty: SLURM's variables and those
        of a TPU pod are asked. On an ordinary machine nothing happens then.
      processes: how many there are.
      process: which this one is, from 0.

    Raises:
      BadInput: the three do not go together, or the port is in use.
    """
    if jax.distributed.is_initialized():
        return
    if (coordinator, processes, process) == ("", 0, -1):
        if _slurm() or _pod():
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN)
        return
    if not coordinator or not processes or process == -1:
        raise BadInput(
            f"coordinator {coordinator!r}, processes {processes} and process {process} belong "
            "together: give all three, or none"
        )
    address = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    if not address:
        raise BadInput(f"coordinator {coordinator!r} is no address: write HOST:PORT of process 0")
    if not 1 <= (port := int(address[1])) <= 65535:
        raise BadInput(f"coordinator {coordinator!r} has port {port}: give one from 1 to 65535")
    if processes < 1:
        raise BadInput(f"processes is {processes}: it must be at least 1")
    if not 0 <= process < processes:
        raise BadInput(f"process is {process}: of {processes} they are 0 to {processes - 1}")
    if process == 0:
        _check_port(port)
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        cluster_detection_method="deactivate",  # else SLURM's would choose the devices
        shutdown_timeout_seconds=SHUTDOWN,
    )


def _check_port(port: int) -> None:
    """A port that is in use is a line here; in JAX it is a segmentation fault."""
    both = socket.has_dualstack_ipv6()  # as JAX opens it: on all addresses
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as e:
        why = os.strerror(e.errno or 0)
        raise BadInput(f"port {port} cannot be had ({why}): give all processes another") from e


def _slurm() -> bool:
    """A task of several that srun started; a batch script, which runs once, has no step."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    return all(v in os.environ for v in SLURM) and tasks.isdecimal() and int(tasks) > 1


def _pod() -> bool:
    """A host of a TPU pod: GKE tells so by a variable, other hosts' metadata names the workers."""
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in os.environ:
            return "," in os.environ[name]
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not chips or "TPU_SKIP_MDS_QUERY" in os.environ or not importlib.util.find_spec("libtpu"):
        return False
    asked = urllib.request.Request(
        METADATA + "worker-network-endpoints", headers={"Metadata-Flavor": "Google"}
    )
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return b"," in answer.read()
    except OSError:  # a TPU elsewhere than on Google's hosts, as notebooks have
        return False


# ---- How they agree ----------------------------------------------------------------------------


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def told(fn: Callable[[], Any]) -> Any:
    """What `fn` gives in process 0, in all of them; nowhere else is it called.

    Args:
      fn: gives plain values (JSON).

    Raises:
      BadInput: in all processes, where `fn` raises it.
    """
    if jax.process_count() == 1:
        return fn()
    from jax.experimental import multihost_utils

    body = b""
    if first():
        said, value = None, None
        try:
            value = fn()
        except BadInput as e:
            said = str(e)
        body = json.dumps([said, value]).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(body))))
    body = np.frombuffer(body or bytes(size), np.uint8)
    body = np.asarray(multihost_utils.broadcast_one_to_all(body)).astype(np.uint8).tobytes()
    said, value = json.loads(body)
    if said is not None:
        raise BadInput(said)
    return value


def agreed(fn: Callable[[], Any]) -> Any:
    """fn(), called in every process; a BadInput in one of them is raised in all.

    Args:
      fn: does nothing that processes do together: one may fail where another does not.
    """
    if jax.process_count() == 1:
        return fn()
    from jax.experimental import multihost_utils

    out, said = None, b""
    try:
        out = fn()
    except BadInput as e:
        said = str(e).encode()[:500]
    heard = multihost_utils.process_allgather(np.frombuffer(said.ljust(500, b"\0"), np.uint8))
    for line in np.asarray(heard).astype(np.uint8):
        if text := line.tobytes().rstrip(b"\0"):
            raise BadInput(text.decode(errors="replace"))
    return out


def alike(values: Mapping[str, Any]) -> None:
    """Holds that all processes were asked for the same: else each would train something else.

    Args:
      values: {name: plain value}.

    Raises:
      BadInput: in all processes, where one has another value than process 0.
    """
    own = {k: repr(v) for k, v in values.items()}
    wanted = told(lambda: own)

    def compare() -> None:
        for k in {**wanted, **own}:
            a, b = wanted.get(k, "absent"), own.get(k, "absent")
            if a != b:
                raise BadInput(
                    f"process {jax.process_index()} has {k} {b}, process 0 has {a}: "
                    "start all with the same"
                )

    agreed(compare)


def wait() -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("dlx")


_calls = itertools.count(1)


def stopping() -> bool:
    """Whether to stop here: True in the same call in all processes, some steps after SIGTERM came
    to one of them. To be called before every step; the device is not waited for."""
    if jax.process_count() == 1:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(next(_calls)))
