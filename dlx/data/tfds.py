"""Prepared sets of tensorflow-datasets by name, without TensorFlow.

Any set that lies prepared as array_record in one of the usual folders can be read, also one that
the registry of tensorflow-datasets has never heard of: its features are described beside its files.
How to prepare a set of your own: `dlx.data.tfds_fashion` is the pattern to copy.
"""

from __future__ import annotations

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
      BadInput: the set is not prepared there, or not as array_record; there is no such split.
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
    how = "builder.download_and_prepare(file_format='array_record')"
    valid, other = tfds.core.Version.is_valid, ""
    for place in places:
        home = place / path
        found = [p.parent for p in home.glob("*/dataset_info.json") if valid(p.parent.name)]
        if version and found:
            other = f" ({home} has {', '.join(sorted(folder.name for folder in found))})"
            found = [folder for folder in found if folder.name == version]
        if configs := sorted({p.parent.parent.name for p in home.glob("*/*/dataset_info.json")}):
            other = f" ({home} has the configurations {', '.join(configs)}: write {path}/CONFIG)"
        if not found:
            continue
        folder = max(found, key=lambda folder: tfds.core.Version(folder.name))
        builder = tfds.builder_from_directory(folder)
        formats = sorted(x.value for x in builder.info.available_file_formats())
        if "array_record" in formats:
            return builder
        other = f" (in {folder} it is {' and '.join(formats)})"
    raise BadInput(
        f"{name} is not prepared as array_record in {', '.join(map(str, places))}{other}: prepare "
        f"it with {how}, or set DLX_DATA_DIR to the folder that holds {path}/VERSION"
    )


def _decoded(builder: Any, name: str, split: str) -> Any:
    import grain
    import tensorflow_datasets as tfds

    features: Any = builder.info.features
    images = {key: feature.shape[-1] for key, feature in features.items() if _is_image(feature)}
    try:
        raw: Any = builder.as_data_source(
            split,
            decoders={key: tfds.decode.SkipDecoding() for key in images},
            file_format="array_record",
        )
    except (ValueError, AssertionError) as e:
        splits = ", ".join(builder.info.splits)
        raise BadInput(f"{name} has no split {split!r}: it has {splits}, and train[:90%]") from e

    def decode(example: Mapping[str, Any]) -> dict[str, Any]:
        return {k: _pixels(v, images[k]) if k in images else v for k, v in example.items()}

    return grain.MapDataset.source(raw).map(decode)


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
