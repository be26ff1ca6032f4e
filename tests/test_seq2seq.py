"""The encoder-decoder with attention: slow oracle, padding, and its experiments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlx
from dlx.data import addition, bpe, multi30k, pairs
from dlx.models import seq2seq
from dlx.tasks import translation
from experiments import addition_seq2seq, multi30k_seq2seq

S, T, D, H = 5, 4, 3, 4
MODEL = seq2seq.Seq2Seq(7, 6, D, H)
LENGTHS = np.array([5, 1, 3], np.int32)


def words(seed, size, shape):
    return np.random.default_rng(seed).integers(0, size, shape).astype(np.int32)


SOURCE, TARGET = words(0, 7, (3, S)), words(1, 6, (3, T))
BATCH = {
    "source": SOURCE,
    "source_length": LENGTHS,
    "target": TARGET,
    "target_length": np.array([4, 2, 1], np.int32),
}


def perturbed(model=MODEL, dtype=np.float64):
    """Every parameter, also those that begin at 0."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), SOURCE, LENGTHS, TARGET)["params"]
    random = np.random.default_rng(2)
    return jax.tree.map(lambda x: random.normal(size=x.shape).astype(dtype) * 0.7, shapes)


# ---- The equations -----------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(p, x, s):
    """A cell of flax: x W + b, s U, and the bias b' within the reset gate."""
    r = sigmoid(x @ p["ir"]["kernel"] + p["ir"]["bias"] + s @ p["hr"]["kernel"])
    z = sigmoid(x @ p["iz"]["kernel"] + p["iz"]["bias"] + s @ p["hz"]["kernel"])
    inner = s @ p["hn"]["kernel"] + p["hn"]["bias"]
    n = np.tanh(x @ p["in"]["kernel"] + p["in"]["bias"] + r * inner)
    return (1 - z) * n + z * s


def oracle(p, source, length, before):
    """One sentence, word by word -> logits (T, V), alpha (T, S)."""
    x = p["encoder"]["embedding"]["embedding"][source[:length]]
    right, left, s = [], [], np.zeros(H)
    for j in range(length):
        s = gru(p["encoder"]["right"], x[j], s)
        right.append(s)
    s = np.zeros(H)
    for j in reversed(range(length)):
        s = gru(p["encoder"]["left"], x[j], s)
        left.insert(0, s)
    h = np.concatenate([right, left], 1)
    s = np.tanh(left[0] @ p["W_s"]["kernel"] + p["W_s"]["bias"])
    E, d = p["embedding"]["embedding"], p["decoder"]
    logits, alphas = [], []
    for word in before:
        e = [np.tanh(s @ d["W_a"]["kernel"] + h_j @ p["U_a"]["kernel"]) @ d["v_a"]["kernel"][:, 0]
             for h_j in h]  # fmt: skip
        alpha = np.exp(e) / np.exp(e).sum()
        c = sum(a * h_j for a, h_j in zip(alpha, h, strict=True))
        a = E[word] @ p["W"]["kernel"] + p["W"]["bias"] + c @ d["C"]["kernel"]
        u = s @ d["U"]["kernel"] + d["U"]["bias"]
        r, z = sigmoid(a[:H] + u[:H]), sigmoid(a[H : 2 * H] + u[H : 2 * H])
        s = (1 - z) * np.tanh(a[2 * H :] + r * u[2 * H :]) + z * s
        t = np.tanh(s @ p["U_o"]["kernel"] + p["U_o"]["bias"] + E[word] @ p["V_o"]["kernel"]
                    + c @ p["C_o"]["kernel"])  # fmt: skip
        logits.append(E @ t + p["bias"])
        alphas.append(np.r_[alpha, np.zeros(len(source) - length)])
    return np.array(logits), np.array(alphas)


