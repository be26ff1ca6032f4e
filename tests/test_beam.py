"""Beam search against all sequences there are, and against a slow loop."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlx
from dlx.tasks import beam

B, V, L, END = 3, 4, 4, 2


def tables(seed):
    """log p of the next token in each step after any two, (B, 7, V, V, V)."""
    logits = np.random.default_rng(seed).normal(size=(B, 7, V, V, V)) * 2
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def searched(table, beams, alpha=0.0, length=L, end=END):
    """By a model whose state is the token before the last, and how many steps it has made."""

    def step(state, token):
        before, row, count = state
        return table[row, count, before, token], (token, row, count + 1)

    table = jnp.asarray(table)
    start = jnp.arange(len(table), dtype=jnp.int32) % V
    state = (jnp.zeros_like(start), jnp.arange(len(table)), jnp.zeros_like(start))
    search = functools.partial(beam.search, step, beams=beams, length=length, end=end, alpha=alpha)
    return jax.tree.map(np.asarray, jax.jit(search)(state, start))


def log_p(table, row, tokens):
    before, last, total = 0, row % V, 0.0
    for t, token in enumerate(tokens):
        total += table[row, t, before, last, token]
        before, last = last, token
    return total


def norm(n, alpha):
    return ((5 + n) / 6) ** alpha


def all_sequences(length=L, end=END):
    for n in range(1, length + 1):
        for tokens in itertools.product(range(V), repeat=n):
            if end not in tokens[:-1] and (tokens[-1] == end or n == length):
                yield tokens


@pytest.mark.parametrize("alpha", [0.0, 0.7, 2.0])
def test_a_wide_beam_finds_every_sequence_in_its_order(alpha, x64):
    table = tables(0)
    every = list(all_sequences())
    found = searched(table, len(every) + 5, alpha)
    for row in range(B):
        scored = [(log_p(table, row, y) / norm(len(y), alpha), y) for y in every]
        for i, (score, y) in enumerate(sorted(scored, reverse=True)):
            n = found.lengths[row, i]
            assert tuple(found.tokens[row, i, :n].tolist()) == y
            assert (found.tokens[row, i, n:] == END).all()
            np.testing.assert_allclose(found.scores[row, i], score, rtol=1e-12)
    assert (found.scores[:, len(every) :] == -np.inf).all()


def slow(table, row, beams, alpha, length):
    """Beam search with lists."""
    alive, ended = [((), 0.0)], []
    for _ in range(length):
        grown = [((*y, v), log_p(table, row, (*y, v))) for y, _ in alive for v in range(V)]
        grown = sorted(grown, key=lambda x: -x[1])[: beams - len(ended)]
        ended += [x for x in grown if x[0][-1] == END]
        alive = [x for x in grown if x[0][-1] != END]
    scored = [(p / norm(len(y), alpha), y) for y, p in ended + alive]
    return sorted(scored, reverse=True)


@pytest.mark.parametrize("beams", [1, 2, 3, 5])
def test_a_narrow_beam(beams, x64):
    """As the lists have it; of many models some make it miss the best."""
    missed = 0
    for seed in range(5):
        table = tables(seed)
        found = searched(table, beams, 0.6, 6)
        for row in range(B):
            wanted = slow(table, row, beams, 0.6, 6)
            best = max((log_p(table, row, y) / norm(len(y), 0.6)) for y in all_sequences(6))
            missed += wanted[0][0] < best - 1e-9
            for i, (score, y) in enumerate(wanted):
                assert tuple(found.tokens[row, i, : found.lengths[row, i]].tolist()) == y
                np.testing.assert_allclose(found.scores[row, i], score, rtol=1e-12)
    assert missed > 0 or beams > 1


def test_one_beam_is_greedy():
    table = tables(1).astype(np.float32)
    found = searched(table, 1, 1.0, 7)
    for row in range(B):
        before, last, tokens = 0, row % V, []
        while len(tokens) < 7 and END not in tokens:
            before, last = last, int(table[row, len(tokens), before, last].argmax())
            tokens.append(last)
        assert found.tokens[row, 0, : found.lengths[row, 0]].tolist() == tokens


def test_alpha_favours_the_long():
    """Ending at once is likelier than any other sequence, and the mean of a token is not."""
    p = np.full((1, 7, V, V, V), 0.001)
    p[..., 1] = 0.6  # goes on
    p[..., END] = 1 - p[0, 0, 0, 0, [0, 1, 3]].sum()
    table = np.log(p).astype(np.float32)
    assert searched(table, 4, 0.0).lengths[0, 0] == 1
    assert searched(table, 4, 3.0).lengths[0, 0] == L


def test_it_stops_where_all_have_ended():
    """The state counts the steps: a model that ends at once is asked once."""
    asked = []

    def step(state, token):
        jax.debug.callback(lambda: asked.append(1))
        p = jnp.full((len(token), V), -50.0).at[:, END].set(0.0)
        return p, state

    jax.block_until_ready(
        beam.search(step, (), jnp.zeros(2, jnp.int32), beams=1, length=9, end=END)
    )
    jax.effects_barrier()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"beams": 0}, "beams is 0 and length 4: both must be at least 1"),
        ({"length": 0}, "beams is 2 and length 0"),
        ({"alpha": -1.0}, "alpha is -1.0: it must be 0 or more"),
        ({"end": 4}, "end is 4: tokens go from 0 to 3"),
    ],
)
def test_bad_input(changes, text):
    with pytest.raises(dlx.BadInput, match=text):
        searched(tables(0), **({"beams": 2} | changes))
