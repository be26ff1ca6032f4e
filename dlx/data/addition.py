"""Sums to be learnt from their digits: "85+970" -> "1055"."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from dlx.data import pairs
from dlx.errors import BadInput

PAD, START, END = 0, 1, 2
SYMBOLS = ("<pad>", "<s>", "</s>", *"0123456789+")

Lines = tuple[tuple[str, ...], tuple[str, ...]]  # sums, results


class Characters:
    """Text <-> tokens, a character each."""

    def __len__(self) -> int:
        return len(SYMBOLS)

    def encode(self, lines: Iterable[str]) -> list[list[int]]:
        """The tokens of each line, without start and end."""
        return [[SYMBOLS.index(c) for c in line] for line in lines]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text up to the end's token."""
        kept = list(tokens)
        return "".join(self.pieces(kept[: kept.index(END)] if END in kept else kept))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token stands for."""
        return [SYMBOLS[t] for t in tokens]


@functools.cache
def load(digits: int = 3, train: int = 45_000) -> dict[str, Lines]:
    """{"train", "validation", "test"}: the sums, and their results, as text.

    Two numbers of up to `digits` digits are drawn as a pair, whichever comes first, and a pair is
    in one split only: who has seen 85+970 is not asked for 970+85. The draw is always the same.

    Args:
      digits: of the longest number.
      train: sums to train on; a ninth as many are for validation, two ninths for the test.

    Raises:
      BadInput: there are not as many pairs, or fewer than nine are asked for.
    """
    small, large = np.triu_indices(10**digits)
    sizes = {"train": train, "validation": train // 9, "test": 2 * train // 9}
    if train < 9 or sum(sizes.values()) > len(small):
        raise BadInput(f"train is {train}: numbers of {digits} digits make {len(small):,} pairs, "
                       f"give 9 to {len(small) * 3 // 4:,}")  # fmt: skip
    random = np.random.Generator(np.random.Philox(key=[0, digits]))
    drawn = random.permutation(len(small))[: sum(sizes.values())]
    pair = np.stack([small[drawn], large[drawn]], 1)
    pair = random.permuted(pair, axis=1)
    sums = tuple(f"{a}+{b}" for a, b in pair.tolist())
    results = tuple(map(str, pair.sum(1).tolist()))
    out, at = {}, 0
    for name, n in sizes.items():
        out[name] = sums[at : at + n], results[at : at + n]
        at += n
    return out


def arrays(sums: Sequence[str], results: Sequence[str]) -> dict[str, np.ndarray]:
    """As `dlx.data.pairs.pad`."""
    both = Characters()
    return pairs.pad(both.encode(sums), both.encode(results), end=END)
