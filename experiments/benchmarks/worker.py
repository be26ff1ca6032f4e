"""One side of one row, in a process of its own:
`python -m experiments.benchmarks.worker SIDE ROW FOLDER`.

Prints one line of JSON when it is ready. Then, for every number of steps that it reads, the seconds
that one of them took; a step before them is not counted, for training goes on without a pause. The
side "fit" takes turns itself, with one constant batch, and the side "scan" with single steps, so
that what differs between two processes or two seconds is not taken for the cost of reading, or of
the scan.
`FOLDER` holds the weights to start from; the side "flax" writes them.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import cases, overhead

SIDES = {
    "dlx": "dlx, the state donated",
    "scan": "dlx, 4 steps in a call",
    "fit": "dlx, the whole loop, batches read and augmented as in an experiment",
    "untouched": "dlx, with malloc as it is (DLX_KEEP_MEMORY=0)",
    "flax": "the same model in plain flax.linen under jax.jit",
    "eager": "PyTorch",
    "kept": "PyTorch, with malloc as dlx sets it",
    "channels-last": "PyTorch, torch.channels_last",
    "compile": "PyTorch, torch.compile",
}
SCANNED = 4
PAIRS = 8  # stretches of each kind in a turn of the sides "fit" and "scan", at the most
CHECKED = 3  # first steps, whose losses are reported
COMPILED = 3  # times, by the sides whose time to compile is compared
TORCH = ("eager", "kept", "channels-last", "compile")
MALLOC = {  # the environment of a side
    "flax": {"DLX_KEEP_MEMORY": "0"},
    "untouched": {"DLX_KEEP_MEMORY": "0"},
    "kept": {
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**26),
        "MALLOC_MMAP_MAX_": "0",
    },
}  # fmt: skip


def rows() -> dict[str, Any]:
    """{row: its module}."""
    modules = [
        importlib.import_module(f"{cases.__name__}.{m.name}")
        for m in pkgutil.iter_modules(cases.__path__)
    ]
    return {row: module for module in modules for row in module.ROWS}


def flat(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    """{"params/conv1/kernel": array} of a nested dict."""
    if hasattr(tree, "items"):
        return {k: v for name, x in tree.items() for k, v in flat(x, f"{path}/{name}").items()}
    return {path.removeprefix("/"): np.asarray(tree)}


Turn = Callable[[int], dict[str, float]]  # a number of steps -> {"seconds": of one of them, ...}


def jax_side(side: str, row: str, folder: Path) -> tuple[dict[str, Any], Turn]:
    """(what to report, what runs)."""
    import jax

    from dlx import nn, summary

    # Compilations are timed, but for those of the loop, which begins anew many times in a turn.
    jax.config.update("jax_enable_compilation_cache", side == "fit")
    if side == "fit":
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    case = rows()[row].ours(row)
    report: dict[str, Any] = {"version": f"jax {jax.__version__}"}
    with nn.plain(side == "flax"):
        state = jax.jit(case.init)(jax.random.key(0))
        batch = jax.tree.map(jax.numpy.asarray, case.batch)
        if side == "flax":
            np.savez(folder / "weights.npz", allow_pickle=False, **flat(case.weights(state)))
            np.savez(folder / "batch.npz", allow_pickle=False, **flat(case.batch))
            report["flops"], _ = summary.flops(jax.make_jaxpr(case.step)(state, batch).jaxpr)
        step, given = case.step, batch
        if side == "scan":
            given = jax.tree.map(lambda x: jax.numpy.stack([x] * SCANNED), batch)

            def step(state: Any, batch: Any) -> Any:
                return jax.lax.scan(case.step, state, batch)

        program, taken = jax.jit(step, donate_argnums=0), []
        for _ in range(COMPILED if side in ("flax", "dlx") else 1):
            jax.clear_caches()
            start = time.perf_counter()
            program.lower(state, given).compile()
            taken.append(time.perf_counter() - start)
        report["compile_seconds"] = float(np.median(taken))

    if side == "fit":
        return report | {"losses": []}, lambda steps: end_to_end(case, steps)

    def stretch(program: Any, batch: Any, calls: int) -> float:
        nonlocal state
        metrics = None
        start = time.perf_counter()
        with nn.plain(side == "flax"):
            for _ in range(calls):
                state, metrics = program(state, batch)
        jax.block_until_ready((state, metrics))
        last.append(metrics)
        return time.perf_counter() - start

    def run(steps: int) -> dict[str, float]:
        return {"seconds": stretch(program, given, steps) / steps}

    single = jax.jit(case.step, donate_argnums=0)

    def scanned(steps: int) -> dict[str, float]:
        calls = -(-steps // SCANNED)
        pairs = min(PAIRS, calls)
        calls //= pairs
        taken = np.empty((pairs, 2))
        for i in range(pairs):
            for j in (0, 1) if i % 2 else (1, 0):  # so that neither is always the second
                what = (single, batch, SCANNED * calls) if j else (program, given, calls)
                taken[i, j] = stretch(*what) / (SCANNED * calls)
        return {"seconds": float(np.median(taken[:, 0])), "singly": float(np.median(taken[:, 1]))}

    last: list[Any] = []

    def loss(metrics: Any) -> np.ndarray:
        value = metrics["loss"]
        return np.ravel(value[0] / value[1] if isinstance(value, tuple) else value)

    if side == "scan":
        stretch(program, given, 1)
        report["losses"] = loss(last[0])[:CHECKED].tolist()
        return report, scanned
    for _ in range(CHECKED):
        run(1)
    report["losses"] = [float(loss(m)[0]) for m in last]
    return report, run


def end_to_end(case: cases.Ours, steps: int) -> dict[str, float]:
    """Seconds a step of `dlx.fit` with batches read and augmented, and "share": the seconds with
    one constant batch, of them. One loop does both, a few steps of each in turn."""
    pairs = min(PAIRS, max(1, steps // 2))
    counted = max(2, 2 * steps // PAIRS)
    stretch = overhead.FIRST + counted  # before it counts, what the last one left is through
    asked = np.array(overhead.asks(*in_turn(case, stretch), 2 * pairs * stretch))
    asked = asked.reshape(pairs, 2, stretch)
    read, constant = ((asked[..., -1] - asked[..., -1 - counted]) / counted).T
    return {"seconds": float(np.median(read)), "share": float(np.median(constant / read))}


def in_turn(case: cases.Ours, stretch: int) -> tuple[Any, Any, Any]:
    """(init, step, data) of an experiment that reads and augments for so many steps, has one batch
    as it is for as many, and so on."""
    import jax
    import jax.numpy as jnp

    from dlx.data import arrays

    def init(key: Any) -> Any:
        return case.init(key), jnp.int32(0)

    def step(state: Any, batch: Any) -> Any:
        inner, i = state
        if case.augment is not None:
            key = jax.random.fold_in(jax.random.key(0), i)
            like = jax.eval_shape(case.augment, key, batch)
            batch = jax.lax.cond(
                i // stretch % 2 == 0,
                case.augment,
                lambda key, batch: jax.tree.map(lambda x, y: x.astype(y.dtype), batch, like),
                key,
                batch,
            )
        inner, metrics = case.step(inner, batch)
        return (inner, i + 1), metrics

    size = len(next(iter(case.batch.values())))
    examples = {k: np.concatenate([x] * cases.BATCHES) for k, x in case.batch.items()}
    read = case.data or arrays.batches(examples, size, seed=0)

    def data(first_step: int, rows: Any) -> Any:
        stream = iter(read(first_step, rows))
        constant = next(stream)
        while True:
            yield from itertools.islice(stream, stretch)
            yield from itertools.repeat(constant, stretch)

    return init, step, data


def torch_side(side: str, row: str, folder: Path) -> tuple[dict[str, Any], Turn]:
    """(what to report, what runs)."""
    import torch  # pyright: ignore[reportMissingImports]

    from experiments.benchmarks import weights

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    wrap = torch.compile if side == "compile" else lambda network: network
    case = rows()[row].theirs(row, wrap)
    weights.load(case.module, dict(np.load(folder / "weights.npz")))
    layout: Any = torch.channels_last if side == "channels-last" else torch.contiguous_format
    case.module.to(memory_format=layout)

    def tensor(x: np.ndarray) -> Any:
        t = torch.from_numpy(x.astype(np.int64) if x.dtype.kind in "iu" else x)
        return t.permute(0, 3, 1, 2).contiguous(memory_format=layout) if t.ndim == 4 else t

    batch = {name: tensor(x) for name, x in np.load(folder / "batch.npz").items()}
    start = time.perf_counter()
    losses = [float(case.step(batch)) for _ in range(CHECKED)]
    seconds = time.perf_counter() - start

    def run(steps: int) -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(steps):
            case.step(batch)
        return {"seconds": (time.perf_counter() - start) / steps}

    report: dict[str, Any] = {"version": f"torch {torch.__version__.partition('+')[0]}"}
    report["losses"] = losses
    if side == "compile":
        report["compile_seconds"] = max(0.0, seconds - CHECKED * run(1)["seconds"])
    return report, run


def peak_mb() -> float:
    """The most memory this process has held, in 1e6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, where a child's ru_maxrss begins at what its parent takes
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    side, row, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    answer, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    kind = torch_side if side in TORCH else jax_side
    report, run = kind(side, row, folder)
    print(json.dumps(report), file=answer, flush=True)
    for line in sys.stdin:
        if side != "fit":  # caches are full of what other sides left: ResNet-18 took 1.2 of it
            run(SCANNED if side == "scan" else 1)
        print(json.dumps(run(int(line)) | {"peak_mb": peak_mb()}), file=answer, flush=True)


if __name__ == "__main__":
    main()
