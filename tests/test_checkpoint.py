"""Checkpoints: every bit comes back, every damaged bit is found, and nothing good is lost."""

import contextlib
import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

import dlx
from dlx import checkpoint, metrics, runs, sharding

GOLDEN = Path(__file__).parent / "golden"
SPECIAL = [np.nan, -0.0, np.inf, -np.inf, 1e-45, 3.4028235e38]  # 1e-45 is subnormal


def make_state(seed):
    """A state with every kind of leaf that a run may hold."""
    k = jax.random.split(jax.random.key(seed), 4)
    params = {"dense": {"kernel": jax.random.normal(k[0], (64, 32)), "bias": jnp.ones((1, 32))}}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1)))
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(seed, x.dtype), tx.init(params))
    return {
        "train": dlx.TrainState(jnp.int32(seed), params, {}, opt_state, jax.random.key(seed)),
        "rbg": jax.random.key(seed, impl="rbg"),
        "keys": jax.random.split(k[2], (2, 3)),
        "scalar": jnp.float32(-0.0),
        "pair": (jnp.arange(2048, dtype=jnp.int32) - seed, (jax.random.bits(k[3], (5,)),)),
        "special": jnp.array(SPECIAL, jnp.float32),
        "half": jax.random.normal(k[1], (32, 64), jnp.bfloat16),
        "small": jnp.array([1 + 2**-7, -0.0, 2.0**-133], jnp.bfloat16),
        "bytes": jnp.arange(256, dtype=jnp.uint8),
        "flags": jnp.array([True, False, True]),
        "nothing": None,
    }


def bits(tree):
    """{path: (dtype, shape, bytes)}: equal only where every bit is."""
    out = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        data = x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x)
        out[sharding.path_of(path)] = (str(x.dtype), x.shape, np.asarray(data).tobytes())
    return out


def on(tree, mesh):
    """The shapes of a state, laid out on a mesh."""
    return sharding.place(jax.eval_shape(lambda: tree), mesh)


def meshes():
    one = sharding.make_mesh("data=1", jax.devices()[:1])
    return one, sharding.make_mesh("fsdp=8"), sharding.make_mesh("data=4,fsdp=2")


def everything(on_disk, newest):
    return set(on_disk)


@contextlib.contextmanager
def saver(folder, keep=everything, notify=print):
    s = checkpoint.Saver(folder, keep, notify)
    try:
        yield s
    finally:
        s.close()


def write(folder, states, keep=everything, record=None):
    with saver(folder, keep) as s:
        for step, state in states.items():
            s.save(step, state, record or {})
            s.wait()


def load(folder, step, like, mesh):
    return checkpoint.restore(folder, step, checkpoint.verify(folder, step), on(like, mesh))


def files(folder, step):
    """Every file of a checkpoint, its record among them."""
    return [
        folder / f"{step}.json",
        *sorted(p for p in (folder / f"{step}").rglob("*") if p.is_file()),
    ]


