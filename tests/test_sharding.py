"""Meshes, rules, and training on eight devices against training on one."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import dlx
from dlx import checkpoint, metrics, sharding
from dlx.nn import losses

# ---- Meshes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("", (8, 1, 1)),
        ("data=8", (8, 1, 1)),
        ("fsdp=8", (1, 8, 1)),
        ("data=4,fsdp=2", (4, 2, 1)),
        ("fsdp=2,data=4", (4, 2, 1)),  # the order of the axes is the mesh's
        (" data = 2 , fsdp = 2 , tensor = 2 ", (2, 2, 2)),
        ("tensor=8", (1, 1, 8)),
    ],
)
def test_mesh(spec, shape):
    mesh = dlx.make_mesh(spec)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.devices.flat) == set(jax.devices())
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)


def test_mesh_of_some_devices():
    mesh = dlx.make_mesh("fsdp=2", jax.devices()[2:4])
    assert list(mesh.devices.flat) == jax.devices()[2:4]


# ---- Rules -------------------------------------------------------------------------------------


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def specs(tree, mesh, rules=()):
    """{path: PartitionSpec} without the Nones at its end."""
    out = {}
    found = sharding.shardings(tree, dlx.make_mesh(mesh), rules)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        axes = list(leaf.spec)
        while axes and axes[-1] is None:
            axes.pop()
        out[sharding.path_of(path)] = P(*axes)
    return out


def test_the_largest_divisible_dimension_is_split_over_fsdp():
    tree = {
        "first": shape(64, 32),
        "last": shape(32, 64),
        "kernel": shape(3, 3, 16, 48),
        "odd": shape(7, 9, 65),  # nothing that 4 divides
        "larger_is_odd": shape(65, 32),
        "vector": shape(4096),
    }
    assert specs(tree, "data=2,fsdp=4") == {
        "first": P("fsdp"),
        "last": P(None, "fsdp"),
        "kernel": P(None, None, None, "fsdp"),
        "odd": P(),
        "larger_is_odd": P(None, "fsdp"),
        "vector": P("fsdp"),
    }
    assert set(specs(tree, "data=8").values()) == {P()}


def test_small_leaves_and_keys_are_replicated():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2048))
    tree = {"small": shape(1016), "large": shape(1024), "key": keys, "scalar": shape()}
    wanted = {"small": P(), "large": P("fsdp"), "key": P(), "scalar": P()}
    assert specs(tree, "fsdp=8") == wanted
    # A rule does not split them either.
    assert specs(tree, "fsdp=8", [("small|key|scalar", P("fsdp"))]) == wanted


def test_the_first_rule_that_is_found_decides():
    tree = {"encoder": {"dense": shape(64, 64)}, "decoder": {"dense": shape(64, 64)}}
    rules = [("decoder/dense$", P(None, "tensor")), ("dense", P(("fsdp", "tensor")))]
    assert specs(tree, "fsdp=4,tensor=2", rules) == {
        "encoder/dense": P(("fsdp", "tensor")),
        "decoder/dense": P(None, "tensor"),
    }


def dense_state(tx):
    variables = {"params": {"dense": {"kernel": shape(64, 96)}, "out": {"kernel": shape(96, 48)}}}
    return jax.eval_shape(lambda v: dlx.train_state(jax.random.key(0), v, tx, ema=True), variables)


@pytest.mark.parametrize(
    ("tx", "moments"),
    [
        (optax.sgd(0.1, 0.9), ("trace",)),
        (optax.adamw(0.1), ("mu", "nu")),
        (optax.MultiSteps(optax.adam(0.1), 2), ("mu", "nu", "acc_grads")),
        (
            optax.multi_transform(
                {"a": optax.adamw(0.1), "b": optax.sgd(0.1, 0.9)}, {"dense": "a", "out": "b"}
            ),
            ("mu", "nu", "trace"),
        ),
    ],
)
def test_optimizer_state_and_average_follow_their_parameter(tx, moments):
    rules = [("dense/kernel$", P("fsdp", "tensor")), ("out/kernel$", P("tensor"))]
    found = specs(dense_state(tx), "fsdp=2,tensor=4", rules)
    dense = {k for k in found if k.endswith("dense/kernel")}
    out = {k for k in found if k.endswith("out/kernel")}
    assert {found[k] for k in dense} == {P("fsdp", "tensor")}
    assert {found[k] for k in out} == {P("tensor")}
    assert {"params/dense/kernel", "ema/dense/kernel"} <= dense
    followers = {part for k in dense | out for part in k.split("/")}
    assert followers >= {*moments, "opt_state"}
    rest = set(found) - dense - out
    assert "key" in rest and {found[k] for k in rest} == {P()}


def test_factors_of_adafactor_take_the_default():
    tx = optax.adafactor(0.1, min_dim_size_to_factor=1)
    variables = {"params": {"kernel": shape(2048, 4096)}}
    state = jax.eval_shape(lambda v: dlx.train_state(jax.random.key(0), v, tx), variables)
    found = specs(state, "fsdp=4,tensor=2", [("kernel$", P("tensor", "fsdp"))])
    assert found["params/kernel"] == P("tensor", "fsdp")
    factors = {k: v for k, v in found.items() if "v_row" in k or "v_col" in k}
    assert len(factors) == 2 and set(factors.values()) == {P("fsdp")}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (("conv/kernel", P("fsdp")), ["'conv/kernel'", "matches no leaf"]),
        (("kernel", P(None, None, "fsdp")), ["params/dense/kernel", "(64, 96)", "'fsdp'"]),
        (("dense/kernel", P(None, ("fsdp", "tensor", "fsdp"))), ["dense/kernel", "'fsdp'"]),
        (("out/kernel", P(None, ("fsdp", "tensor", "data"))), None),  # 48 / 8: it fits
        (("dense/kernel", P("model")), ["dense/kernel", "'model'"]),
        (("dense/kernel", P("fsdp", "fsdp")), ["dense/kernel", "'fsdp'"]),
    ],
)
def test_a_rule_that_cannot_hold_is_told(rule, said):
    state = dense_state(optax.adam(0.1))
    if said is None:
        assert specs(state, "fsdp=4,tensor=2", [rule])["params/out/kernel"] == rule[1]
        return
    with pytest.raises(dlx.BadInput) as error:
        specs(state, "fsdp=4,tensor=2", [rule])
    message = str(error.value)
    assert "\n" not in message and len(message) <= 200
    for word in said:
        assert word in message


def test_sizes_that_do_not_divide_are_told():
    tree = {"params": {"table": shape(1001, 8)}}
    with pytest.raises(dlx.BadInput, match=r"params/table of shape \(1001, 8\).*fsdp=8"):
        specs(tree, "fsdp=8", [("table", P("fsdp"))])


# ---- Training ----------------------------------------------------------------------------------

STEPS = 10
RULES = (("dense1/kernel$", P("fsdp", "tensor")), ("dense2/kernel$", P("tensor", "fsdp")))


class MLP(nn.Module):
    """Every weight large enough to be split."""

    @nn.compact
    def __call__(self, x):
        dtypes = {"dtype": x.dtype, "param_dtype": x.dtype}
        x = jnp.tanh(nn.Dense(128, name="dense1", **dtypes)(x))
        x = jnp.tanh(nn.Dense(64, name="dense2", **dtypes)(x))
        return nn.Dense(16, name="dense3", **dtypes)(x)


def experiment(dtype, rules=(), accumulate=1, interrupt_at=None):
    """Dropout noise, EMA and clipping included: whatever could depend on the layout."""
    tx = optax.sgd(0.1, 0.9, nesterov=True)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 32)).astype(dtype)
    arrays = {"x": x, "label": (x[:, 0] > 0).astype(np.int32) + 2 * (x[:, 1] > 0)}
    interrupts = [interrupt_at]

    def losses_of(params, batch):
        logits = MLP().apply({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])

    def loss_fn(params, model_state, batch, key):
        noise = jax.random.normal(key, batch["x"].shape, batch["x"].dtype)
        batch = {**batch, "x": batch["x"] + 0.1 * noise}
        return losses_of(params, batch).mean(), (model_state, {})

    def init(key, given):
        return dlx.train_state(key, MLP().init(key, jnp.zeros((1, 32), dtype)), tx, ema=True)

    def data(first_step, rows):
        for step in range(first_step, STEPS + 1):
            if step == interrupts[0]:
                interrupts.clear()
                raise KeyboardInterrupt
            index = np.random.Generator(np.random.Philox(key=[1, step])).permutation(96)
            yield {k: v[index[:64][rows(64)]] for k, v in arrays.items()}

    return dlx.Experiment(
        init=init,
        step=dlx.make_step(loss_fn, tx, ema=0.9, clip_norm=1.0, accumulate=accumulate),
        data=data,
        evals={
            "validation": metrics.evaluator(
                lambda state, batch: {"loss": losses_of(state.ema, batch)}, arrays, 20
            )
        },
        rules=rules,
    )


def train(spec, dtype, *, devices=8, workdir=None, **kwargs):
    """(losses and gradient norms of the steps, and the validation's loss; state)."""
    state, history = dlx.fit(
        experiment(dtype, **kwargs),
        dlx.Run(steps=STEPS, log_every=1),
        mesh=dlx.make_mesh(spec, jax.devices()[:devices]),
        workdir=workdir,
        writers=[],
    )
    return [row[k] for row in history for k in sorted(row) if k != "step"], state


LAYOUTS = [
    ("data=8", {}),
    ("fsdp=8", {}),
    ("tensor=8", {"rules": RULES}),
    ("data=4,fsdp=2", {}),
    ("data=2,fsdp=2,tensor=2", {"rules": RULES}),
]


def equal(found, wanted, dtype):
    """Losses to 1e-5 in float32; losses and every leaf of the state to 1e-10 in float64."""
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(found[0], wanted[0], rtol=tolerance)
    if dtype == np.float64:
        for a, b in zip(
            jax.tree.leaves((found[1].params, found[1].opt_state, found[1].ema)),
            jax.tree.leaves((wanted[1].params, wanted[1].opt_state, wanted[1].ema)),
            strict=True,
        ):
            assert a.dtype == b.dtype == np.float64
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-10)


