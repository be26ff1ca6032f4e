"""CIFAR-10: 60,000 colour images of 32 x 32 in ten classes, in the authors' binary batches.

A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import contextlib
import functools
import tarfile
from pathlib import Path

import numpy as np

from dlx.data import arrays, files
from dlx.errors import BadInput

CLASSES = 10
VALIDATION = 5_000  # the last of the 50,000
NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"  # of the archive
FOLDER = "cifar-10-batches-bin"  # of the batches, within the archive too
# Of each channel over the 50,000 training images, in units of 255.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

_DIGESTS = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}


def load() -> dict[str, dict[str, np.ndarray]]:
    """{"train", "validation", "train+validation", "test"}: {"image": (N, 32, 32, 3) uint8,
    "label": (N,) int32}.

    45,000, 5,000, 50,000 and 10,000 images; the last 5,000 of the official training set are for
    validation.

    Raises:
      BadInput: the files are nowhere, or are not the authors'.
    """
    return _load(tuple(files.folders("cifar10")))


@functools.cache
def _load(places: tuple[Path, ...]) -> dict[str, dict[str, np.ndarray]]:
    folder = _folder(places)
    parts = [_read(folder / f"data_batch_{i}.bin") for i in range(1, 6)]
    whole = {k: np.concatenate([part[k] for part in parts]) for k in ("image", "label")}
    return {
        "train": {k: v[:-VALIDATION] for k, v in whole.items()},
        "validation": {k: v[-VALIDATION:] for k, v in whole.items()},
        "train+validation": whole,
        "test": _read(folder / "test_batch.bin"),
    }


def _folder(places: tuple[Path, ...]) -> Path:
    """Where the batches are: unpacked beside the archive, which may have to be downloaded."""
    for place in places:
        for folder in (place / FOLDER, place):
            if files.there(folder / "data_batch_1.bin"):
                return folder
    archive = files.find("cifar10", "cifar-10-binary.tar.gz", URL, SHA256)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(archive.parent, filter="data")
    except (tarfile.TarError, OSError, EOFError) as e:
        with contextlib.suppress(OSError):
            (archive.parent / FOLDER).rmdir()
        raise BadInput(f"{archive} cannot be unpacked ({e}): remove it and get it anew") from e
    return archive.parent / FOLDER


def _read(path: Path) -> dict[str, np.ndarray]:
    """A batch: rows of one label byte and 3,072 bytes of red, green and blue, row by row."""
    if not files.there(path):
        raise BadInput(f"cifar10: {path} is missing: get the archive from {URL}")
    content = files.payload(path, _DIGESTS[path.name])
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    image = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
    batch = {"image": np.ascontiguousarray(image), "label": rows[:, 0].astype(np.int32)}
    return arrays.check(batch, path.name, CLASSES)