def test_the_equations_word_by_word(x64):
    params = perturbed()
    logits, alpha = jax.jit(MODEL.apply)({"params": params}, SOURCE, LENGTHS, TARGET)
    for i in range(3):
        wanted, weights = oracle(params, SOURCE[i], LENGTHS[i], TARGET[i])
        np.testing.assert_allclose(logits[i], wanted, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(alpha[i], weights, rtol=1e-8, atol=1e-12)


def test_steps_are_the_scan(x64):
    """What search calls, word after word, and what training computes at once."""
    variables = {"params": perturbed()}
    logits, alpha = jax.jit(MODEL.apply)(variables, SOURCE, LENGTHS, TARGET)
    encode = jax.jit(lambda *args: MODEL.apply(variables, *args, method="encode"))
    known, s = encode(SOURCE, LENGTHS)
    step = jax.jit(lambda s, word: MODEL.apply(variables, known, s, word, method="step"))
    for i in range(T):
        one, s, weights = step(s, TARGET[:, i])
        np.testing.assert_allclose(one, logits[:, i], rtol=1e-12)
        np.testing.assert_allclose(weights, alpha[:, i], rtol=1e-12)


def test_what_stands_behind_the_ends_changes_nothing(x64):
    """Loss and gradients are the same to the bit, also on longer arrays to rounding."""
    loss = jax.jit(jax.value_and_grad(
        lambda p, batch: seq2seq.translation(MODEL, 1, label_smoothing=0.1)(
            p, {}, batch, jax.random.key(0))[0]
    ))  # fmt: skip
    params = perturbed()
    value, gradient = loss(params, BATCH)
    other = dict(BATCH)
    for side, size in (("source", 7), ("target", 6)):
        behind = np.arange(BATCH[side].shape[1])[None] >= BATCH[f"{side}_length"][:, None]
        other[side] = np.where(behind, (BATCH[side] + 1) % size, BATCH[side]).astype(np.int32)
        assert (other[side] != BATCH[side]).any()
    # Row by row of the embeddings the gradients are sums in the order of the words.
    value2, gradient2 = loss(params, other)
    np.testing.assert_allclose(value2, value, rtol=1e-14)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-13), gradient2, gradient)
    longer = {k: np.pad(v, ((0, 0), (0, 2))) if v.ndim == 2 else v for k, v in BATCH.items()}
    value3, gradient3 = loss(params, longer)
    np.testing.assert_allclose(value3, value, rtol=1e-13)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient3, gradient)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_the_loss(e, x64):
    params = perturbed()
    loss_fn = seq2seq.translation(MODEL, 3, label_smoothing=e)
    loss, (_, metrics) = jax.jit(loss_fn)(params, {}, BATCH, jax.random.key(0))
    total = nll = count = 0
    for i, n in enumerate(BATCH["target_length"]):
        before = [3, *TARGET[i, : n - 1]]
        logits, _ = oracle(params, SOURCE[i], LENGTHS[i], before)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, word in zip(log_p, TARGET[i], strict=False):
            target = np.full(6, e / 6)
            target[word] += 1 - e
            total, nll, count = total - target @ row, nll - row[word], count + 1
    np.testing.assert_allclose(loss, total / count, rtol=1e-9)
    np.testing.assert_allclose(metrics["nll"][0], nll, rtol=1e-9)
    assert metrics["weight"] == metrics["nll"][1] == count == 7


def test_every_parameter_learns():
    model = MODEL.clone(dropout=0.2)
    params = perturbed(model, np.float32)
    loss_fn = seq2seq.translation(model, 1)
    gradient = jax.jit(jax.grad(lambda p: loss_fn(p, {}, BATCH, jax.random.key(1))[0]))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


def test_dropout_only_in_training():
    model, params = MODEL.clone(dropout=0.5), perturbed(dtype=np.float32)

    loss = jax.jit(lambda key: seq2seq.translation(model, 1)(params, {}, BATCH, key)[0])
    assert loss(jax.random.key(0)) == loss(jax.random.key(0)) != loss(jax.random.key(1))
    # Without `train` it asks for no key.
    jax.eval_shape(model.apply, {"params": params}, SOURCE, LENGTHS, TARGET)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dtypes(dtype, promoting):
    model = MODEL.clone(dtype=dtype)
    shapes = jax.eval_shape(model.init, jax.random.key(0), SOURCE, LENGTHS, TARGET)
    logits, alpha = jax.eval_shape(model.apply, shapes, SOURCE, LENGTHS, TARGET)
    assert logits.shape == (3, T, 6) and alpha.shape == (3, T, S)
    assert logits.dtype == (dtype or jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([5, 0, 3], "a length is 0: all must be from 1 to the 5 steps"),
        ([5, 6, 3], "a length is 6: all must be from 1 to the 5 steps"),
        ([5.0, 1.0, 3.0], r"lengths are float32 of shape \(3,\): give integers of shape \(3,\)"),
        ([5, 1], r"lengths are int32 of shape \(2,\)"),
    ],
)
def test_bad_lengths(lengths, text):
    with pytest.raises(dlx.BadInput, match=text):
        MODEL.apply({"params": perturbed(dtype=np.float32)}, SOURCE, jnp.array(lengths), TARGET)


