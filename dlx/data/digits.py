"""1,797 real handwritten digits, 8 x 8, as scikit-learn ships them.

The test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, 1998; each pixel counts the ink in a 4 x 4 field, 0 to 16.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from dlx.data import arrays
from dlx.errors import BadInput

CLASSES = 10
# Of the 1,797 rows of 64 pixels and a label, as uint8.
SHA256 = "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"
TEST, VALIDATION = 36, 18  # images of each class; the others train


@functools.cache
def load() -> dict[str, dict[str, np.ndarray]]:
    """{"train", "validation", "test"}: {"image": (N, 8, 8, 1) float32 in [0, 1], "label": (N,)}.

    One stratified split for ever: within a class the images are ordered by the sha256 of their
    64 pixels; the first 36 are for testing, the next 18 for validation. So no library's random
    numbers decide, and 1,257 / 180 / 360 images remain what they are.
    """
    images, labels = _read()  # (N, 8, 8) uint8, (N,)
    digest = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for c in range(CLASSES):
        order = sorted(np.flatnonzero(labels == c).tolist(), key=lambda i: digest[i])
        parts["test"] += order[:TEST]
        parts["validation"] += order[TEST : TEST + VALIDATION]
        parts["train"] += order[TEST + VALIDATION :]
    return {
        name: arrays.check(
            {"image": (images[index] / np.float32(16))[..., None], "label": labels[index]},
            f"digits ({name})",
            CLASSES,
        )
        for name, index in parts.items()
    }


def _read() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's own file, without importing scikit-learn, which takes a second."""
    package = importlib.util.find_spec("sklearn")
    assert package is not None and package.submodule_search_locations  # a dependency of dlx
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    try:
        rows = np.loadtxt(path, np.uint8, delimiter=",")  # (N, 65): 64 pixels and the label
    except (OSError, ValueError) as e:
        raise BadInput(f"digits cannot be read from {path} ({e}): reinstall scikit-learn") from e
    if hashlib.sha256(rows.tobytes()).hexdigest() != SHA256:
        raise BadInput(f"digits in {path} are not the known 1,797: reinstall scikit-learn")
    return rows[:, :64].reshape(-1, 8, 8), rows[:, 64].astype(np.int32)
