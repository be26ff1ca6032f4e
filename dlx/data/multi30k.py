"""Multi30k, task 1: captions of photographs in English and German, 29,000 / 1,014 / 1,000 pairs.

D. Elliott, S. Frank, K. Sima'an, L. Specia, "Multi30K: Multilingual English-German Image
Descriptions", arXiv 1605.00459. The raw text, neither tokenised nor lower-cased.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from dlx.data import files
from dlx.errors import BadInput

URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
_FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
_DIGESTS = {  # of the text
    "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
}

Lines = Mapping[str, tuple[str, ...]]  # {"en": .., "de": ..}, line i a translation of line i


def load() -> dict[str, Lines]:
    """{"train", "validation", "test"}: {"en": sentences, "de": sentences}.

    The test set is test_2016_flickr.

    Raises:
      BadInput: the files are nowhere, or are not the authors'.
    """
    return _load(tuple(files.folders("multi30k")))


@functools.cache
def _load(places: tuple[Path, ...]) -> dict[str, Lines]:
    """`places` tells the cache apart: another DLX_DATA_DIR is another answer."""

    def read(file: str) -> tuple[str, ...]:
        """Plain, as people keep it, or packed, as the authors publish it."""
        plain = [place / file for place in places if files.there(place / file)]
        where, digest = f"{file}.gz", _DIGESTS[file]
        path = plain[0] if plain else files.find("multi30k", where, URL + where, digest)
        text = files.payload(path, digest).decode("utf-8")
        return tuple(line.strip() for line in text.removesuffix("\n").split("\n"))

    def part(name: str) -> Lines:
        lines = {side: read(f"{_FILES[name]}.{side}") for side in ("en", "de")}
        if len(lines["en"]) != len(lines["de"]):
            raise BadInput(f"multi30k: {name} has {len(lines['en'])} lines in English and "
                           f"{len(lines['de'])} in German: get it anew")  # fmt: skip
        return lines

    return {name: part(name) for name in _FILES}