def test_bad_sizes():
    with pytest.raises(dlx.BadInput, match="units is 0"):
        seq2seq.Seq2Seq(5, 5, units=0)
    with pytest.raises(dlx.BadInput, match="dropout is 1"):
        seq2seq.Seq2Seq(5, 5, dropout=1.0)


# ---- Pairs -------------------------------------------------------------------------------------


def some_pairs(n=23):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 8, (2, n))
    return [[random.integers(3, 9, n).tolist() for n in side] for side in lengths]


def test_pad():
    source, target = some_pairs()
    arrays = pairs.pad(source, target, end=2, limit=6)
    kept = [(a, b) for a, b in zip(source, target, strict=True) if len(a) < 6 and len(b) < 6]
    assert arrays["source"].shape == arrays["target"].shape == (len(kept), 6) and len(kept) < 23
    for i, pair in enumerate(kept):
        for side, tokens in zip(pairs.SIDES, pair, strict=True):
            assert arrays[side][i].tolist() == [*tokens, 2] + [0] * (5 - len(tokens))
            assert arrays[f"{side}_length"][i] == len(tokens) + 1
    assert pairs.pad(source, target, end=2)["source"].shape == (23, max(map(len, source)) + 1)


def test_batches_are_of_one_length_and_every_epoch_has_every_pair():
    arrays = pairs.pad(*some_pairs(), end=2) | {"number": np.arange(23)}
    stream = pairs.batches(arrays, 4, seed=3)(0, lambda n: slice(0, n))
    batches = [next(stream) for _ in range(15)]  # 3 epochs of 5 batches; 3 pairs are left out
    for e in range(3):
        epoch = batches[5 * e : 5 * e + 5]
        assert len({i for b in epoch for i in b["number"].tolist()}) == 20
        spans = []
        for b in epoch:
            longer = np.maximum(b["source_length"], b["target_length"])
            spans.append((longer.min(), longer.max()))
        assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))
        assert spans != sorted(spans)
    assert not np.array_equal(batches[0]["number"], batches[5]["number"])
    later = pairs.batches(lambda: arrays, 4, seed=3)(7, lambda n: slice(1, 3))
    np.testing.assert_array_equal(next(later)["number"], batches[7]["number"][1:3])
    other = pairs.batches(arrays, 4, seed=4)(0, lambda n: slice(0, n))
    assert not np.array_equal(next(other)["number"], batches[0]["number"])


@pytest.mark.parametrize("size", [0, 24])
def test_a_batch_that_does_not_fit(size):
    arrays = pairs.pad(*some_pairs(), end=2)
    with pytest.raises(dlx.BadInput, match=f"batch_size {size} does not fit 23 pairs"):
        pairs.batches(arrays, size, 0)(0, lambda n: slice(0, n))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"source": [[9]]}, "source has token 9 and its vocabulary 9: they go from 0 to 8"),
        ({"target": [[-1]]}, "target has token -1 and its vocabulary 8"),
        ({"source_length": [0]}, "a source_length is 0: they go from 1 to 1, the width of source"),
        ({"target_length": [2]}, "a target_length is 2: they go from 1 to 1"),
        ({"target_length": [1.0]}, "target_length has dtype float64: it must be integer"),
        ({"source": [[1.0]]}, "source has dtype float64: it must be integer"),
        ({"source_length": [1, 1]}, r"source_length has shape \(2,\): it must be \(1,\)"),
        ({"source": np.zeros((0, 3), int)}, "no pair is left"),
    ],
)
def test_pairs_that_no_model_can_learn(changes, text):
    good = {"source": [[3]], "source_length": [1], "target": [[3]], "target_length": [1]}
    arrays = {k: np.asarray(v) for k, v in good.items()}
    pairs.check(arrays, "x", (9, 8))
    with pytest.raises(dlx.BadInput, match=text):
        pairs.check(arrays | {k: np.asarray(v) for k, v in changes.items()}, "x", (9, 8))


# ---- Vocabularies and sets ---------------------------------------------------------------------

TEXT = ["Ein Mann läuft über die Straße.", "Zwei Männer laufen über eine Straße, schnell!"] * 3


