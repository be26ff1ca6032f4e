"""MNIST and Fashion-MNIST: 60,000 and 10,000 images of 28 x 28 in the authors' gzip IDX files.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner 1998 (handwritten digits); H. Xiao, K. Rasul,
R. Vollgraf, arXiv 1708.07747 (Zalando's articles in the same format).
"""

from __future__ import annotations

import functools
import math

import numpy as np

from dlx.data import arrays, files
from dlx.errors import BadInput

CLASSES = 10
VALIDATION = 5_000  # the last of the 60,000
FASHION_NAMES = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip

_SETS = {  # address, installed folders, sha256 of each decompressed file
    "mnist": (
        "http://yann.lecun.com/exdb/mnist/",
        (),
        {
            "train-images-idx3-ubyte": (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
            ),
            "train-labels-idx1-ubyte": (
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
            ),
            "t10k-images-idx3-ubyte": (
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
            ),
            "t10k-labels-idx1-ubyte": (
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
            ),
        },
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ("/usr/share/datasets/fashion-mnist",),  # Debian's dataset-fashion-mnist
        {
            "train-images-idx3-ubyte": (
                "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte": (
                "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte": (
                "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte": (
                "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        },
    ),
}


def load(name: str = "mnist") -> dict[str, dict[str, np.ndarray]]:
    """{"train", "validation", "test"}: {"image": (N, 28, 28, 1) uint8, "label": (N,) int32}.

    55,000, 5,000 and 10,000 images. The official training set without its last 5,000, which
    are for validation, and the official test set.

    Args:
      name: mnist or fashion_mnist.

    Raises:
      BadInput: the files are nowhere, or are not the authors'.
    """
    return _load(name, tuple(files.folders(name)))


@functools.cache
def _load(name: str, places: tuple) -> dict[str, dict[str, np.ndarray]]:
    """`places` only tells the cache apart: another DLX_DATA_DIR is another answer."""
    url, installed, digests = _SETS[name]

    def read(file: str) -> np.ndarray:
        path = files.find(name, f"{file}.gz", f"{url}{file}.gz", digests[file], installed)
        return idx(files.payload(path, digests[file]), str(path))

    def part(prefix: str, rows: slice) -> dict[str, np.ndarray]:
        image, label = read(f"{prefix}-images-idx3-ubyte"), read(f"{prefix}-labels-idx1-ubyte")
        batch = {"image": image[rows, ..., None], "label": label[rows].astype(np.int32)}
        return arrays.check(batch, name, CLASSES)

    return {
        "train": part("train", slice(None, -VALIDATION)),
        "validation": part("train", slice(-VALIDATION, None)),
        "test": part("t10k", slice(None)),
    }


def idx(content: bytes, name: str) -> np.ndarray:
    """An IDX file of unsigned bytes: two zeros, 8, the number of axes; each size in four bytes,
    the highest first; the values.

    Raises:
      BadInput: it is none.

    >>> idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]), "two").tolist()
    [5, 7]
    """
    axes = content[3] if len(content) > 3 else 0
    start = 4 + 4 * axes
    if content[:3] != b"\0\0\x08" or len(content) < start:
        raise BadInput(f"{name} is no IDX file of bytes: it begins with {content[:4].hex() or '?'}")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise BadInput(
            f"{name} has {len(content) - start:,} values and its shape is {shape}: get it anew"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
