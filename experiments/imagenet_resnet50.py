"""ResNet-50 on ImageNet: 90 epochs of random crops, the learning rate divided by ten three times.

Paper     He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
          section 3.4
Command   python -m experiments.imagenet_resnet50                    (20 steps, to see it work)
          python -m experiments.imagenet_resnet50 --preset paper     (the whole recipe)
Data      imagenet2012 of tensorflow-datasets, prepared as array_record; --dataset takes any set of
          images and labels by its name
Hardware  the laptop's preset: 2 CPU cores; the paper's: accelerators
Expected  no record; torchvision's network has a top-1 accuracy of 76.13 %. The laptop's preset
          shows that everything works; it teaches nothing
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import optax
from PIL import Image

import dlx
from dlx.data import images, stream, tfds
from dlx.errors import check_ranges
from dlx.models import resnet
from dlx.tasks import classifier

CARD = {
    "system": "ResNet-50",
    "paper": "He, Zhang, Ren, Sun 2015",
    "data": "ImageNet, 1,271,167 / 10,000 / 50,000 images, 90 epochs",
    "metric": "test/accuracy",
    "unit": "%",
    "higher_is_better": True,
    "target": 76.1,
    "bar": {"value": 76.13, "source": "torchvision's ResNet-50, IMAGENET1K_V1"},
    "reported": {"value": 75.3, "source": "one crop, the authors' page", "status": "memory"},
    "time": "days on an accelerator",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the images, in [0, 1]


@dataclasses.dataclass(frozen=True)
class Config:
    """A ResNet on ImageNet, or on another set of images and labels."""

    dataset: str = "imagenet2012"  # its name in tensorflow-datasets
    train: str = "train[:-10000]"  # the split to learn from
    validation: str = "train[-10000:]"  # the split to look at meanwhile
    test: str = "validation"  # the split read once, at the end; ImageNet's test has no labels
    classes: int = 1000  # labels go from 0 to one less
    size: int = 224  # height and width of what the network sees
    blocks: tuple[int, ...] = (3, 4, 6, 3)  # bottlenecks in each stage
    features: int = 64  # of the first stage
    batch_size: int = 256  # examples a step
    learning_rate: float = 0.1  # a tenth from a third of the steps on, and again at 2/3 and 8/9
    momentum: float = 0.9  # of the gradient
    weight_decay: float = 1e-4  # L2, of every parameter
    run: dlx.Run = dlx.Run(steps=4966 * 90, log_every=100, eval_every=4966, save_every=1000)

    def __post_init__(self):
        if min(self.blocks, default=0) < 1:
            raise dlx.BadInput(f"blocks is {self.blocks}: each stage needs 1 or more")
        check_ranges(
            self,
            positive=("classes", "size", "features", "batch_size", "learning_rate"),
            not_negative=("weight_decay",),
            share=("momentum",),
        )


PRESETS = {
    "laptop": Config(
        validation="train[-200:]", test="validation[:200]", batch_size=32, learning_rate=0.0125,
        run=dlx.Run(steps=20, log_every=1, eval_every=20, save_every=5),
    ),
    "paper": Config(),
    "test": Config(
        train="train[:-8]", validation="train[-8:]", classes=10, size=32, blocks=(1, 1), features=8,
        batch_size=16, learning_rate=0.01,
        run=dlx.Run(steps=20, log_every=2, eval_every=10, save_every=5),
    ),
}  # fmt: skip


# ---- Views of an image, on the host's threads --------------------------------------------------


def rgb(image: np.ndarray) -> Image.Image:
    """(H, W, 1), (H, W, 3) or (H, W, 4) bytes as Pillow's RGB."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).convert("RGB")


def view(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    """A box (left, top, right, bottom) of an image as (size, size, 3) bytes."""
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))


def some_crop(image: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
    """8 to 100 % of the area at a random place, of a shape between 3:4 and 4:3."""
    W, H = image.size
    for _ in range(10):
        area, shape = rng.uniform(0.08, 1) * W * H, np.exp(rng.uniform(-1, 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= W and 0 < h <= H:
            left, top = int(rng.integers(W - w + 1)), int(rng.integers(H - h + 1))
            return view(image, (left, top, left + w, top + h), size)
    return centre_crop(image, size, 1.0)


def centre_crop(image: Image.Image, size: int, share: float = 224 / 256) -> np.ndarray:
    """The square in the middle whose side is a share of the short side: the short side to 256
    pixels and 224 of them, in one."""
    W, H = image.size
    side = share * min(W, H)
    left, top = (W - side) / 2, (H - side) / 2
    return view(image, (left, top, left + side, top + side), size)


def labelled(example: Any, image: np.ndarray, config: Config) -> dict[str, Any]:
    label = int(example["label"])
    if not 0 <= label < config.classes:  # silent in JAX: a NaN, or the last class
        raise dlx.BadInput(
            f"{config.dataset} has the label {label}: set --classes to one more than the largest"
        )
    return {"image": image, "label": np.int32(label)}


@dataclasses.dataclass(frozen=True)
class Centred:
    """The examples of a source as an evaluation sees them."""

    source: Any
    config: Config

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        example = self.source[i]
        return labelled(example, centre_crop(rgb(example["image"]), self.config.size), self.config)


# ---- The experiment ----------------------------------------------------------------------------


def falls(steps: int) -> dict[int, float]:
    """{step: factor} of the learning rate: a tenth at 30, 60 and 80 of 90 epochs."""
    return {steps // 3: 0.1, steps * 2 // 3: 0.1, steps * 8 // 9: 0.1}


def build(config: Config) -> dlx.Experiment:
    model: Any = resnet.ResNet(config.blocks, resnet.Bottleneck, config.features, config.classes)
    schedule = optax.piecewise_constant_schedule(config.learning_rate, falls(config.run.steps))

    def random_view(example, rng):
        return labelled(example, some_crop(rgb(example["image"]), rng, config.size), config)

    @functools.cache
    def parts() -> Any:
        return {
            name: Centred(tfds.source(config.dataset, split), config)
            for name, split in (("validation", config.validation), ("test", config.test))
        }

    experiment = classifier.experiment(
        model,
        optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, config.momentum),
        ),
        parts,
        shape=(config.size, config.size, 3),
        names=(),
        batch_size=config.batch_size,
        seed=config.run.seed,
        prepare=functools.partial(images.normalise, mean=MEAN, std=STD),
        augment=images.flip,
        eval_batch=config.batch_size,
    )
    return experiment._replace(
        data=stream.batches(
            lambda: tfds.source(config.dataset, config.train),
            config.batch_size,
            config.run.seed,
            random_view,
        ),
        pictures={},  # of a thousand classes there is no confusion to see
    )


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
