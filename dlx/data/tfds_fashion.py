"""A set of one's own for tensorflow-datasets, the pattern to copy: Fashion-MNIST from its authors'
IDX files. It needs no TensorFlow, neither to prepare nor to read.

    python -c "from dlx.data import tfds_fashion as own; print(own.prepare())"

and then `dlx.data.tfds.source("fashion_mnist_idx", "train")`. What to mind in a builder of yours:

- the set is named as the class, in small letters with underscores;
- write array_record: tfrecord, the default, needs TensorFlow, and so does `features.Image` of an
  array; give it images of Pillow, or use `features.Tensor`, which reads ten times as fast;
- describe it by `tfds.core.DatasetInfo(builder=self, ...)`;
- change VERSION when the content changes: the newest is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from dlx.data import mnist
from dlx.data import tfds as ours


class FashionMnistIdx(tfds.core.GeneratorBasedBuilder):
    """55,000, 5,000 and 10,000 images of articles: train, validation and test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(names=mnist.FASHION_NAMES),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        parts = mnist.load("fashion_mnist")  # finds, downloads and verifies
        return {name: self._generate_examples(part) for name, part in parts.items()}

    def _generate_examples(self, part: dict[str, np.ndarray]) -> Iterator[tuple[int, dict]]:
        for i, (image, label) in enumerate(zip(part["image"], part["label"], strict=True)):
            yield i, {"image": PIL.Image.fromarray(image[..., 0]), "label": int(label)}


def prepare(data_dir: str | Path | None = None) -> Path:
    """Writes the set, where it is not there yet -> its folder.

    Args:
      data_dir: None: DLX_DATA_DIR, or the cache where that is not set.

    Raises:
      BadInput: the authors' files are nowhere, or are not theirs.
    """
    root = ours.roots()[0] if data_dir is None else data_dir
    builder = FashionMnistIdx(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)
