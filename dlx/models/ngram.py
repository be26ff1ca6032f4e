"""Interpolated modified Kneser-Ney: what counting alone can do for the next token.

S. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling",
Technical Report TR-10-98, Harvard, 1998, section 3, after R. Kneser and H. Ney, "Improved
backing-off for m-gram language modeling", 1995. Of every count something is taken off, and what is
taken off goes to the model of the next shorter context:

    p_k(w | h) = (c_k(h w) - D_k(c_k(h w))) / c_k(h .) + g_k(h) p_{k-1}(w | h')
    g_k(h) = sum over w of D_k(c_k(h w)) / c_k(h .)

where h' is h without its oldest token, and p_0 = 1 / V. c_k counts how often h w occurs where k is
the highest order, and below it in how many different tokens' company: the number of different u
with u h w in the text. The discounts are D_k(1), D_k(2) and D_k(3 or more), from how many grams
n_1 ... n_4 have the counts 1 to 4:

    Y = n_1 / (n_1 + 2 n_2),    D(i) = i - (i + 1) Y n_{i+1} / n_i

In a context that was never seen, p_k = p_{k-1}. There is no unknown token: V is closed.

Symbols: V vocabulary, N tokens, k order, h context of k - 1 tokens, w the token after it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dlx.errors import BadInput


class Order(NamedTuple):
    """The grams of k tokens: sorted codes, and of each what p_k needs.

    A gram's code is (number of its first k - 1 tokens among the grams of that length) V + w; the
    place of the code among the sorted ones is the gram's number.
    """

    codes: np.ndarray  # (G,) int64
    share: np.ndarray  # (G,) discounted count over that of all in its context
    left: np.ndarray  # (grams of k - 1 tokens,) g_k of each as a context; 1 where it is none


def fit(tokens: np.ndarray, vocabulary: int, order: int) -> list[Order]:
    """Counts a text.

    Args:
      tokens: (N,) integers below V.
      vocabulary: V.
      order: the longest grams; 5 is usual for words, 7 for characters.

    Returns:
      The orders from 1 up.

    Raises:
      BadInput: order is below 1 or above N, or a token is beyond the vocabulary.
    """
    tokens = np.asarray(tokens, np.int64)
    if not 1 <= order <= len(tokens):
        raise BadInput(f"order is {order}: give 1 to the {len(tokens)} tokens of the text")
    _check(tokens, vocabulary)
    # numbers[k][i]: of the gram of k tokens that begins with tokens[i]. codes[k]: of all of them.
    numbers, codes = [np.zeros(len(tokens) + 1, np.int64)], [np.zeros(1, np.int64)]
    for k in range(1, order + 1):
        last = tokens[k - 1 :]
        found, number = np.unique(numbers[-1][: len(last)] * vocabulary + last, return_inverse=True)
        numbers.append(number)
        codes.append(found)
    orders = []
    for k in range(1, order + 1):
        if k == order:
            count = np.bincount(numbers[k], minlength=len(codes[k]))
        else:  # of each gram of k + 1 tokens one example, and which gram is its last k tokens
            example = np.zeros(len(codes[k + 1]), np.int64)
            example[numbers[k + 1]] = np.arange(len(numbers[k + 1]))
            count = np.bincount(numbers[k][example + 1], minlength=len(codes[k]))
        context = codes[k] // vocabulary
        taken = discounts(count)[np.minimum(count, 3)]
        total = np.bincount(context, count, minlength=len(codes[k - 1]))
        rest = np.bincount(context, taken, minlength=len(codes[k - 1]))
        some = np.maximum(total, 1)
        orders.append(
            Order(codes[k], (count - taken) / some[context], np.where(total, rest / some, 1.0))
        )
    return orders


def discounts(count: np.ndarray) -> np.ndarray:
    """D(0) = 0, D(1), D(2), D(3 or more), from the counts of all grams.

    What a small text gives no estimate of within (0, i] is i / 2: nothing must have probability 0.
    """
    n = np.bincount(np.minimum(count, 5), minlength=6)[:5].astype(float)
    Y = n[1] / max(n[1] + 2 * n[2], 1)
    D = [0.0]
    for i in (1, 2, 3):
        estimate = i - (i + 1) * Y * n[i + 1] / n[i] if n[i] else 0.0
        D.append(estimate if 0 < estimate <= i else i / 2)
    return np.array(D)


def log_probabilities(
    orders: list[Order], vocabulary: int, tokens: np.ndarray, first: int = 0
) -> np.ndarray:
    """log p(token | all before it in `tokens`), in nats, of those from position `first` on.

    Args:
      orders: of `fit`.
      vocabulary: V.
      tokens: (N,) integers below V; those before `first` are context only.

    Returns:
      (N - first,) float64.
    """
    tokens = np.asarray(tokens, np.int64)
    _check(tokens, vocabulary)
    p = np.full(len(tokens), 1 / vocabulary)
    seen = np.zeros(len(tokens) + 1, np.int64)  # the context's number, by its first token; -1: none
    for k, (codes, share, left) in enumerate(orders, 1):
        context, last = seen[: max(len(tokens) - k + 1, 0)], tokens[k - 1 :]
        code = context * vocabulary + last
        at = np.minimum(np.searchsorted(codes, code), len(codes) - 1)
        known = (context >= 0) & (codes[at] == code)
        mine = p[k - 1 :]
        mine *= np.where(context >= 0, left[context], 1.0)
        mine += np.where(known, share[at], 0.0)
        seen = np.where(known, at, -1)
    return np.log(p[first:])


def _check(tokens: np.ndarray, vocabulary: int) -> None:
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise BadInput(f"token {worst} is beyond the vocabulary: give 0 to {vocabulary - 1}")
