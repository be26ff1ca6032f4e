"""Makes the golden run: ``python -m tests.golden.make``, once for each format of checkpoints.

    run/            what a finished run leaves, without pictures and clocks
    expected.npz    its state and a few predictions, readable by numpy alone

A later dlx must load it bit for bit, so what is committed here is never made anew.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dlx
from dlx import metrics, sharding

HERE = Path(__file__).parent
KEPT = ("config.json", "metrics.jsonl", "result.json", "checkpoints")


@dataclasses.dataclass(frozen=True)
class Config:
    """A small MLP that learns a sum of sines."""

    width: int = 16  # hidden units
    learning_rate: float = 1e-2  # Adam's
    ema: float = 0.9  # decay of the averaged parameters
    run: dlx.Run = dataclasses.field(
        default_factory=lambda: dlx.Run(
            steps=60, seed=7, log_every=20, eval_every=30, save_every=30, keep=1,
            best=("validation/loss", "min"),
        )
    )  # fmt: skip


def examples(step: int) -> dict[str, np.ndarray]:
    """Batch number `step`: {"x": (32, 4), "y": (32, 1)} float32."""
    rng = np.random.Generator(np.random.Philox(key=[1, step]))
    x = rng.uniform(-1, 1, (32, 4)).astype(np.float32)
    return {"x": x, "y": np.sin(3 * x).sum(1, keepdims=True)}


def build(config: Config) -> dlx.Experiment:
    """The experiment: parameters, Adam, averaged parameters, a bfloat16 statistic and a key."""
    tx = optax.adam(config.learning_rate)

    def init(key, given):
        k = jax.random.split(jax.random.fold_in(key, 0))
        params = {
            "hidden": {
                "w": jax.random.normal(k[0], (4, config.width)) / 2,
                "b": jnp.zeros((1, config.width)),
            },
            "head": {"w": jax.random.normal(k[1], (config.width, 1)) / 4, "b": jnp.zeros((1, 1))},
        }
        variables = {"params": params, "stats": {"mean": jnp.zeros((1, 4), jnp.bfloat16)}}
        return dlx.train_state(key, variables, tx, ema=True)

    def apply(params, x):
        h = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"])
        return h @ params["head"]["w"] + params["head"]["b"]

    def loss_fn(params, model_state, batch, key):
        x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
        loss = jnp.square(apply(params, x) - batch["y"]).mean()
        mean = model_state["stats"]["mean"].astype(jnp.float32)
        mean = 0.9 * mean + 0.1 * x.mean(0, keepdims=True)
        return loss, ({"stats": {"mean": mean}}, {})

    def predict(state, x):
        return apply(state.variables["params"], x)

    def measure(state, batch):
        return {"loss": jnp.square(predict(state, batch["x"]) - batch["y"])[:, 0]}

    def data(first_step, rows):
        step = first_step
        while True:
            yield {k: v[rows(32)] for k, v in examples(step).items()}
            step += 1

    return dlx.Experiment(
        init=init,
        step=dlx.make_step(loss_fn, tx, ema=config.ema),
        data=data,
        evals={"validation": metrics.evaluator(measure, examples(10_000), 32)},
        test=metrics.evaluator(measure, examples(10_001), 32),
        predict=predict,
    )


def arrays(state) -> dict[str, np.ndarray]:
    """{path: array} of a state, in dtypes that numpy has: keys and bfloat16 as their bits."""
    out = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        x = np.asarray(x)
        out[sharding.path_of(path)] = x.view(np.uint16) if x.dtype == jnp.bfloat16 else x
    return out


def main() -> None:
    folder = Path("/dev/shm/golden")  # Orbax writes the path down: one that tells nothing
    if folder.exists() or (HERE / "run").exists():
        raise SystemExit(f"{folder} or {HERE / 'run'} is there already")
    config = Config()
    whole = {"experiment": "golden", "preset": "test", "config": dataclasses.asdict(config)}
    try:
        dlx.fit(build(config), config.run, workdir=folder, config=whole, writers=[])
        loaded = dlx.load(folder, build, Config)
        x = examples(10_002)["x"]
        expected = {"inputs": x, "outputs": np.asarray(loaded.predict(x))}
        np.savez_compressed(HERE / "expected.npz", **expected, **arrays(loaded.state))
        (HERE / "run").mkdir()
        for name in KEPT:
            shutil.move(folder / name, HERE / "run" / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