def seal(path, record):
    """Writes a record as a program would that knows the seal."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    sealed = {"record": record, "sha256": digest}
    path.write_text(json.dumps(sealed, sort_keys=True, indent=1) + "\n")


@pytest.fixture(scope="module")
def small():
    """A state of a few numbers."""
    return {"w": jnp.arange(6, dtype=jnp.float32).reshape(2, 3), "key": jax.random.key(1)}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Steps 9 and 10 of a whole state; nobody writes here."""
    folder = tmp_path_factory.mktemp("pristine")
    write(folder, {9: make_state(9), 10: make_state(10)})
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy of steps 9 and 10."""
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


# ---- what is saved comes back -----------------------------------------------------------------


def test_every_bit_comes_back_on_every_mesh(tmp_path):
    """One device -> 8 -> 4 x 2 -> one: the same bits, and really spread over the devices."""
    state = make_state(3)
    expected, places = bits(state), meshes()
    for step, (source, target) in enumerate(zip(places, (*places[1:], places[0]), strict=True)):
        if step == 0:
            state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, on(state, source)))
        write(tmp_path, {step: state})
        state = load(tmp_path, step, state, target)
        assert bits(state) == expected
        kernel = state["train"].params["dense"]["kernel"]
        assert len(kernel.sharding.device_set) == target.size
        assert kernel.addressable_shards[0].data.size == kernel.size // target.shape["fsdp"]
    assert jax.tree.structure(state) == jax.tree.structure(make_state(3))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_restored_key_draws_the_same_numbers(impl, tmp_path, mesh):
    key = jax.random.key(5, impl=impl)
    write(tmp_path, {1: key})  # a state may be a single leaf
    restored = load(tmp_path, 1, key, mesh)
    assert restored.dtype == key.dtype
    draw = [np.asarray(jax.random.normal(k, (8,))) for k in (key, restored)]
    assert draw[0].tobytes() == draw[1].tobytes()


def test_an_empty_array_comes_back(tmp_path, small, mesh):
    """Orbax refuses one; a state may have one."""
    state = small | {"none": jnp.zeros((0, 3)), "keys": jax.random.split(small["key"], 0)}
    write(tmp_path, {1: state})
    assert bits(load(tmp_path, 1, state, mesh)) == bits(state)


def test_the_record_comes_back(tmp_path, small):
    record = {"evals": {"10": {"a/b": 0.1 + 0.2}}, "text": "é\n\\", "window": [1e-300, 3]}
    write(tmp_path, {1: small}, record=record)
    assert checkpoint.verify(tmp_path, 1).items() >= record.items()


def test_a_copied_moved_or_linked_folder_loads(folder, tmp_path, mesh):
    state, expected = make_state(10), bits(make_state(10))
    copied = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "deep" / "copy"))
    link = tmp_path / "link"
    link.symlink_to(copied)
    moved = tmp_path / "moved"
    folder.rename(moved)
    for place in (copied, moved, link):
        assert checkpoint.newest(place)[0] == 10
        assert bits(load(place, 10, state, mesh)) == expected
    with saver(link, lambda on_disk, newest: {11}) as s:  # and can be written to
        s.save(11, state, {})
        s.wait()
    assert checkpoint.steps(copied) == [11]
    assert bits(load(copied, 11, state, mesh)) == expected


def test_a_relative_folder_loads(folder, small, monkeypatch, mesh):
    monkeypatch.chdir(folder.parent)
    write(Path("checkpoints"), {11: small})
    monkeypatch.chdir("/")
    assert bits(load(folder, 11, small, mesh)) == bits(small)


@pytest.mark.parametrize(("mesh_index", "repeats"), [(0, 3), (1, 1)])
def test_donation_right_after_save_changes_nothing(mesh_index, repeats, tmp_path):
    """64 MB, overwritten in place as soon as `save` returns: what is on disk is the old state."""
    mesh = meshes()[mesh_index]
    n = 1 << 24
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = jax.jit(lambda: {"w": jnp.arange(n, dtype=jnp.int32)}, out_shardings={"w": place})()
    update = jax.jit(lambda s: {"w": -s["w"] - 1}, donate_argnums=0)
    scratch = jax.tree.map(jnp.copy, state)
    jax.block_until_ready(update(scratch))  # compiled: from now on it starts at once
    assert scratch["w"].is_deleted()  # it does overwrite
    expected = np.arange(n, dtype=np.int32)
    with saver(tmp_path, lambda on_disk, newest: {max(on_disk)}) as s:
        for step in range(1, repeats + 1):
            s.save(step, state, {})
            state = update(state)
            s.wait()
            saved = load(tmp_path, step, state, mesh)
            assert np.array_equal(np.asarray(saved["w"]), expected)
            expected = -expected - 1
    assert np.array_equal(np.asarray(state["w"]), expected)


# ---- what is damaged is found -----------------------------------------------------------------


def assert_falls_back(folder, path):
    """Step 10 is refused by the name of the file, and step 9 is used."""
    with pytest.raises(checkpoint.Damaged) as e:
        checkpoint.verify(folder, 10)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    said = []
    step, _ = checkpoint.newest(folder, notify=said.append)
    assert step == 9
    assert len(said) == 1 and str(path) in said[0]


def test_every_file_truncated(folder, mesh):
    """To nothing, to a byte, to its half, by a byte: each is named and passed over."""
    sizes = {}
    for path in files(folder, 10):
        whole = path.read_bytes()
        for size in sorted({0, 1, len(whole) // 2, len(whole) - 1}):
            if not 0 <= size < len(whole):
                continue  # an empty file cannot be cut; it is grown below
            path.write_bytes(whole[:size])
            assert_falls_back(folder, path)
            sizes[path.name, size] = True
        path.write_bytes(whole + b"\0")
        assert_falls_back(folder, path)
        path.write_bytes(whole)
    assert len(sizes) > 20
    assert checkpoint.newest(folder)[0] == 10
    assert bits(load(folder, 9, make_state(9), mesh)) == bits(make_state(9))


def test_every_file_deleted(folder):
    """A file that is gone is named; without its record a step was never finished."""
    for path in files(folder, 10):
        whole = path.read_bytes()
        path.unlink()
        if path.suffix == ".json":
            said = []
            assert checkpoint.steps(folder) == [9]
            assert checkpoint.newest(folder, notify=said.append)[0] == 9 and said == []
        else:
            assert_falls_back(folder, path)
        path.write_bytes(whole)
    assert checkpoint.newest(folder)[0] == 10


def test_deleted_and_swapped_folders(folder):
    (folder / "10").rename(folder / "kept")
    assert checkpoint.newest(folder, notify=[].append)[0] == 9
    (folder / "9").rename(folder / "10")  # whole, but another step's
    (folder / "kept").rename(folder / "9")
    assert checkpoint.newest(folder, notify=[].append) is None


def test_200_flipped_bits(folder):
    """One bit anywhere, the record included: 200 of 200 are caught."""
    rng = random.Random(0)
    paths = [p for p in files(folder, 10) if p.stat().st_size]
    caught, hit = 0, set()
    for i in range(200):
        path = paths[i % len(paths)]
        whole = path.read_bytes()
        at, bit = rng.randrange(len(whole)), rng.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            checkpoint.verify(folder, 10)
        except checkpoint.Damaged as e:
            caught += str(path) in str(e)
        path.write_bytes(whole)
        hit.add(path)
    assert caught == 200 and folder / "10.json" in hit and len(hit) == len(paths)
    checkpoint.verify(folder, 10)


def test_no_bit_of_a_record_is_beyond_its_seal(tmp_path, small):
    write(tmp_path, {1: small})
    path = tmp_path / "1.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(checkpoint.Damaged, match=r"1\.json"):
            checkpoint.verify(tmp_path, 1)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", "{}", '{"record": 1, "sha256": ""}', '{"record": {}}', "[" * 5000]
)
def test_a_record_that_is_something_else(text, folder):
    (folder / "10.json").write_text(text)
    assert_falls_back(folder, folder / "10.json")


@pytest.mark.parametrize("key", ["format", "files", "leaves"])
def test_a_record_that_lacks_something(key, folder):
    """Whoever can seal a record can write any: it is refused, not stumbled over."""
    path = folder / "10.json"
    record = json.loads(path.read_text())["record"]
    del record[key]
    seal(path, record)
    assert_falls_back(folder, path)


def test_an_extra_file(folder):
    for name in ("extra", "state/d/extra"):
        path = folder / "10" / name
        path.write_bytes(b"")
        assert_falls_back(folder, path)
        path.unlink()
    assert checkpoint.newest(folder)[0] == 10


def test_all_damaged(folder):
    for step in (9, 10):
        (folder / f"{step}.json").write_text("")
    said = []
    assert checkpoint.newest(folder, notify=said.append) is None
    assert len(said) == 2
    assert checkpoint.newest(folder / "absent") is None


def test_an_unusable_step_is_passed_over(folder):
    assert checkpoint.newest(folder, lambda step, record: step < 10)[0] == 9


def test_leftovers_of_a_killed_save_are_swept(folder, small):
    """What has no record goes; what has one stays, damaged or not."""
    for name in ("30.orbax-checkpoint-tmp", "40", "40/state"):
        (folder / name).mkdir()
    (folder / "40" / "state" / "d").write_text("half")
    (folder / "50.json.tmp").write_text("half")
    (folder / "9.json").write_text("damaged")
    said = []
    checkpoint.sweep(folder, said.append)
    assert sorted(p.name for p in folder.iterdir()) == ["10", "10.json", "9", "9.json"]
    assert len(said) == 3 and all("not finished" in line for line in said)
    checkpoint.sweep(folder, said.append)
    assert len(said) == 3
    checkpoint.sweep(folder / "absent")


def test_steps_order_by_number(tmp_path, small):
    """Not by name (10 < 9), not by time (the clock was set back)."""
    write(tmp_path, {9: small, 20: small, 100: small})
    for age, step in enumerate((20, 9, 100)):
        for name in (f"{step}", f"{step}.json"):
            os.utime(tmp_path / name, (10**9 - age, 10**9 - age))
    assert checkpoint.steps(tmp_path) == [9, 20, 100]
    assert checkpoint.newest(tmp_path)[0] == 100


# ---- what does not fit is refused -------------------------------------------------------------


def test_a_newer_format_is_refused(folder):
    path = folder / "10.json"
    record = json.loads(path.read_text())["record"]
    seal(path, record)
    checkpoint.verify(folder, 10)  # the seal of this test is the real one
    seal(path, record | {"format": checkpoint.FORMAT + 1})
    for read in (lambda: checkpoint.verify(folder, 10), lambda: checkpoint.newest(folder)):
        with pytest.raises(
            dlx.BadInput, match=rf"10\.json has format {checkpoint.FORMAT + 1}.*update dlx"
        ):
            read()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s | {"more": jnp.zeros(3)}, ["more: saved absent, wanted float32[3]"]),
        (
            lambda s: {k: v for k, v in s.items() if k != "w"},
            ["w: saved float32[2, 3], wanted abs"],
        ),
        (lambda s: s | {"w": jnp.zeros((3, 2))}, ["w: saved float32[2, 3], wanted float32[3, 2]"]),
        (lambda s: s | {"w": s["w"].astype(jnp.bfloat16)}, ["wanted bfloat16[2, 3]"]),
        (lambda s: s | {"w": s["w"].astype(jnp.int32)}, ["wanted int32[2, 3]"]),
        (lambda s: s | {"key": jax.random.key(0, impl="rbg")}, ["key: saved key<fry>", "key<rbg>"]),
        (
            lambda s: {"v": s["w"], "key": s["key"]},
            ["w: saved float32[2, 3]", "absent and 1 more"],
        ),
    ],
)
def test_another_model_is_refused(change, named, tmp_path, small, mesh):
    write(tmp_path, {1: small})
    with pytest.raises(dlx.BadInput) as e:
        load(tmp_path, 1, change(small), mesh)
    assert all(text in str(e.value) for text in [*named, str(tmp_path / "1")]), e.value


# ---- saving -----------------------------------------------------------------------------------


def test_a_step_is_overwritten(tmp_path, small, mesh):
    other = small | {"w": small["w"] + 1.0}
    write(tmp_path, {5: small}, record={"note": "old"})
    write(tmp_path, {5: other}, record={"note": "new"})
    assert checkpoint.verify(tmp_path, 5)["note"] == "new"
    assert bits(load(tmp_path, 5, small, mesh)) == bits(other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "5.json"]


def test_a_damaged_step_is_overwritten(folder, mesh):
    files(folder, 10)[3].write_bytes(b"damage")
    (folder / "10" / "stranger").write_text("")
    write(folder, {10: make_state(10)})
    assert bits(load(folder, 10, make_state(10), mesh)) == bits(make_state(10))


def test_amending_rewrites_the_record_alone(folder, mesh):
    before = {p: p.read_bytes() for p in files(folder, 10)[1:]}
    with saver(folder, lambda on_disk, newest: set(on_disk) - set(newest["drop"])) as s:
        s.amend(10, {"evals": {"10": 0.5}, "drop": [9]})
        s.wait()
    assert checkpoint.verify(folder, 10)["evals"] == {"10": 0.5}
    assert {p: p.read_bytes() for p in files(folder, 10)[1:]} == before
    assert checkpoint.steps(folder) == [10]
    assert sorted(p.name for p in folder.iterdir()) == ["10", "10.json"]


def test_a_damaged_step_is_not_amended(folder):
    path = files(folder, 10)[-1]
    path.write_bytes(b"damage")
    with saver(folder) as s:
        s.amend(10, {})
        with pytest.raises(checkpoint.Damaged, match=path.name):
            s.wait()


def test_pruning_keeps_what_keep_says(tmp_path, small, mesh):
    """After each save exactly the steps of `keep` are there, whole; records and folders agree."""
    seen = []

    def keep(on_disk, newest):
        seen.append((list(on_disk), newest["best"]))
        return {*on_disk[-2:], newest["best"], 77}

    there = []
    with saver(tmp_path, keep) as s:
        for step in (1, 2, 3, 4, 5):
            s.save(step, small | {"w": small["w"] * step}, {"best": 2 if step < 5 else 4})
            s.wait()
            there.append(checkpoint.steps(tmp_path))
            names = {str(n) for n in there[-1]}
            assert {p.name for p in tmp_path.iterdir()} == names | {f"{n}.json" for n in names}
    assert there == [[1], [1, 2], [2, 3], [2, 3, 4], [4, 5]]
    assert seen[-1] == ([2, 3, 4, 5], 4)
    for step in there[-1]:
        saved = load(tmp_path, step, small, mesh)
        assert bits(saved) == bits(small | {"w": small["w"] * step})


def test_the_keeper_of_a_run():
    """The newest `keep` and the best, whatever else lies there."""
    keep = runs.keeper(dlx.Run(keep=2, best=("v/loss", "min")))
    table = {"10": {"v/loss": 0.5}, "20": {"v/loss": 0.2}, "30": {"v/loss": 0.3}}
    assert keep([10, 20, 30, 40, 50], {"evals": table}) & {10, 20, 30, 40, 50} == {20, 40, 50}
    keep = runs.keeper(dlx.Run(keep=1))
    assert keep([10, 20, 30], {"evals": table}) & {10, 20, 30} == {30}


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Late:
    """A save that fails in the background, with its files half written."""

    def __init__(self, path, *args, **kwargs):
        self.path = Path(path)

    def result(self):
        for folder in (self.path, self.path.with_name(f"{self.path.name}.orbax-checkpoint-tmp")):
            folder.mkdir(exist_ok=True)
            (folder / "half").write_text("half")
        full()


@pytest.mark.parametrize("failing", [full, Late], ids=["at once", "in the background"])
def test_a_full_disk_is_told_and_survived(failing, tmp_path, small, monkeypatch):
    """The failure is told at the next save, which works; what was saved before stands."""
    said = []
    with saver(tmp_path, everything, said.append) as s:
        s.save(1, small, {})
        s.wait()
        with monkeypatch.context() as m:
            m.setattr(ocp, "save_async", failing)
            s.save(2, small, {})
            with contextlib.suppress(OSError):  # the thread is done before the patch is undone
                s._future.result()
        assert said == []
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "1.json"]
        s.save(3, small, {})
        assert len(said) == 1 and "No space left" in said[0] and "goes on" in said[0]
        s.wait()
        monkeypatch.setattr(ocp, "save_async", failing)
        s.save(4, small, {})
        with pytest.raises(OSError, match="No space left"):
            s.wait()
        s.wait()  # told once
    assert checkpoint.steps(tmp_path) == [1, 3]
    assert checkpoint.newest(tmp_path)[0] == 3


def test_a_step_whose_overwriting_failed_is_gone(tmp_path, small, monkeypatch):
    """Half of a new state under the seal of the old one must not be possible."""
    write(tmp_path, {1: small, 2: small})
    monkeypatch.setattr(ocp, "save_async", Late)
    with saver(tmp_path) as s:
        s.save(2, small, {})
        with pytest.raises(OSError, match="No space left"):
            s.wait()
    assert checkpoint.newest(tmp_path)[0] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "1.json"]


# ---- a whole run ------------------------------------------------------------------------------


def tiny(stop_at=None):
    """An experiment of two numbers; Ctrl-C comes before the batch of step `stop_at`."""

    def init(key, given):
        return {"params": {"w": jax.random.normal(key, (2,))}, "step": jnp.int32(0)}

    def step(state, batch):
        w = state["params"]["w"] * 0.9 + batch["x"].mean()
        return {"params": {"w": w}, "step": state["step"] + 1}, {"loss": jnp.square(w).sum()}

    def data(first_step, rows):
        t = first_step
        while True:
            if t == stop_at:
                raise KeyboardInterrupt
            yield {"x": np.full((8,), t / 100, np.float32)[rows(8)]}
            t += 1

    return dlx.Experiment(init, step, data)


def fit(folder, stop_at=None, **changes):
    run = dlx.Run(**dict(steps=40, log_every=5, eval_every=10, save_every=10) | changes)
    state, _ = dlx.fit(tiny(stop_at), run, workdir=folder, writers=[], mesh=meshes()[0])
    return state


def test_training_goes_on_while_the_disk_is_full(tmp_path, monkeypatch, capsys):
    """Saves fail at step 20; the run ends as if they had not."""
    save, steps = ocp.save_async, []

    def sometimes(path, *args, **kwargs):
        steps.append(int(Path(path).name))
        return full() if steps[-1] == 20 else save(path, *args, **kwargs)

    expected = fit(tmp_path / "a")
    monkeypatch.setattr(ocp, "save_async", sometimes)
    assert bits(fit(tmp_path / "b")) == bits(expected)
    assert steps == [10, 20, 30, 40]
    assert checkpoint.steps(tmp_path / "b" / "checkpoints") == [10, 30, 40]
    assert "No space left" in capsys.readouterr().out
    name = "metrics.jsonl"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_failure_of_the_last_save_is_raised(tmp_path, monkeypatch):
    """A run whose end is not on disk is not complete; the same command completes it."""
    expected, save = fit(tmp_path / "a"), ocp.save_async
    with monkeypatch.context() as m:
        m.setattr(
            ocp,
            "save_async",
            lambda p, *a, **k: full() if Path(p).name == "40" else save(p, *a, **k),
        )
        with pytest.raises(OSError, match="No space left"):
            fit(tmp_path / "b")
    assert not (tmp_path / "b" / "result.json").exists()
    assert bits(fit(tmp_path / "b")) == bits(expected)
    assert (tmp_path / "b" / "result.json").read_bytes() == (
        tmp_path / "a" / "result.json"
    ).read_bytes()


def test_a_damaged_checkpoint_ahead_does_not_push_out_new_ones(tmp_path, capsys):
    """The run has gone back before a damaged step: it must not count among the newest."""
    expected = fit(tmp_path / "a", keep=1)
    folder = tmp_path / "b" / "checkpoints"
    fit(tmp_path / "b", stop_at=35, keep=1)
    assert checkpoint.steps(folder) == [35]
    files(folder, 35)[-1].write_bytes(b"damage")
    fit(tmp_path / "b", stop_at=25, keep=1)
    assert checkpoint.newest(folder, notify=[].append)[0] == 25
    capsys.readouterr()
    assert bits(fit(tmp_path / "b", keep=1)) == bits(expected)
    assert "at step 25" in capsys.readouterr().out


def test_a_lost_configuration_does_not_cost_the_checkpoints(tmp_path):
    """A folder with checkpoints and no config.json is refused, and nothing in it is removed."""
    fit(tmp_path / "a", stop_at=15)
    (tmp_path / "a" / "config.json").unlink()
    with pytest.raises(dlx.BadInput, match=r"config\.json"):
        fit(tmp_path / "a")
    assert checkpoint.newest(tmp_path / "a" / "checkpoints")[0] == 15


def test_the_log_is_rewritten_by_rename(tmp_path):
    """A kill while Ctrl-C rewrites the log must not lose it: checkpoints need their log."""
    from dlx import writers

    path = tmp_path / "metrics.jsonl"
    rows = {(n, "train"): {"step": n, "train/loss": 1.0 / n} for n in range(1, 100)}
    writers.Log(rows, [], 0).rewrite(path)
    text = path.read_text()
    with open(path) as old:  # the file as a reader had it before
        writers.Log(rows | {(100, "train"): {"step": 100}}, [], 0).rewrite(path)
        assert old.read() == text
    assert path.read_text() == text + '{"step": 100}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_row_that_an_interrupt_falls_into_comes_again(monkeypatch):
    """A signal between a row's speed and its end leaves it pending: the flush at the end of the
    run takes it once more, at a step that was its own mark of speed."""
    from dlx import writers

    def interrupt(*row):
        raise KeyboardInterrupt

    told = []
    log = writers.Log({}, [lambda _, row: told.append(row), writers.progress(100)], 32)
    window = metrics.accumulate(
        metrics.empty_window({"loss": jnp.float32(0)}), {"loss": jnp.float32(2)}, 0, 20
    )
    log.later(20, window)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(log, "emit", interrupt)
        log.flush()
    log.flush()
    log.later(40, window)
    log.flush()
    assert [row["train/loss"] for row in told] == [2, 2]
    assert ["timing/steps_per_second" in row for row in told] == [False, True]


def test_a_damaged_log_is_one_line(tmp_path):
    """The log is no part of the state, but it is named where it cannot be read."""
    fit(tmp_path / "a", stop_at=25)
    path = tmp_path / "a" / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(dlx.BadInput, match=r"metrics\.jsonl is damaged"):
        fit(tmp_path / "a")
    path.write_bytes(whole)
    fit(tmp_path / "a")


# ---- the golden run ---------------------------------------------------------------------------


def test_the_golden_run_loads():
    """A run folder of the first dlx loads in every later one, bit for bit."""
    from tests.golden import make

    loaded = dlx.load(GOLDEN / "run", build=make.build, config_class=make.Config)
    with np.load(GOLDEN / "expected.npz", allow_pickle=False) as f:
        expected = dict(f)
    assert loaded.step == 60 and loaded.config == make.Config()
    leaves = make.arrays(loaded.state)
    assert {*leaves} | {"inputs", "outputs"} == {*expected}
    for name, x in leaves.items():
        assert (x.dtype, x.shape) == (expected[name].dtype, expected[name].shape), name
        assert x.tobytes() == expected[name].tobytes(), name
    outputs = np.asarray(loaded.predict(expected["inputs"]))
    np.testing.assert_allclose(outputs, expected["outputs"], rtol=0, atol=1e-6)
    draw = np.asarray(jax.random.uniform(loaded.state.key, (4,)))
    assert np.array_equal(draw, np.asarray(jax.random.uniform(jax.random.key(7), (4,))))


def test_the_golden_run_is_small_and_tells_nothing_of_its_machine():
    paths = [p for p in GOLDEN.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in paths) < 100_000
    assert {p.name for p in (GOLDEN / "run").iterdir()} == {
        "config.json", "metrics.jsonl", "result.json", "checkpoints"
    }  # fmt: skip
    for path in paths:
        for place in (b"/work", b"/root", b"/tmp", b"/home", b"/Users"):
            assert path.suffix == ".py" or place not in path.read_bytes(), path
