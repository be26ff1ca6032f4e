"""Tiny Shakespeare: 1,115,394 characters of the plays, 65 different ones.

A. Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015: input.txt of his
char-rnn. The last tenth is what figures are published for, often under the name of validation.
Here it is the test text, and the validation text is the end of the nine tenths before it.
"""

from __future__ import annotations

import functools

from dlx.data import files, text

NAME = "tinyshakespeare"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SPLIT = (0.85, 0.9)  # where validation and test begin


def load() -> text.Text:
    """948,084 characters for training, 55,770 for validation, 111,540 for the test.

    Raises:
      BadInput: the file is nowhere, or is not the author's.
    """
    return _load(tuple(files.folders(NAME)))


@functools.cache
def _load(places: tuple) -> text.Text:
    """`places` only tells the cache apart: another DLX_DATA_DIR is another answer."""
    content = files.payload(files.find(NAME, "input.txt", URL, SHA256), SHA256).decode("ascii")
    vocabulary = text.Vocabulary(tuple(CHARACTERS))
    tokens = vocabulary.encode(content)
    a, b = (int(share * len(tokens)) for share in SPLIT)
    return text.Text(vocabulary, tokens[:a], tokens[a:b], tokens[b:])
