"""Text as numbers: a vocabulary, and the batches of a network whose state is carried on."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from dlx.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens and their numbers, 0 to V - 1.

    Attributes:
      tokens: characters or words, each once.
      between: what stands between two tokens of a text: nothing, or a blank.

    Raises:
      BadInput: a token comes twice, or there are none.

    >>> words = Vocabulary(("<eos>", "a", "b"), " ")
    >>> words.encode("b a b").tolist(), words.decode([1, 0])
    ([2, 1, 2], 'a <eos>')
    """

    tokens: tuple[str, ...]
    between: str = ""

    def __post_init__(self):
        if not self.tokens or len(self.numbers) < len(self.tokens):
            raise BadInput(f"a vocabulary of {len(self.tokens)} tokens: give each once, and some")

    def __len__(self) -> int:
        return len(self.tokens)

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> np.ndarray:
        """A text of N tokens -> (N,) int32.

        Raises:
          BadInput: a token is not in the vocabulary.
        """
        tokens = text.split() if self.between else text
        try:
            return np.array([self.numbers[t] for t in tokens], np.int32)
        except KeyError as e:
            kind = "words" if self.between else "characters"
            raise BadInput(
                f"{e.args[0]!r} is beyond the vocabulary of {len(self):,} {kind}: leave it out"
            ) from None

    def decode(self, numbers: Iterable[int]) -> str:
        """Numbers below V -> their text."""
        return self.between.join(self.tokens[i] for i in numbers)


class Text(NamedTuple):
    """A text in three parts, (N,) int32 each, in the order in which it was written."""

    vocabulary: Vocabulary
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def check(tokens: np.ndarray, size: int, name: str) -> np.ndarray:
    """The tokens as they came, if a network with a vocabulary of `size` can read them.

    A number that is too large is silent in JAX: it gets an embedding of NaN or the last one.

    Raises:
      BadInput: no integers (N,), none at all, or one beyond the vocabulary.
    """
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise BadInput(f"{name}: {tokens.dtype} of shape {tokens.shape}: give integers (N,)")
    if not len(tokens):
        raise BadInput(f"{name} is empty: it needs at least one token")
    for extreme in (tokens.min(), tokens.max()):
        if not 0 <= extreme < size:
            at = int(np.argmax(tokens == extreme))
            raise BadInput(
                f"{name}: token {extreme} at position {at} is beyond the vocabulary: tokens go "
                f"from 0 to {size - 1}"
            )
    return tokens


def streams(
    tokens: np.ndarray | Callable[[], np.ndarray],
    batch_size: int,
    length: int,
    seed: int | None = None,
) -> Callable[[int, Callable[[int], Any]], Iterator[dict[str, np.ndarray]]]:
    """The `data` of a network whose state is carried from step to step.

    The text is cut into B parts. Row b reads part b from its beginning to its end, T tokens a
    step, and goes on where it stood a step before. Then another epoch begins: "begins" is true in
    its first step, and the state must be zero there. Batch t is a function of (seed, t) alone.

    Args:
      tokens: (N,) integers, or a function that opens them when they are first needed.
      batch_size: B.
      length: T.
      seed: each epoch begins at another token, by chance, so that the parts and the steps are cut
        elsewhere; fewer than T B + T tokens of N are left out. None: always at the first token.

    Returns:
      Batches of {"tokens": (B, T), "targets": (B, T), each the token after it, "begins": (B,)}.

    Raises:
      BadInput: batch_size or length is below 1, or the text is too short for one step.

    >>> data = streams(np.arange(9), 2, 2)(0, lambda n: slice(0, n))
    >>> [next(data)["tokens"].tolist() for _ in range(3)]
    [[[0, 1], [4, 5]], [[2, 3], [6, 7]], [[0, 1], [4, 5]]]
    """

    def data(first_step: int, rows: Callable[[int], Any]) -> Iterator[dict[str, np.ndarray]]:
        text = tokens() if callable(tokens) else tokens
        steps = epoch_steps(len(text), batch_size, length, seed)
        spare = len(text) - 1 - steps * batch_size * length

        @functools.lru_cache(maxsize=1)
        def start(epoch: int) -> int:
            if seed is None:
                return 0
            return int(np.random.Generator(np.random.Philox(key=[seed, epoch])).integers(spare + 1))

        def stream() -> Iterator[dict[str, np.ndarray]]:
            parts = np.arange(batch_size)[rows(batch_size)] * steps * length  # (B,)
            for step in itertools.count(first_step):
                epoch, t = divmod(step, steps)
                at = start(epoch) + parts[:, None] + t * length + np.arange(length + 1)[None]
                window = text[at]  # (B, T + 1)
                yield {
                    "tokens": window[:, :-1],
                    "targets": window[:, 1:],
                    "begins": np.full(len(parts), t == 0),
                }

        return stream()

    return data


def epoch_steps(n: int, batch_size: int, length: int, seed: int | None = None) -> int:
    """Steps of an epoch of `streams` over n tokens.

    >>> epoch_steps(929_589, 20, 20)
    2323
    """
    if min(batch_size, length) < 1:
        raise BadInput(f"batch_size is {batch_size} and length {length}: both must be positive")
    last = 1 if seed is None else length  # with a seed at least T tokens to begin at
    steps = (n - last) // (batch_size * length)
    if steps < 1:
        raise BadInput(
            f"batch_size {batch_size} x length {length} do not fit a text of {n:,} tokens: "
            "make either smaller"
        )
    return steps
