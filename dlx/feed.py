"""Batches on their way to the loop: read by a thread, and put on the devices, two calls ahead."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dlx import sharding
from dlx.errors import BadInput
from dlx.experiment import Experiment, Run

AHEAD = 2  # calls whose batches wait on the devices


def first(experiment: Experiment, mesh: jax.sharding.Mesh) -> Any:
    """The host's part of batch 0, for a look at its shapes."""
    with contextlib.closing(_open(experiment, 0, mesh)) as batches:
        return _take(batches, 1)


@contextlib.contextmanager
def batches(
    experiment: Experiment, start: int, run: Run, mesh: jax.sharding.Mesh
) -> Iterator[Iterator[tuple[int, Any]]]:
    """An iterator of (k, global arrays) from step `start` to the end of the run.

    k is `run.steps_per_call` where so many steps fit, and the leaves are (k, B, ...); elsewhere it
    is 1 and they are (B, ...). Whatever the data raises is raised where its batch is asked for.
    When the context ends the thread has ended and the data is closed.

    Raises:
      BadInput: the data ended before the run did.
    """
    if experiment.data is None:
        yield ((k, {}) for k in _calls(start, run))
        return
    ready: queue.SimpleQueue = queue.SimpleQueue()
    room, stop = threading.Semaphore(AHEAD), threading.Event()

    def read() -> None:
        try:
            with contextlib.closing(_open(experiment, start, mesh)) as source:
                for k in _calls(start, run):
                    room.acquire()
                    if stop.is_set():
                        return
                    ready.put((k, sharding.put(_take(source, k), mesh, lead=int(k > 1))))
        except BaseException as e:  # an interrupt that data raises is the loop's as well
            ready.put(e)

    def given() -> Iterator[tuple[int, Any]]:
        while True:
            item = ready.get()
            room.release()
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=read, name="dlx-feed", daemon=True)
    thread.start()
    try:
        yield given()
    finally:
        stop.set()
        room.release()
        thread.join()  # one that is alive when the process exits would abort it


def _calls(start: int, run: Run) -> Iterator[int]:
    """How many steps each call makes: K where K fit in, so that cadences are met."""
    done, K = start, run.steps_per_call
    while done < run.steps:
        k = K if done % K == 0 and done + K <= run.steps else 1
        yield k
        done += k


def _open(experiment: Experiment, start: int, mesh: jax.sharding.Mesh) -> Any:
    """The host's batches from step `start` on, as a generator."""
    if experiment.data is None:
        yield from itertools.repeat({})
        return
    source = iter(experiment.data(start, sharding.rows(mesh)))
    try:
        yield from source
    finally:
        if close := getattr(source, "close", None):
            close()


def _take(source: Iterator[Any], k: int) -> Any:
    """The next batch, or the next k as one. They are copied, once: batches wait here, while data
    may fill the arrays that it gave anew."""
    group: list[np.ndarray] = []
    form: Any = None
    for i in range(k):
        if (batch := next(source, None)) is None:
            raise BadInput("the data ended before the run did: it must go on for as many steps")
        if k == 1:
            return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, batch)
        if i == 0:
            leaves, form = jax.tree.flatten(batch)
            group = [np.empty((k, *np.shape(x)), np.result_type(x)) for x in leaves]
        for whole, x in zip(group, form.flatten_up_to(batch), strict=True):
            if np.shape(x) != whole.shape[1:] or np.result_type(x) != whole.dtype:
                raise BadInput(
                    f"a batch holds {np.result_type(x)}{list(np.shape(x))} where an earlier one "
                    f"held {whole.dtype}{list(whole.shape[1:])}: all batches must be alike"
                )
            whole[i] = x
    return form.unflatten(group)