def test_eight_devices_give_the_losses_of_one():
    one = train("data=1", np.float32, devices=1)
    losses = one[0][1:-1:2]  # between the norms of the gradient
    assert len(losses) == STEPS and losses[-1] < 0.5 * losses[0]
    for spec, kwargs in LAYOUTS:
        equal(train(spec, np.float32, **kwargs), one, np.float32)


def test_eight_devices_give_the_parameters_of_one(x64):
    one = train("data=1", np.float64, devices=1)
    for spec, kwargs in LAYOUTS:
        equal(train(spec, np.float64, **kwargs), one, np.float64)


def test_micro_batches_on_eight_devices(x64):
    one = train("data=1", np.float64, devices=1, accumulate=4)
    equal(train("data=2,fsdp=4", np.float64, accumulate=4), one, np.float64)


class Carrying(nn.Module):
    """Batch statistics and dropout: what sees the whole batch, or its layout."""

    @nn.compact
    def __call__(self, x, train=False):
        dtypes = {"dtype": x.dtype, "param_dtype": x.dtype}
        x = nn.Dense(128, name="dense1", **dtypes)(x)
        x = nn.BatchNorm(not train, momentum=0.9, name="norm", **dtypes)(x)
        x = nn.Dropout(0.3, deterministic=not train, name="dropout")(jnp.tanh(x))
        x = jnp.tanh(nn.Dense(64, name="dense2", **dtypes)(x))
        return nn.Dense(16, name="dense3", **dtypes)(x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_statistics_and_dropout_on_eight_devices(dtype, x64, promoting):
    model, tx = Carrying(), optax.sgd(0.1, 0.9)

    def init(key, given):
        return dlx.train_state(key, model.init(key, jnp.zeros((1, 32), dtype)), tx, ema=True)

    def trained(spec, devices=8, rules=()):
        plain = experiment(dtype)
        state, history = dlx.fit(
            dlx.Experiment(
                init,
                dlx.make_step(losses.classification(model, inputs="x"), tx, ema=0.9),
                plain.data,
                rules=rules,
            ),
            dlx.Run(steps=STEPS, log_every=1),
            mesh=dlx.make_mesh(spec, jax.devices()[:devices]),
            writers=[],
        )
        return [row["train/loss"] for row in history], state

    one = trained("data=1", devices=1)
    assert one[0][-1] < one[0][0]
    statistics = one[1].model_state["batch_stats"]["norm"]  # linen keeps them in float32
    assert float(abs(statistics["mean"]).max()) > 0.01
    for spec, kwargs in LAYOUTS:
        found = trained(spec, **kwargs)
        equal(found, one, dtype)
        for name, value in found[1].model_state["batch_stats"]["norm"].items():
            np.testing.assert_allclose(np.asarray(value), statistics[name], rtol=1e-5, atol=1e-6)


FAR = """
import jax, jax.numpy as jnp, numpy as np
import dlx

batch = {"x": np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)}

def data(first_step, rows):
    while True:
        yield batch

def loss(state, x):
    return jnp.square(jnp.sin(x @ state["w"]) @ state["v"] - x).mean()

def step(state, batch):
    value, g = jax.value_and_grad(loss)(state, batch["x"])
    return jax.tree.map(lambda a, b: a - 0.01 * b, state, g), {"loss": value}

init = lambda key, given: {"w": jnp.eye(128), "v": jnp.eye(128)}
dlx.fit(dlx.Experiment(init, step, data), dlx.Run(steps=4000, log_every=2000), writers=[])
"""


@pytest.mark.slow
def test_the_host_does_not_run_far_ahead():
    """XLA ends a process whose CPU devices have waited for each other for 40 s: they did where
    more than 32 programs were in flight."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    words = [sys.executable, "-c", FAR]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_micro_batches_make_the_step_of_the_whole_batch(x64):
    """Without noise, dropout or batch statistics, which see the micro-batch."""
    tx = optax.sgd(0.1, 0.9)

    def loss_fn(params, model_state, batch, key):
        logits = MLP().apply({"params": params}, batch["x"])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return each.mean(), (model_state, {})

    def trained(accumulate):
        def init(key, given):
            return dlx.train_state(key, MLP().init(key, jnp.zeros((1, 32), np.float64)), tx)

        plain = experiment(np.float64)
        step = dlx.make_step(loss_fn, tx, clip_norm=1.0, accumulate=accumulate)
        state, history = dlx.fit(
            dlx.Experiment(init, step, plain.data),
            dlx.Run(steps=STEPS, log_every=1),
            mesh=dlx.make_mesh("data=2,fsdp=4"),
            writers=[],
        )
        return [row["train/loss"] for row in history], state

    whole, parts = trained(1), trained(4)
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-10)
    for a, b in zip(
        jax.tree.leaves(parts[1].params), jax.tree.leaves(whole[1].params), strict=True
    ):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=1e-10)


@pytest.fixture
def compiled():
    """The names of the programs that are compiled meanwhile."""
    names = []

    def listen(event, seconds, fun_name=None, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_the_state_lies_as_the_rules_say(compiled):
    """After ten steps as well: a layout that drifts would compile the step once more."""
    _, state = train("data=2,fsdp=2,tensor=2", np.float32, rules=RULES)
    assert [name for name in compiled if "advance" in name] == ["jit(advance)"]
    layouts = jax.tree.map(
        lambda x: (x.sharding.spec, x.addressable_shards[0].data.shape), state.params
    )
    assert layouts["dense1"]["kernel"] == (P("fsdp", "tensor"), (16, 64))
    assert layouts["dense2"]["kernel"] == (P("tensor", "fsdp"), (64, 32))
    assert layouts["dense1"]["bias"] == (P(), (128,))
    for follower in (state.ema, state.opt_state[0].trace):
        assert follower["dense1"]["kernel"].sharding.spec == P("fsdp", "tensor")
    _, state = train("fsdp=8", np.float32)
    assert state.params["dense1"]["kernel"].addressable_shards[0].data.shape == (32, 16)


def test_saved_on_eight_devices_and_resumed_on_others(x64, tmp_path, capsys):
    one = train("data=1", np.float64, devices=1)
    for i, (spec, devices) in enumerate([("data=1", 1), ("data=2,fsdp=4", 8)]):
        folder = tmp_path / str(i)
        _, stopped = train("fsdp=8", np.float64, workdir=folder, interrupt_at=5)
        assert int(stopped.step) == 5 and checkpoint.steps(folder / "checkpoints") == [5]
        # What comes back is what was saved, to the bit, wherever it lies.
        _, record = checkpoint.newest(folder / "checkpoints")
        mesh = dlx.make_mesh(spec, jax.devices()[:devices])
        abstract = sharding.place(jax.eval_shape(lambda s=stopped: s), mesh)
        restored = checkpoint.restore(folder / "checkpoints", 5, record, abstract)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(stopped), strict=True):
            if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert set(restored.params["dense1"]["kernel"].devices()) == set(mesh.devices.flat)
        equal(train(spec, np.float64, devices=devices, workdir=folder), one, np.float64)
        assert f"resuming {folder} at step 5" in capsys.readouterr().out
