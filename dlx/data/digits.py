"""1,797 real handwritten digits, 8 x 8, as scikit-learn ships them.

The test part of E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI
Machine Learning Repository, 1998; each pixel counts the ink in a 4 x 4 field, 0 to 16.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np

from dlx.data import arrays

CLASSES = 10
TEST, VALIDATION = 36, 18  # images of each class; the others train


@functools.cache
def load() -> dict[str, dict[str, np.ndarray]]:
    """{"train", "validation", "test"}: {"image": (N, 8, 8, 1) float32 in [0, 1], "label": (N,)}.

    One stratified split for ever: within a class the images are ordered by the sha256 of their
    64 pixels; the first 36 are for testing, the next 18 for validation. So no library's random
    numbers decide, and 1,257 / 180 / 360 images remain what they are.
    """
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    images, labels = raw.images.astype(np.uint8), raw.target.astype(np.int32)  # (N, 8, 8), (N,)
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
