"""A tiny experiment that waits, or dies, where a test wants it to.

    SLOW=evaluate python -m tests.slow_experiment --workdir DIR

SLOW names a phase: there the process prints "in PHASE" and waits, once, until a file $GO is there
or 30 s have passed. DIE names a point of a save, the second one of the process: there it kills
itself. Neither is a part of the configuration, so that the same command goes on without them.
"""

import os
import pathlib
import shutil
import time

WAITED: set[str] = set()


def at(phase: str, wait: float = 30.0) -> None:
    """Prints and waits where this phase is asked for, once."""
    if os.environ.get("SLOW") != phase or phase in WAITED:
        return
    WAITED.add(phase)
    print(f"in {phase}", flush=True)
    end = time.monotonic() + wait
    while time.monotonic() < end and not os.path.exists(os.environ.get("GO") or "/nowhere"):
        time.sleep(0.05)


at("import")

import dataclasses  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import dlx  # noqa: E402
from dlx import checkpoint, metrics  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """Noisy steps of a few matrices."""

    depth: int = 2  # matrices
    gammas: int = 0  # incomplete gamma functions: each takes XLA a good half second to compile
    width: int = 128  # of the matrices
    learning_rate: float = 0.02  # of plain descent
    run: dlx.Run = dataclasses.field(
        default_factory=lambda: dlx.Run(steps=200, log_every=5, eval_every=50, save_every=20)
    )


PRESETS = {"test": Config()}


def build(config: Config) -> dlx.Experiment:
    def examples(step):
        rng = np.random.Generator(np.random.Philox(key=[config.run.seed, step]))
        return {"x": rng.normal(size=(64, config.width)).astype(np.float32)}

    def init(key, given):
        w = jax.random.normal(key, (config.depth, config.width, config.width)) / config.width
        w = {f"w{i}": w[i] for i in range(config.depth)}
        return {"params": w, "step": jnp.int32(0), "key": key}

    def loss(params, x):
        for i in range(config.depth):
            x = x + jnp.sin(x @ params[f"w{i}"])
        for i in range(config.gammas):
            part = jax.scipy.special.gammainc(1.0 + i + jnp.tanh(x[:, :8]) / 2, 2.0)
            x = jnp.concatenate([x[:, :8] + 0.01 * part, x[:, 8:]], axis=1)
        return jnp.square(jnp.roll(x, 1, axis=1) - x).mean()

    def step(state, batch):
        key = jax.random.fold_in(state["key"], state["step"])
        noise = jax.random.normal(key, batch["x"].shape)
        value, g = jax.value_and_grad(loss)(state["params"], batch["x"] + 0.1 * noise)
        params = jax.tree.map(lambda p, g: p - config.learning_rate * g, state["params"], g)
        return state | {"params": params, "step": state["step"] + 1}, {"loss": value}

    def data(first_step, rows):
        t = first_step
        while True:
            if t == first_step + 6:
                at("data")
            if t == first_step + 9:
                at("train", wait=0)
            if "train" in WAITED:
                time.sleep(0.005)  # or the run may be over before the signal comes
            yield {"x": examples(t)["x"][rows(64)]}
            t += 1

    def measure(state, batch):
        one = jax.value_and_grad(lambda x: loss(state["params"], x[None]))
        value, slope = jax.vmap(one)(batch["x"])
        return {"loss": value, "slope": jnp.abs(slope).mean(1)}

    measured = metrics.evaluator(measure, examples(1_000_000), 64)

    def evaluate(state):
        at("evaluate")
        return measured(state)

    def test(state):
        at("test")
        return measured(state)

    return dlx.Experiment(init, step, data, evals={"validation": evaluate}, test=test)


# ---- Where a save waits or dies ----------------------------------------------------------------


def hook() -> None:
    """Puts the waiting and the dying into what a save calls."""
    from orbax.checkpoint import v1 as ocp

    point, saves = os.environ.get("DIE"), []
    save_async, digests = ocp.save_async, checkpoint._digests
    replace, rmtree = pathlib.Path.replace, shutil.rmtree

    def die(here):
        if here == point and len(saves) == 2:
            os.kill(os.getpid(), 9)

    def save(*args, **kwargs):
        saves.append(None)
        at("copy", wait=2)
        die("before")
        response = save_async(*args, **kwargs)
        die("writing")
        return response

    def digest(folder):
        if saves:  # not where a start verifies
            at("save", wait=2)
            die("written")
        return digests(folder)

    def rename(path, target):
        record = path.name.removesuffix(".json.tmp").isdecimal()
        if record:
            die("sealed")
        replace(path, target)
        if record:
            die("committed")

    def remove(path, *args, **kwargs):
        if pathlib.Path(path).name.isdecimal():
            die("pruning")
        rmtree(path, *args, **kwargs)

    ocp.save_async, checkpoint._digests = save, digest
    pathlib.Path.replace, shutil.rmtree = rename, remove


if __name__ == "__main__":
    if os.environ.get("DIE") or os.environ.get("SLOW") in ("copy", "save"):
        hook()
    dlx.main(Config, build, PRESETS)
