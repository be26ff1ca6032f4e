"""Prepared sets of tensorflow-datasets by name, without TensorFlow.

Any set that lies prepared as array_record in one of the usual folders can be read, also one that
the registry of tensorflow-datasets has never heard of: its features are described beside its files.
How to prepare a set of your own: `dlx.data.tfds_fashion` is the pattern to copy.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlx.data import arrays as arrays_lib
from dlx.data import files
from dlx.errors import BadInput
from dlx.examples import stack

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


def source(name: str, split: str, data_dir: str | Path | None = None) -> Any:
    """The decoded examples of a split: what `dlx.data.stream.batches` reads.

    Images are decoded by Pillow, whatever else is installed: decoders differ in a bit or two.

    Args:
      name: `my_set`, `my_set/config`, with a version as `my_set:1.0.0`; else the newest.
      split: `train`, `test`, a part as `train[:90%]`.
      data_dir: the only folder to look into; None: those of `roots`.

    Returns:
      `len(it)` and `it[i]` -> {feature: array or number}.

    Raises:
      BadInput: the set is not prepared there, or not as array_record; there is no such split, or it
        is empty; a file or an example is damaged, when it is read.
    """
    return _decoded(_builder(name, data_dir), name, split)


def arrays(name: str, split: str, data_dir: str | Path | None = None) -> dict[str, np.ndarray]:
    """A split that fits in memory, read once: {feature: (N, ...)}.

    Args:
      name, split, data_dir: as of `source`.

    Raises:
      BadInput: as `source`; examples of several shapes; what `dlx.data.arrays.check` refuses.
    """
    builder = _builder(name, data_dir)
    examples = _decoded(builder, name, split)
    found = stack((examples[i] for i in range(len(examples))), len(examples), name)
    label = dict(builder.info.features.items()).get("label")
    return arrays_lib.check(found, name, getattr(label, "num_classes", None))


def roots() -> list[Path]:
    """Where prepared sets are looked for: DLX_DATA_DIR, the caches, and the folder of
    tensorflow-datasets (TFDS_DATA_DIR or ~/tensorflow_datasets)."""
    theirs = os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
    given = os.environ.get("DLX_DATA_DIR")
    ours = [*([Path(given)] if given else []), *files.caches()]
    return [*(folder for x in ours for folder in (x, x / "tensorflow_datasets")), Path(theirs)]


def _builder(name: str, data_dir: str | Path | None) -> Any:
    """What tensorflow-datasets makes of the folder of a set."""
    import tensorflow_datasets as tfds

    places = [Path(data_dir)] if data_dir is not None else roots()
    path, _, version = name.partition(":")
    if not path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise BadInput(f"{name!r} is no name of a set: write my_set, my_set/config or my_set:1.0.0")
    valid = tfds.core.Version.is_valid
    # One line has no room for places within others.
    where = f" in {', '.join(str(p) for p in places if p.parent not in places)}"
    fix = f"see https://tensorflow.org/datasets/catalog/{path}, or set DLX_DATA_DIR"
    for place in places:
        home = place / path
        with files.readable(home):
            found = [p.parent for p in home.glob("*/dataset_info.json") if valid(p.parent.name)]
            inner = {p.parent.parent.name for p in home.glob("*/*/dataset_info.json")}
        if version and found:
            where = f" ({home} has {', '.join(sorted(folder.name for folder in found))})"
            fix = "name one of these, or none"
            found = [folder for folder in found if folder.name == version]
        if inner:
            where = f" ({home} has the configurations {', '.join(sorted(inner))})"
            fix = f"write {path}/CONFIG"
        if not found:
            continue
        folder = max(found, key=lambda folder: tfds.core.Version(folder.name))
        builder = tfds.builder_from_directory(folder)
        formats = sorted(x.value for x in builder.info.available_file_formats())
        if "array_record" in formats:
            return builder
        where = f" (in {folder} it is {' and '.join(formats)})"
        fix = "prepare it with builder.download_and_prepare(file_format='array_record')"
    raise BadInput(f"{name} is not prepared as array_record{where}: {fix}")


def _decoded(builder: Any, name: str, split: str) -> Any:
    import grain
    import tensorflow_datasets as tfds

    try:
        n = builder.info.splits[split].num_examples
    except (KeyError, ValueError) as e:
        splits = ", ".join(builder.info.splits)
        raise BadInput(f"{name} has no split {split!r}: it has {splits}, and train[:90%]") from e
    if n < 1:
        raise BadInput(f"{name}: the split {split!r} is empty: it needs at least one example")
    features: Any = builder.info.features
    images = {key: feature.shape[-1] for key, feature in features.items() if _is_image(feature)}
    raw: Any = builder.as_data_source(
        split,
        decoders={key: tfds.decode.SkipDecoding() for key in images},
        file_format="array_record",
    )
    examples = _Examples(raw, images, f"{name} ({split})", builder.data_dir)
    return grain.MapDataset.source(examples)


@dataclasses.dataclass(frozen=True)
class _Examples:
    raw: Any
    images: Mapping[str, int | None]  # channels
    name: str
    folder: str | Path

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return {
                k: _pixels(v, self.images[k]) if k in self.images else v
                for k, v in self.raw[index].items()
            }
        except Exception as e:  # Riegeli, protocol buffers and Pillow each have their own
            why = " ".join(str(e).split())[:60]
            raise BadInput(
                f"{self.name}: example {index} cannot be read ({why}): prepare {self.folder} anew"
            ) from e


def _is_image(feature: Any) -> bool:
    """Whether it is one image of 8 bits; animations, 16 bits and floats are left to
    tensorflow-datasets."""
    import tensorflow_datasets as tfds

    info = feature.get_tensor_info()
    if not isinstance(feature, tfds.features.Image):
        return False
    return len(info.shape) == 3 and info.np_dtype == np.uint8


def _pixels(encoded: bytes, channels: int | None) -> np.ndarray:
    """PNG, JPEG and the like -> (height, width, channels) uint8."""
    import PIL.Image

    with PIL.Image.open(io.BytesIO(encoded)) as image:
        mode = _MODES.get(channels or 0, image.mode)
        pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels if pixels.ndim == 3 else pixels[..., None]
