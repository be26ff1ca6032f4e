"""A recurrent language model as an experiment: the state in training, whole texts, new text."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import guard, loop, sharding
from dlx.data import text
from dlx.models import rnn
from dlx.tasks import compare, generate, language
from experiments import adding_rnn, copy_rnn, ptb_lstm, shakespeare_lstm

V, B, T = 7, 8, 5
WORDS = text.Vocabulary(tuple("\nabcdef"))


def texts(n=403):
    tokens = np.random.default_rng(0).integers(0, V, n).astype(np.int32)
    return text.Text(WORDS, tokens, tokens[:23], tokens[:38])


def made(load=texts, cell="lstm", units=9, layers=1, **options):
    model = rnn.LanguageModel(V, units, layers, cell)
    options = {"seed": 0, "batch_size": B, "length": T, "begin": "\n", **options}
    sampling = options.pop("sampling", generate.Sampling(length=20))
    tx = options.pop("tx", optax.sgd(0.5))
    return model, language.experiment(
        model, rnn.language(model), tx, load, sampling=sampling, **options
    )


def run(steps, **options):
    return dlx.Run(steps=steps, log_every=1, eval_every=steps, save_every=5, **options)


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_the_state_is_zero_where_an_epoch_begins_and_only_there(cell):
    """Against the loss of the rows' whole texts, with parameters that stand still."""
    model, e = made(cell=cell, layers=2, seed=None, tx=optax.sgd(0.0))
    state = e.init(jax.random.key(0), None)
    params = jax.tree.map(jnp.copy, state.params)
    data, step = e.data(0, lambda n: slice(0, n)), jax.jit(e.step)
    S = text.epoch_steps(403, B, T)
    batches = [next(data) for _ in range(2 * S)]
    got = []
    for batch in batches:
        state, metrics = step(state, batch)
        got.append(float(metrics["loss"]))
    whole = {
        k: np.concatenate([b[k] for b in batches[:S]], 1) for k in ("tokens", "targets")
    }  # (B, S T)
    logits, _ = jax.jit(model.apply)({"params": params}, whole["tokens"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, whole["targets"])
    want = np.asarray(loss).reshape(B, S, T).mean((0, 2))
    np.testing.assert_allclose(got, [*want, *want], rtol=1e-5)
    assert np.abs(want[1:] - want[:-1]).min() > 0  # the steps differ, so that this can fail


def test_stop_and_resume(tmp_path, mesh):
    """In the middle of an epoch and over its end: the rows are the same to the last bit."""
    for name, stops in (("whole", [24]), ("stopped", [13, 24])):
        for stop in stops:
            _, e = made()
            data = e.data

            def until(first, rows, stop=stop, data=data):
                for i, batch in enumerate(data(first, rows), first):
                    if i == stop:
                        raise KeyboardInterrupt
                    yield batch

            _, rows = dlx.fit(
                e._replace(data=until), run(24), workdir=tmp_path / name, mesh=mesh, writers=[]
            )
            assert len([r for r in rows if "train/loss" in r]) == stop
    assert text.epoch_steps(403, B, T, 0) < 13
    files = [(tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "stopped")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_one_device_and_eight(mesh):
    """Training over the end of an epoch, and the evaluation of a text."""
    rows = []
    for devices in (mesh, dlx.make_mesh("data=2,fsdp=2,tensor=2")):
        _, history = dlx.fit(made(units=40)[1], run(13), mesh=devices, writers=[])
        rows.append(history)
    for a, b in zip(*rows, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)


def test_the_carried_state_lies_as_the_batch():
    _, e = made(units=256, layers=2)
    shapes = jax.eval_shape(e.init, jax.random.key(0), None)
    placed = sharding.place(shapes, dlx.make_mesh("data=2,fsdp=4"), e.rules)
    for leaf in jax.tree.leaves(placed.model_state):
        assert leaf.shape == (B, 256) and leaf.sharding.shard_shape(leaf.shape) == (1, 256)


# ---- Whole texts -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [6, 22, 23])
def test_every_token_once_from_all_before_it(chunk, x64):
    model, e = made(layers=2)
    state = e.init(jax.random.key(0), None)
    params = jax.tree.map(lambda p: 3 * p.astype(jnp.float64), state.params)
    state = dataclasses.replace(state, params=params)
    read = texts().validation
    logits, _ = jax.jit(model.apply)({"params": params}, read[None, :-1])
    p = np.asarray(jax.nn.log_softmax(logits[0]))
    want = -np.mean([p[i, token] for i, token in enumerate(read[1:])])

    def apply(params, tokens, carried):
        return model.apply({"params": params}, tokens, carried)

    found = language.whole(apply, lambda: read, chunk)(state)
    assert found == {
        "loss": pytest.approx(want, abs=1e-12),
        "perplexity": pytest.approx(math.exp(want), abs=1e-10),
    }


def test_the_first_token_counts_as_well():
    """By a network that knows nothing but that after the first token of all another one comes."""

    def apply(params, tokens, carried):
        seen = jnp.zeros((len(tokens), 1)) if carried is None else carried
        place = jnp.arange(tokens.shape[1], dtype=jnp.float32)[None] + seen  # (1, T)
        first = jnp.where(place == 0, 5.0, 0.0)[..., None]  # (1, T, 1)
        return first * jax.nn.one_hot(3, V).reshape(1, 1, V), seen + tokens.shape[1]

    state = dlx.train_state(jax.random.key(0), {"params": {}}, optax.sgd(0.1))
    read = np.array([0, 3, 3, 3, 3], np.int32)
    got = language.whole(apply, lambda: read, 3)(state)["loss"]
    want = math.log(1 + (V - 1) * math.exp(-5.0)), math.log(V)
    assert got == pytest.approx((want[0] + 3 * want[1]) / 4, rel=1e-5)
    with pytest.raises(dlx.BadInput, match="the text to evaluate is empty"):
        language.whole(apply, lambda: read[:1])(state)


def test_averaged_parameters_are_the_ones_that_count(mesh):
    _, e = made(ema=0.5)
    state, _ = dlx.fit(e, run(6), mesh=mesh, writers=[])
    other = dataclasses.replace(state, params=jax.tree.map(jnp.zeros_like, state.params))
    assert e.test(state) == e.test(other)
    predict, read = jax.jit(e.predict), np.ones((1, 3), np.int32)
    np.testing.assert_array_equal(predict(state, read), predict(other, read))


def test_both_parts():
    """ "train+validation" reads both, one after the other, and evaluates neither."""
    _, e = made(train="train+validation", seed=None)
    assert not e.evals
    batch = next(e.data(0, lambda n: slice(0, n)))
    found = texts()
    both = np.concatenate([found.train, found.validation])
    S = text.epoch_steps(len(both), B, T)
    np.testing.assert_array_equal(batch["tokens"][-1], both[(B - 1) * S * T :][:T])


# ---- New text ----------------------------------------------------------------------------------


def test_sample():
    for sampling, begins in (
        (generate.Sampling(length=30), ""),
        (generate.Sampling("abba", 30, 0.7, 3, 0.9), "abba"),
    ):
        _, e = made(sampling=sampling)
        state = e.init(jax.random.key(0), None)
        got = e.sample(state, jax.random.key(1))
        assert got.startswith(begins) and len(got) == len(begins) + 30
        assert set(got) <= set(WORDS.tokens)
    assert got == e.sample(state, jax.random.key(1)) != e.sample(state, jax.random.key(2))
    _, e = made(sampling=generate.Sampling("abba", 30, 0.7, 3, 0.9, seed=1))
    assert e.sample(state, jax.random.key(1)) != got


def test_how_a_sample_is_drawn_is_no_part_of_what_is_trained(tmp_path):
    config = {"config": {"units": 3, "sample": dataclasses.asdict(generate.Sampling())}}
    guard.check_config(tmp_path, config)
    config["config"]["sample"]["temperature"] = 0.5
    guard.check_config(tmp_path, config)
    with pytest.raises(dlx.BadInput, match="another configuration"):
        guard.check_config(tmp_path, {"config": {**config["config"], "units": 4}})


def test_a_trained_run_may_be_decoded_by_another_search(tmp_path):
    guard.check_config(tmp_path, {"config": {"units": 3, "beams": 4, "alpha": 0.6}})
    other = {"config": {"units": 3, "beams": 8, "alpha": 1.0}}
    guard.check_config(tmp_path, other, trained=True)
    with pytest.raises(dlx.BadInput, match=r"beams 4 -> 8, alpha 0.6 -> 1.0\): --fresh starts"):
        guard.check_config(tmp_path, other)
    other["config"]["units"] = 4
    with pytest.raises(dlx.BadInput, match=r"\(units 3 -> 4\): give what it was made with"):
        guard.check_config(tmp_path, other, trained=True)


def test_tokens_that_people_hand_to_predict():
    """A jitted function cannot tell: the logits would be NaN."""
    _, e = made()
    e.check(np.array([[0, V - 1]]))
    for wrong in (np.array([[0, V]]), np.array([[-1, 0]]), np.array([[0.5]])):
        with pytest.raises(dlx.BadInput, match="tokens"):
            e.check(wrong)


# ---- Bad input ---------------------------------------------------------------------------------


def other_words(n):
    return lambda: texts()._replace(vocabulary=text.Vocabulary(tuple("\nabcdefgh"[:n])))


@pytest.mark.parametrize(
    ("load", "message"),
    [(other_words(6), "the vocabulary has 6 tokens and the network knows 7: this checkpoint bel"),
     (other_words(8), "the vocabulary has 8 tokens"),
     (lambda: texts()._replace(train=np.full(400, V)), f"train: token {V} at position 0 is beyond"),
     (lambda: texts()._replace(validation=np.full(9, -1)), "validation: token -1 at position 0"),
     (lambda: texts(30), "batch_size 8 x length 5 do not fit a text of 30 tokens")],
)  # fmt: skip
def test_a_text_that_does_not_fit(load, message, monkeypatch):
    """Told before anything compiles."""
    monkeypatch.setattr(loop, "_fit", None)  # what compiles
    _, e = made(load)
    with pytest.raises(dlx.BadInput, match=message) as error:
        dlx.fit(e, run(3), writers=[])
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_is_not_the_checkpoint_s():
    state = made()[1].init(jax.random.key(0), None)
    for use in (
        lambda e: e.test(state),
        lambda e: e.evals["validation"](state),
        lambda e: e.sample(state, jax.random.key(0)),
    ):
        with pytest.raises(dlx.BadInput, match="this checkpoint belongs to another text"):
            use(made(other_words(8))[1])
    _, e = made(sampling=generate.Sampling("abz"))
    with pytest.raises(dlx.BadInput, match="'z' is beyond the vocabulary of 7 characters"):
        e.sample(state, jax.random.key(0))


# ---- Side by side ------------------------------------------------------------------------------


def test_side_by_side(mesh):
    """Each member learns what it learns alone."""

    def member(rate):
        def step(w, batch):
            return w + rate * (batch["x"].mean() - w), {"loss": (batch["x"].mean() - w) ** 2}

        def data(first, rows):
            while True:
                yield {"x": np.full(8, 3.0, np.float32)[rows(8)]}

        def measure(w):
            return {"distance": abs(float(w) - 3)}

        measure.names = lambda state: ["distance"]
        return dlx.Experiment(lambda key, given: jnp.zeros(()), step, data, {"v": measure}, measure)

    members = {"slow": member(0.1), "fast": member(0.5)}
    settings = run(5, best=("v/distance_fast", "min"))
    state, rows = dlx.fit(compare.side_by_side(members), settings, mesh=mesh, writers=[])
    for name, one in members.items():
        alone, history = dlx.fit(one, run(5), mesh=mesh, writers=[])
        np.testing.assert_array_equal(state[name], alone)
        for a, b in zip(rows, history, strict=True):
            for metric in b:
                assert metric == "step" or a[f"{metric}_{name}"] == b[metric]
    assert rows[0]["train/loss"] == rows[0]["train/loss_slow"] + rows[0]["train/loss_fast"]


# ---- The experiments' own ----------------------------------------------------------------------


def test_adding():
    batch = adding_rnn.examples(np.random.default_rng(0), 2000, 9)
    x, y = batch["x"].astype(float), batch["y"]
    assert x.shape == (2000, 9, 2) and y.shape == (2000,) and y.dtype == np.float32
    np.testing.assert_allclose((x[..., 0] * x[..., 1]).sum(1), y, atol=1e-6)
    assert (x[:, :4, 1].sum(1) == 1).all() and (x[:, 4:, 1].sum(1) == 1).all()
    assert (x[..., 1].sum(0) > 300).all()  # every place is marked sometimes
    assert abs(((y - 1) ** 2).mean() - adding_rnn.BASELINE) < 0.01


def test_copy():
    batch = copy_rnn.examples(np.random.default_rng(0), 500, 6)
    tokens, targets = batch["tokens"], batch["targets"]
    assert tokens.shape == targets.shape == (500, 26)
    np.testing.assert_array_equal(tokens[:, :10], targets[:, -10:])
    assert (np.bincount(tokens[:, :10].ravel()) > 500).all() and tokens[:, :10].max() == 7
    assert (tokens[:, 10:15] == 8).all() and (tokens[:, 15] == 9).all()
    assert (tokens[:, 16:] == 8).all() and (targets[:, :16] == 8).all()


@pytest.mark.parametrize("module", [adding_rnn, copy_rnn])
def test_the_forgetting_starts_as_told(module):
    e = module.build(dataclasses.replace(module.PRESETS["test"], forget_bias=2.5))
    state = e.init(jax.random.key(0), None)
    biases = state["lstm"].params["rnn"]["layer0"]
    assert {k: float(v["bias"].mean()) for k, v in biases.items() if k[0] == "h"} == {
        "hi": 0.0, "hf": 2.5, "hg": 0.0, "ho": 0.0,
    }  # fmt: skip
    assert set(state) == {"elman", "lstm", "gru"}


def test_zaremba(monkeypatch):
    """Every parameter uniform, the learning rate epoch after epoch, the sum over T in the
    gradient, and its length."""
    config = ptb_lstm.PRESETS["test"]
    e = ptb_lstm.build(config)
    state = jax.jit(e.init)(jax.random.key(0), None)
    jax.tree.map(np.testing.assert_array_equal, state.params, state.ema)
    for leaf in jax.tree.leaves(state.params):
        assert leaf.min() >= -0.1 and leaf.max() <= 0.1
        assert abs(float(leaf.std()) - 0.1 / 3**0.5) < 0.02
    batch = {
        "tokens": np.ones((8, 8), np.int32), "targets": np.full((8, 8), 2, np.int32),
        "begins": np.ones(8, bool),
    }  # fmt: skip
    model = rnn.LanguageModel(ptb_lstm.ptb.WORDS, 16, 2)
    loss = functools.partial(rnn.language(model), model_state={}, batch=batch, key=state.key)
    g = jax.grad(lambda p: loss(p)[0])(state.params)
    norm = 8 * float(optax.tree.norm(g))
    assert norm > 5  # so that it is cut
    step = jax.jit(e.step)
    for t, rate in ((0, 1.0), (29, 1.0), (30, 0.5), (45, 0.25)):
        moved = jax.tree.map(lambda x, t=t: jnp.full_like(x, t), state.opt_state)
        after, _ = step(dataclasses.replace(state, opt_state=moved), batch)
        jax.tree.map(
            lambda a, b, d, rate=rate: np.testing.assert_allclose(
                np.asarray(b - a), rate * 8 * np.asarray(d) * 5 / norm, rtol=2e-3, atol=3e-6
            ),
            after.params, state.params, g,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda: adding_rnn.Config(length=1), "length is 1: two numbers need 2 steps"),
     (lambda: copy_rnn.Config(delay=0), "delay is 0"),
     (lambda: shakespeare_lstm.Config(length=0), "length is 0"),
     (lambda: shakespeare_lstm.Config(dropout=1.0), "dropout is 1.0"),
     (lambda: ptb_lstm.Config(epochs=0), "epochs is 0"),
     (lambda: ptb_lstm.Config(epochs=10**9), "epochs 1000000000 of 30199 steps"),
     (lambda: generate.Sampling(top_p=2.0), "top_p is 2.0"),
     (lambda: generate.Sampling(length=0), "length is 0")],
)  # fmt: skip
def test_values_that_are_none(change, message):
    with pytest.raises(dlx.BadInput, match=message):
        change()