def test_byte_pairs_come_back_as_they_were():
    vocabulary = bpe.train(TEXT, 330)
    assert 259 < len(vocabulary) <= 330
    for line in [*TEXT, "Ein 日本 Hund — 'nie' gesehen…", "x"]:
        tokens = vocabulary.encode([line])[0]
        assert vocabulary.decode([*tokens, bpe.END, 7, 7]) == line
        assert 0 < len(vocabulary.pieces(tokens)) == len(tokens)
        assert not {bpe.PAD, bpe.START, bpe.END} & set(tokens)
    assert len(vocabulary.encode([TEXT[0]])[0]) < len(bpe.train(TEXT, 259).encode([TEXT[0]])[0])


def test_a_vocabulary_is_known_by_its_digest():
    digests = [bpe.train(lines, 300).digest() for lines in (TEXT, list(TEXT), TEXT[:2])]
    assert digests[0] == digests[1] and bpe.train(TEXT, 290).digest() != digests[0]
    vocabulary = bpe.train(TEXT, 300)
    assert vocabulary.check("", "German") is vocabulary.check(digests[0], "German") is vocabulary
    with pytest.raises(
        dlx.BadInput, match=r"the German vocabulary is .* configuration 0123456789ab:"
    ):
        vocabulary.check("0123456789ab", "German")
    with pytest.raises(dlx.BadInput, match="a vocabulary of 258 has no room for all bytes"):
        bpe.train(TEXT, 258)


def test_sums():
    lines, seen = addition.load(2, 900), {}
    assert {name: len(both[0]) for name, both in lines.items()} == {
        "train": 900, "validation": 100, "test": 200,
    }  # fmt: skip
    for name, both in lines.items():
        for text, result in zip(*both, strict=True):
            a, b = map(int, text.split("+"))
            assert a + b == int(result) and 0 <= a < 100 and 0 <= b < 100
            assert seen.setdefault((min(a, b), max(a, b)), (name, text)) == (name, text)
    assert len(seen) == 1200
    orders = [int(x.split("+")[0]) < int(x.split("+")[1]) for x in lines["train"][0]]
    assert 0.4 < np.mean(orders) < 0.6
    arrays = addition.arrays(["85+970"], ["1055"])
    assert addition.Characters().decode(arrays["target"][0].tolist()) == "1055"
    with pytest.raises(dlx.BadInput, match="train is 4000: numbers of 2 digits make 5,050 pairs"):
        addition.load(2, 4000)


def test_multi30k(no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path))
    with pytest.raises(dlx.BadInput, match=r"multi30k: train.en.gz is in none of"):
        multi30k.load()
    (tmp_path / "multi30k").mkdir()
    (tmp_path / "multi30k" / "train.en").write_text("A man .\n")
    with pytest.raises(dlx.BadInput, match=r"train.en has sha256 .* and should have 460a15fb"):
        multi30k.load()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nowhere")


# ---- The experiments ---------------------------------------------------------------------------


def test_a_step_takes_the_shortest_length_that_holds_its_batch():
    def step(state, batch):
        width = batch["source"].shape[1]
        assert batch["target"].shape == (3, width)
        return state + batch["source"].sum(), {"width": jnp.int32(width)}

    chosen = jax.jit(translation.by_length(step, (2, 3, 6)))
    for n, width in ((1, 2), (2, 2), (3, 3), (4, 6), (6, 6)):
        for longer in pairs.SIDES:
            batch = {side: np.ones((3, 6), np.int32) for side in pairs.SIDES}
            batch |= {f"{side}_length": np.ones(3, np.int32) for side in pairs.SIDES}
            batch[f"{longer}_length"][1] = n
            state, found = chosen(jnp.int32(5), batch)
            assert found["width"] == width and state == 5 + 3 * width
    with pytest.raises(dlx.BadInput, match="the last of lengths is 5: batches have 6 tokens"):
        translation.by_length(step, (2, 5))(0, batch)
    for lengths in ((3, 2), (2, 2), (0, 2)):
        with pytest.raises(dlx.BadInput, match=f"lengths are .{lengths[0]}, {lengths[1]}"):
            translation.by_length(step, lengths)


@pytest.fixture(scope="module")
def sums():
    """The experiment of sums, and a state that has learnt nothing."""
    config = addition_seq2seq.PRESETS["test"]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = addition_seq2seq.build(config)
        yield made, jax.jit(made.init)(jax.random.key(0), None)


