"""Readers of text, vocabularies, and batches whose rows go on from step to step."""

import hashlib
import itertools

import numpy as np
import pytest

import dlx
from dlx.data import files, generated, ptb, shakespeare, text


def all_rows(n):
    return slice(0, n)


def take(data, first, n, rows=all_rows):
    return list(itertools.islice(data(first, rows), n))


# ---- Vocabulary --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "between", "line"), [("ab c", "", "cab  b"), (("one", "two"), " ", "two one two")]
)
def test_there_and_back(tokens, between, line):
    v = text.Vocabulary(tuple(tokens), between)
    numbers = v.encode(line)
    assert numbers.dtype == np.int32 and numbers.max() < len(v)
    assert v.decode(numbers.tolist()) == line


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: text.Vocabulary(tuple("ab")).encode("abc"),
      "^'c' is beyond the vocabulary of 2 characters: leave it out$"),
     (lambda: text.Vocabulary(("a", "b"), " ").encode("a cat"), "'cat' is beyond .* 2 words"),
     (lambda: text.Vocabulary(("a", "a")), "give each once"),
     (lambda: text.Vocabulary(()), "0 tokens"),
     (lambda: text.check(np.array([0, 5, 2]), 5, "train"),
      "train: token 5 at position 1 is beyond the vocabulary: tokens go from 0 to 4"),
     (lambda: text.check(np.array([0, -1]), 5, "train"), "token -1 at position 1"),
     (lambda: text.check(np.array([0.0]), 5, "train"), "float64 of shape"),
     (lambda: text.check(np.array([[1]]), 5, "train"), "give integers"),
     (lambda: text.check(np.array([], int), 5, "train"), "train is empty")],
)  # fmt: skip
def test_what_is_no_text(call, message):
    with pytest.raises(dlx.BadInput, match=message) as e:
        call()
    assert "\n" not in str(e.value)


# ---- Streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_go_on(seed):
    """Each row reads on where it stood, the rows side by side read the text once an epoch, and
    only the first step of an epoch begins."""
    B, T, N = 3, 4, 70
    steps = text.epoch_steps(N, B, T, seed)
    assert steps == 5
    batches = take(text.streams(np.arange(N), B, T, seed), 0, 4 * steps)
    starts = []
    for epoch in range(4):
        part = batches[epoch * steps : (epoch + 1) * steps]
        assert [b["begins"].tolist() for b in part] == [[t == 0] * B for t in range(steps)]
        read = np.concatenate([b["tokens"] for b in part], 1).reshape(-1)  # row after row
        starts.append(int(read[0]))
        np.testing.assert_array_equal(read, np.arange(read[0], read[0] + steps * B * T))
        for b in part:
            np.testing.assert_array_equal(b["targets"], b["tokens"] + 1)
    assert len(set(starts)) == (1 if seed is None else len(set(starts))) and max(starts) < N
    assert seed is None or len(set(starts)) > 1


def test_a_batch_is_a_function_of_seed_and_step():
    streams = text.streams(np.arange(100), 4, 3, seed=1)
    whole = take(streams, 0, 30)
    for first in (1, 7, 8, 9, 23):
        for got, want in zip(take(streams, first, 3), whole[first:], strict=False):
            for name in want:
                np.testing.assert_array_equal(got[name], want[name])
    half = take(streams, 5, 1, lambda n: np.array([2, 3]))[0]
    np.testing.assert_array_equal(half["tokens"], whole[5]["tokens"][2:])
    other = take(text.streams(np.arange(100), 4, 3, seed=2), 0, 30)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(whole, other, strict=True))


def test_every_start_comes():
    """Of a text with room for T of them, none is left out or beyond the end."""
    streams = text.streams(np.arange(13), 2, 4, seed=0)
    steps = text.epoch_steps(13, 2, 4, 0)
    starts = {int(b["tokens"][0, 0]) for b in take(streams, 0, 60 * steps) if b["begins"][0]}
    assert starts == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("B", "T", "message"),
    [(0, 4, "batch_size is 0"), (2, 0, "length 0: both"), (5, 4, "batch_size 5 x length 4 do not")],
)
def test_streams_that_do_not_fit(B, T, message):
    with pytest.raises(dlx.BadInput, match=message):
        take(text.streams(np.arange(20), B, T), 0, 1)


