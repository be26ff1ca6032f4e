"""Beam search: the likeliest sequences that a step-wise model has, as far as K of them can see.

Of all one-token extensions of the K unfinished sequences the likeliest are kept; one that has ended
keeps its place, so that fewer go on, and K = 1 is greedy search. The finished ones are compared by

    score = log p / ((5 + n) / 6)^alpha

for n tokens, the end's included (Y. Wu et al., arXiv 1609.08144, equation 14, without the coverage
of the source): log p alone favours the short.

Symbols: B sequences, K beams, V vocabulary, L the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlx.errors import BadInput

State = Any


class Beams(NamedTuple):
    """The best first."""

    tokens: jax.Array  # (B, K, L) int32, the end's among them; `end` behind it
    lengths: jax.Array  # (B, K) int32, up to the end's token
    scores: jax.Array  # (B, K); -inf where there are fewer than K sequences at all


def search(
    step: Callable[[State, jax.Array], tuple[jax.Array, State]],
    state: State,
    start: jax.Array,
    *,
    beams: int,
    length: int,
    end: int,
    alpha: float = 0.0,
) -> Beams:
    """The best sequences that end with `end` or have `length` tokens. Pure; to be jitted.

    Args:
      step: (state, the last tokens (B K,)) -> (log probabilities of the next (B K, V), state). Row
        b K + k is beam k of sequence b. What no token changes belongs into its closure, repeated K
        times: the state's rows are moved about in every step.
      state: any pytree of arrays (B, ...).
      start: (B,) int32, what stands before the first token.
      beams: K.
      length: L.
      end: the token that ends a sequence.
      alpha: 0 compares log p itself, 1 nearly the mean of a token.

    Raises:
      BadInput: beams or length is below 1, alpha below 0, or the end is no token.

    >>> p = jnp.log(jnp.array([[0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [1.0, 0.0, 0.0]]))
    >>> found = search(lambda s, y: (p[y], s), (), jnp.array([2]), beams=3, length=4, end=0)
    >>> found.tokens[0, 0].tolist(), found.lengths[0].tolist()
    ([0, 0, 0, 0], [1, 1, 1])
    """
    if beams < 1 or length < 1:
        raise BadInput(f"beams is {beams} and length {length}: both must be at least 1")
    if not 0 <= alpha < float("inf"):
        raise BadInput(f"alpha is {alpha}: it must be 0 or more")
    B, K = len(start), beams
    split = jax.tree.map(lambda x: jnp.repeat(x, K, 0), state)  # (B K, ...)
    shape = jax.eval_shape(step, split, jnp.repeat(start, K))[0]
    V = shape.shape[-1]
    if not 0 <= end < V:
        raise BadInput(f"end is {end}: tokens go from 0 to {V - 1}")
    is_end = (jnp.arange(V) == end)[None, None]
    pick = jax.vmap(lambda x, i: x[i])  # (B, K, ...), (B, K) -> (B, K, ...)

    def grow(carry: Any) -> Any:
        t, last, tokens, n, logp, done, state = carry
        new, state = step(state, last.reshape(-1))
        total = logp[..., None] + new.reshape(B, K, V)
        # One that has ended has one extension, itself, before all others.
        ranks = jnp.where(done[..., None], jnp.where(is_end, jnp.inf, -jnp.inf), total)
        rank, best = jax.lax.top_k(ranks.reshape(B, K * V), K)  # (B, K)
        beam, last = best // V, (best % V).astype(start.dtype)
        was = pick(done, beam)
        logp = jnp.where(was, pick(logp, beam), rank)
        logp = jnp.where(rank == -jnp.inf, -jnp.inf, logp)  # there are fewer than K sequences
        n = pick(n, beam) + (~was).astype(n.dtype)
        tokens = pick(tokens, beam).at[:, :, t].set(last)
        state = jax.tree.map(
            lambda x: pick(x.reshape(B, K, *x.shape[1:]), beam).reshape(x.shape), state
        )
        done = (was | (last == end)) & (logp > -jnp.inf)  # what is none keeps no place
        return t + 1, last, tokens, n, logp, done, state

    first = (
        jnp.int32(0),
        jnp.repeat(start[:, None], K, 1),
        jnp.full((B, K, length), end, start.dtype),
        jnp.zeros((B, K), jnp.int32),
        # At first all K are the same: one of them counts.
        jnp.where(jnp.arange(K)[None] == 0, 0.0, -jnp.inf).astype(shape.dtype).repeat(B, 0),
        jnp.zeros((B, K), bool),
        split,
    )
    _, _, tokens, n, logp, _, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < length) & ~carry[5].all(), grow, first
    )
    scores = logp / ((5 + n).astype(logp.dtype) / 6) ** alpha
    scores, order = jax.lax.top_k(scores, K)
    return Beams(pick(tokens, order), pick(n, order), scores)