def test_what_people_see(sums):
    made, state = sums
    picture = made.pictures["attention"](state)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 10
    text = made.sample(state, jax.random.key(0)).split("\n")
    assert len(text) == 24 and text[1].startswith("  ours: ")
    for asked, true in zip(text[::3], text[2::3], strict=True):
        assert sum(map(int, asked.split("+"))) == int(true.removeprefix("  true: "))
    found = made.evals["validation"](state)
    assert found.keys() == {"nll", "exact"} == {*made.evals["validation"].names(state)}
    assert np.log(14) / 2 < found["nll"] < 2 * np.log(14)
    assert made.test(state).keys() == {"nll", "exact", "exact_greedy"}


@pytest.mark.parametrize(
    ("source", "length", "message"),
    [([4, 5, 13, 4, 2], 0, "a source_length is 0"), ([4, 5, 13, 4, 2], 6, "a source_length is 6"),
     ([4, 5, 99, 4, 2], 5, "source has token 99"), ([4, 5, -1, 4, 2], 5, "source has token -1"),
     ([4, 5, 13, 4, 2], 2.0, "source_length has dtype float64")],
)  # fmt: skip
def test_what_people_hand_to_predict(sums, source, length, message):
    made, _ = sums
    given = {"source": np.array([source]), "source_length": np.array([length])}
    made.check({"source": np.array([[4, 5, 13, 4, 2]]), "source_length": np.array([5])})
    with pytest.raises(dlx.BadInput, match=message):
        made.check(given)


def test_exact_and_bleu():
    assert addition_seq2seq.exact(["1", "22", "3"], ["1", "2", "3"]) == {"exact": 2 / 3}
    text = ["Ein Mann steht vor dem großen Haus .", "Zwei Hunde laufen über die Wiese ."]
    other = ["Ein Mann steht vor dem großen Haus .", "Zwei Hunde rennen über die Wiese ."]
    same = multi30k_seq2seq.scores(text, text)
    assert same["bleu"] == pytest.approx(100) and same["chrf"] == pytest.approx(100)
    # 13 of 15 words are not the point: cased, so "zwei" is another word.
    found = multi30k_seq2seq.scores(other, text)["bleu"]
    lower = multi30k_seq2seq.scores([x.lower() for x in other], text)["bleu"]
    assert lower < found < 100
    assert multi30k_seq2seq.SIGNATURE in multi30k_seq2seq.CARD["notes"]


LINES = {
    "train": {"en": ("A man runs .", "Two men run ."), "de": ("Ein Mann rennt .", "Zwei rennen .")},
    "validation": {"en": ("A man .",), "de": ("Ein Mann .",)},
    "test": {"en": ("Two men .",), "de": ("Zwei .",)},
}


def test_another_vocabulary_is_refused(monkeypatch):
    monkeypatch.setattr(multi30k, "load", lambda: LINES)
    config = dataclasses.replace(multi30k_seq2seq.PRESETS["test"], german="0123456789ab")
    made = multi30k_seq2seq.build(config)
    with pytest.raises(dlx.BadInput, match="the German vocabulary is"):
        made.data(0, lambda n: slice(0, n))


def test_the_vocabulary_sees_the_training_side_alone(monkeypatch):
    given = []
    monkeypatch.setattr(multi30k, "load", lambda: LINES)
    train = bpe.train
    monkeypatch.setattr(bpe, "train", lambda lines, size: given.append(lines) or train(lines, size))
    multi30k_seq2seq._load.cache_clear()
    corpus = multi30k_seq2seq.load(300, ("", ""), 48)
    assert given == [LINES["train"]["en"], LINES["train"]["de"]]
    assert corpus.lines["test"] == (("Two men .",), ("Zwei .",))
    row = corpus.arrays["test"]["target"][0].tolist()
    assert corpus.target.decode(row) == "Zwei ."


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"vocabulary": 100}, "vocabulary is 100: bytes and special tokens alone are 259"),
        ({"lengths": (20, 10)}, r"lengths are \(20, 10\): give some from 2 on, in order"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"beams": 0}, "beams is 0"),
    ],
)
def test_configurations(changes, text):
    with pytest.raises(dlx.BadInput, match=text):
        dataclasses.replace(multi30k_seq2seq.Config(), **changes)