# ---- Generated data ----------------------------------------------------------------------------


def test_generated():
    def make(random, n):
        return {"x": random.integers(0, 1 << 30, n)}

    data = generated.batches(make, 6, seed=4)
    whole = take(data, 0, 5)
    np.testing.assert_array_equal(take(data, 3, 1)[0]["x"], whole[3]["x"])
    mine = take(data, 3, 1, lambda n: slice(2, 4))[0]
    np.testing.assert_array_equal(mine["x"], whole[3]["x"][2:4])
    held = [generated.held_out(make, 6, which)["x"] for which in (1, 2)]
    np.testing.assert_array_equal(held[0], generated.held_out(make, 6, 1)["x"])
    others = [*(b["x"] for b in whole), take(generated.batches(make, 6, 5), 0, 1)[0]["x"], *held]
    others += [take(generated.batches(make, 6, 0), 0, 1)[0]["x"]]
    assert len({tuple(x.tolist()) for x in others}) == len(others)


# ---- Readers -----------------------------------------------------------------------------------


def nowhere(*args, **kwargs):
    raise OSError("tests do not download")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files.urllib.request, "urlopen", nowhere)
    yield tmp_path / "data"
    shakespeare._load.cache_clear()
    ptb._load.cache_clear()


@pytest.mark.parametrize("reader", [shakespeare, ptb])
def test_what_is_missing_is_told(reader, home):
    with pytest.raises(dlx.BadInput, match=rf"^{reader.NAME}: .*https://.*DLX_DATA_DIR") as e:
        reader.load()
    assert "\n" not in str(e.value) and str(home / reader.NAME) in str(e.value)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def test_a_small_shakespeare(home, monkeypatch):
    line = "ROMEO: But, soft!\n" * 10
    path = home / "tinyshakespeare" / "input.txt"
    digest = put(path, line.encode())
    monkeypatch.setattr(shakespeare, "SHA256", digest)
    found = shakespeare.load()
    assert [len(part) for part in found[1:]] == [153, 9, 18] and len(found.vocabulary) == 65
    assert found.vocabulary.decode(np.concatenate(found[1:]).tolist()) == line
    put(path, line.replace("soft", "SOFT").encode())
    shakespeare._load.cache_clear()
    with pytest.raises(dlx.BadInput, match=r"sha256.*get it anew"):
        shakespeare.load()


def test_a_small_treebank(home, monkeypatch):
    lines = [b" the cat sat \n a N <unk> \n", b" the cat \n", b" a \n sat \n"]
    digests = {
        name: put(home / "ptb" / name, content)
        for name, content in zip(ptb.DIGESTS, lines, strict=True)
    }
    monkeypatch.setattr(ptb, "DIGESTS", digests)
    found = ptb.load()
    assert found.vocabulary.tokens == ("<eos>", "<unk>", "N", "a", "cat", "sat", "the")
    assert found.vocabulary.decode(found.train.tolist()) == "the cat sat <eos> a N <unk> <eos>"
    assert found.vocabulary.decode(found.test.tolist()) == "a <eos> sat <eos>"
    digests["ptb.test.txt"] = put(home / "ptb" / "ptb.test.txt", b" dog \n")
    ptb._load.cache_clear()
    with pytest.raises(dlx.BadInput, match="'dog' is beyond the vocabulary of 7 words"):
        ptb.load()


@pytest.mark.parametrize(
    ("reader", "sizes"),
    [(shakespeare, [65, 948_084, 55_770, 111_540]), (ptb, [10_000, 929_589, 73_760, 82_430])],
)
def test_the_real_texts(reader, sizes, monkeypatch):
    monkeypatch.setattr(files.urllib.request, "urlopen", nowhere)
    try:
        found = reader.load()
    except dlx.BadInput as e:
        pytest.skip(f"{reader.NAME} is not here: {e}")
    assert [len(part) for part in found] == sizes
    for part in found[1:]:
        text.check(part, sizes[0], reader.NAME)
