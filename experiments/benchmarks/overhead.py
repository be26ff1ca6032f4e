"""What dlx adds to a training step and to a start. `python -m experiments.benchmarks.overhead N`
prints N rounds of it as one line of JSON.

A step: `dlx.fit` beside the loop that one would write by hand, on the same batches of arrays and
with the same step, jitted and its state donated. The network is small: what counts is the loops.
A start: from `python` to the end of `import dlx`, and to the first trained step of
experiments.digits_cnn whose programs are in the compilation cache, beside `import jax`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SCANNED = 32  # steps in a call
STEPS = {1: 1600, SCANNED: 6400}  # of a turn
FIRST = 6  # calls until the loop runs evenly: it has compiled, and its batches are ahead
LOG_EVERY = 64


def asks(
    init: Callable[[Any], Any], step: Any, data: Any, steps: int, steps_per_call: int = 1
) -> list[float]:
    """When `dlx.fit` asks for each of its batches, in seconds.

    Args:
      init: key -> state.
      step: of an Experiment.
      data: of an Experiment.
      steps: a multiple of steps_per_call.
    """
    import dlx

    asked: list[float] = []

    def batches(first_step: int, rows: Any) -> Any:
        asked.clear()  # before the run one batch is asked for its shapes
        for batch in data(first_step, rows):
            asked.append(time.perf_counter())
            yield batch

    every = LOG_EVERY * 2**30  # no evaluation, no save
    run = dlx.Run(
        steps=steps, log_every=LOG_EVERY, eval_every=every, save_every=every,
        steps_per_call=steps_per_call,
    )  # fmt: skip
    dlx.fit(dlx.Experiment(lambda key, given: init(key), step, batches), run, writers=[])
    return asked


def fit_seconds(init: Any, step: Any, data: Any, steps: int, steps_per_call: int = 1) -> float:
    """Seconds a step of `dlx.fit`, once it runs evenly. The arguments are those of `asks`."""
    first = FIRST * steps_per_call
    asked = asks(init, step, data, first + steps, steps_per_call)
    return (asked[-1] - asked[first - 1]) / steps


def loops() -> dict[str, Callable[[], float]]:
    """{a loop: () -> seconds a step}: dlx.fit and a bare one, of one step and of 32 in a call."""
    import jax
    import optax

    import dlx
    from dlx.data import arrays
    from dlx.models import mlp
    from dlx.nn import losses

    B = 32
    random = np.random.default_rng(0)
    examples = {
        "image": random.normal(size=(40 * B, 8, 8, 1)).astype(np.float32),
        "label": random.integers(0, 10, 40 * B).astype(np.int32),
    }
    model, tx = mlp.MLP((32,)), optax.adam(1e-3)
    step = dlx.make_step(losses.classification(model), tx)
    data = arrays.batches(examples, B, seed=0)
    single = jax.jit(step, donate_argnums=0)
    several = jax.jit(lambda state, b: jax.lax.scan(step, state, b), donate_argnums=0)

    def init(key: Any) -> Any:
        return dlx.train_state(key, model.init(key, examples["image"][:1]), tx)

    def bare(K: int) -> float:
        """NumPy arrays go straight into the call, which is the fastest way to place them."""
        state, stream = jax.jit(init)(jax.random.key(0)), data(0, lambda n: slice(0, n))

        def run(calls: int) -> None:
            nonlocal state
            for _ in range(calls):
                if K == 1:
                    state, _ = single(state, next(stream))
                else:
                    group = [next(stream) for _ in range(K)]
                    state, _ = several(state, jax.tree.map(lambda *x: np.stack(x), *group))
            jax.block_until_ready(state)

        run(FIRST)
        start = time.perf_counter()
        run(STEPS[K] // K)
        return (time.perf_counter() - start) / STEPS[K]

    out: dict[str, Callable[[], float]] = {}
    for K, steps in STEPS.items():
        out[f"bare, K={K}"] = lambda K=K: bare(K)
        out[f"fit, K={K}"] = lambda K=K, steps=steps: fit_seconds(init, step, data, steps, K)
    return out


def starts(folder: Path) -> dict[str, Callable[[], float]]:
    """{what: () -> seconds from the start of a Python}; folder: for the run and its cache."""
    root = Path(__file__).parents[2]
    # Modules are compiled once, as on any machine, and not at every start.
    around = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    around |= {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}

    def imported(code: str) -> float:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=around, cwd=root)
        return time.perf_counter() - begun

    def first_step() -> float:
        """Until its metrics are in the log; the rest of the run is not waited for."""
        run, begun = folder / "run", time.perf_counter()
        log = run / "metrics.jsonl"
        words = [sys.executable, "-m", "experiments.digits_cnn", "--fresh", "--log-every", "1"]
        process = subprocess.Popen(
            [*words, "--workdir", str(run)], env=around, cwd=root,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            while not (log.exists() and log.stat().st_size):
                if process.poll() is not None:
                    raise RuntimeError(f"digits_cnn ended with {process.returncode}")
                time.sleep(0.002)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.wait()
            log.unlink(missing_ok=True)

    return {
        "import jax": lambda: imported("import jax"),
        "import dlx": lambda: imported("import dlx"),
        "from dlx import *": lambda: imported("from dlx import *"),
        "first step": first_step,
    }


def main() -> None:
    rounds = int(sys.argv[1])
    answer, sys.stdout = sys.stdout, sys.stderr  # what is said on the way is no answer
    with tempfile.TemporaryDirectory() as folder:
        what = starts(Path(folder)) | loops()
        for measure in what.values():
            measure()  # compiles, and fills the caches
        seconds: dict[str, list[float]] = {name: [] for name in what}
        names = list(what)
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                seconds[name].append(what[name]())
    print(json.dumps(seconds), file=answer)


if __name__ == "__main__":
    main()
