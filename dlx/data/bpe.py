"""Byte-pair vocabularies: R. Sennrich, B. Haddow, A. Birch, arXiv 1508.07909, on bytes, so that
every text is a sequence of tokens and comes back from them unchanged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from dlx.errors import BadInput

PAD, START, END = 0, 1, 2  # what stands behind the end, before the first token, after the last
SPECIAL = ("<pad>", "<s>", "</s>")
LEAST = 256 + len(SPECIAL)


class Vocabulary:
    """Text <-> tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, lines: Iterable[str]) -> list[list[int]]:
        """The tokens of each line, without start and end."""
        return [found.ids for found in self._tokenizer.encode_batch(list(lines))]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text up to the end's token."""
        kept = list(tokens)
        kept = kept[: kept.index(END)] if END in kept else kept
        return self._tokenizer.decode(kept, skip_special_tokens=True).strip()

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """What each token stands for, for people to read."""
        special = dict(enumerate(SPECIAL))
        return [special.get(t) or self._tokenizer.decode([t]).strip() or "␣" for t in tokens]

    def digest(self) -> str:
        """Twelve digits that tell this vocabulary from any other: of its tokens and merges."""
        model = json.loads(self._tokenizer.to_str())["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        text = json.dumps([sorted(model["vocab"].items(), key=lambda x: x[1]), merges])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self, digest: str, name: str) -> Vocabulary:
        """This one, if it is the one that a run was configured for; "" is any.

        Raises:
          BadInput: it is another one.
        """
        found = self.digest()
        if digest and digest != found:
            raise BadInput(
                f"the {name} vocabulary is {found} and that of the configuration {digest}: restore "
                f"data and tokenizers for a checkpoint, or name {found} in a new run"
            )
        return self


def train(lines: Iterable[str], size: int) -> Vocabulary:
    """The vocabulary of a text: bytes, and the pairs that are merged, the most frequent first.

    Words are told apart as in GPT-2; a space belongs to the word behind it. Deterministic.

    Args:
      lines: of training data, and of nothing else.
      size: tokens at most; a small text has fewer pairs that occur twice.

    Raises:
      BadInput: size leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if size < LEAST:
        raise BadInput(f"a vocabulary of {size} has no room for all bytes: give {LEAST} or more")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, show_progress=False, special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    return Vocabulary(tokenizer)
