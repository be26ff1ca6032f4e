"""Modified Kneser-Ney against counts made by hand, and against dictionaries."""

import collections
import math
import os

import numpy as np
import pytest

import dlx
from dlx.data import shakespeare
from dlx.models import ngram


def discount_of(counts):
    n = [sum(c == i for c in counts) for i in range(5)]

    def D(c):
        i = min(c, 3)
        if not i:
            return 0
        if not n[i]:
            return i / 2
        found = i - (i + 1) * n[1] / max(n[1] + 2 * n[2], 1) * n[i + 1] / n[i]
        return found if 0 < found <= i else i / 2

    return D


def slow(train, V, order):
    """p(w | history), by dictionaries of tuples and the equations of the file's head."""
    counts = []
    for k in range(1, order + 1):
        grams = [tuple(train[i : i + k]) for i in range(len(train) - k + 1)]
        if k == order:
            counts.append(collections.Counter(grams))
        else:
            longer = {tuple(train[i : i + k + 1]) for i in range(len(train) - k)}
            counts.append(collections.Counter(g[1:] for g in longer))
    D = [discount_of(c.values()) for c in counts]

    def p(w, history, k):
        if k == 0:
            return 1 / V
        h = tuple(history[len(history) - k + 1 :]) if k > 1 else ()
        if len(h) < k - 1:
            return p(w, history, k - 1)
        seen = {g[-1]: c for g, c in counts[k - 1].items() if g[:-1] == h}
        total = sum(seen.values())
        if not total:
            return p(w, history, k - 1)
        rest = sum(D[k - 1](c) for c in seen.values()) / total
        c = seen.get(w, 0)
        return (c - D[k - 1](c)) / total + rest * p(w, history, k - 1)

    return lambda w, history: p(w, list(history), order)


def test_by_hand():
    """ "abab": the bigrams ab twice and ba once, so D(1) is 1 - 2 Y and D(2) is 2, Y being 1/3.
    Below them a and b have one company each, so n_1 = 2, n_2 = 0, Y = 1 and D(1) = 1.

    p(b) = (1 - 1) / 2 + 1 x 1/3 of three letters, p(b | a) = (2 - 2) / 2 + 1 x 1/3, and
    p(a | b) = (1 - 1/3) / 1 + 1/3 x 1/3."""
    orders = ngram.fit(np.array([0, 1, 0, 1]), 3, 2)
    got = np.exp(ngram.log_probabilities(orders, 3, np.array([0, 1, 0])))
    np.testing.assert_allclose(got, [1 / 3, 1 / 3, 2 / 3 + 1 / 9], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_as_dictionaries_have_it(order):
    random = np.random.default_rng(order)
    V = 5
    train = (random.random((200, 2)).prod(1) * V).astype(int)
    text = random.integers(0, V, 60)  # contexts that were never seen among them
    got = ngram.log_probabilities(ngram.fit(train, V, order), V, text)
    p = slow(train, V, order)
    want = [math.log(p(w, text[:i])) for i, w in enumerate(text)]
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize("history", [[], [3], [0, 1, 2], [4, 4, 4, 4], [0, 0, 5, 1]])
def test_probabilities_sum_to_one(history):
    """5 never occurs in training: it has a probability all the same."""
    V = 6
    orders = ngram.fit(np.random.default_rng(0).integers(0, 5, 300), V, 4)
    texts = [np.array([*history, w]) for w in range(V)]
    p = np.exp([ngram.log_probabilities(orders, V, t, len(history))[0] for t in texts])
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)


def test_context_is_not_counted():
    orders = ngram.fit(np.random.default_rng(0).integers(0, 5, 300), 5, 3)
    text = np.random.default_rng(1).integers(0, 5, 20)
    whole = ngram.log_probabilities(orders, 5, text)
    np.testing.assert_array_equal(ngram.log_probabilities(orders, 5, text, 7), whole[7:])


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda t: ngram.fit(t, 3, 0), "order is 0"), (lambda t: ngram.fit(t, 3, 5), "order is 5"),
     (lambda t: ngram.fit(t, 2, 2), "token 2 is beyond the vocabulary: give 0 to 1"),
     (lambda t: ngram.log_probabilities(ngram.fit(t, 3, 2), 3, t - 1), "token -1 is beyond")],
)  # fmt: skip
def test_what_cannot_be_counted(call, message):
    with pytest.raises(dlx.BadInput, match=message):
        call(np.array([0, 1, 2, 1]))


def test_shakespeare():
    """1.5165 nats a character, as another program has it."""
    if not os.environ.get("DLX_DATA_DIR"):
        pytest.skip(f"tinyshakespeare is not here: set DLX_DATA_DIR; {shakespeare.URL}")
    try:
        found = shakespeare.load()
    except dlx.BadInput as e:
        pytest.skip(f"tinyshakespeare is not here: {e}")
    learnt = np.concatenate([found.train, found.validation])
    orders = ngram.fit(learnt, 65, 7)
    text = np.concatenate([learnt[-7:], found.test])
    assert abs(-ngram.log_probabilities(orders, 65, text, 7).mean() - 1.5165) < 5e-5
