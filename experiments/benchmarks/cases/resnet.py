"""Residual networks, stochastic gradient descent with momentum."""

import functools
import io

from experiments.benchmarks.cases import Ours, Theirs, in_bytes

ROWS = {
    "resnet18": "ResNet-18, 32x32, batch 64",
    "resnet50": "ResNet-50, 224x224, batch 8",
}
SIZES = {"resnet18": (64, 32, 10), "resnet50": (8, 224, 1000)}  # batch, height and width, classes
# A step of 1e-4 takes ResNet-50 from a loss of 7.37 to 7.12, and what was rounding in the first is
# the fourth digit of the second.
RATES = {"resnet18": 0.01, "resnet50": 3e-6}
WHY = {
    "resnet18": "Of 959 ms of operations 677 are XLA's convolutions and products, 81 what is "
    "joined and padded for kernels' gradients, 29 what Winograd's products take apart and join, "
    "some 125 batch normalisation, ReLU and the optimizer.",
}


def ours(row):
    import jax
    import numpy as np
    import optax

    import dlx
    from dlx.data import images, stream
    from dlx.models import resnet
    from dlx.nn import losses

    B, H, classes = SIZES[row]
    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(B, H, H, 3)).astype(np.float32),
        "label": random.integers(0, classes, B).astype(np.int32),
    }
    kind = resnet.ResNet18 if row == "resnet18" else resnet.ResNet50
    model = kind(classes=classes, small=H == 32)
    tx = optax.sgd(RATES[row], 0.9)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["image"]), tx)

    def augment(key, batch):
        mirrored, moved = jax.random.split(key)
        image = batch["image"] if row == "resnet50" else images.normalise(batch["image"])
        image = images.flip(mirrored, image)
        return batch | {"image": images.crop(moved, image, 4) if row == "resnet18" else image}

    data = in_bytes(batch) if row == "resnet18" else None
    if row == "resnet50":
        data = stream.batches(photographs(4 * B, random), B, 0, functools.partial(crop, size=H))
    step = dlx.make_step(losses.classification(model), tx)
    return Ours(init, step, batch, augment=augment, data=data)


def photographs(n, random):
    """n JPEG files of 500 x 375 pixels, in memory."""
    from PIL import Image

    def one():
        colours = random.integers(0, 256, (24, 32, 3)).astype("uint8")
        file = io.BytesIO()
        Image.fromarray(colours).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG")
        return {"image": file.getvalue(), "label": int(random.integers(1000))}

    return [one() for _ in range(n)]


def crop(example, rng, size):
    """A photograph, read; some part of it, made size x size."""
    import numpy as np
    from PIL import Image

    image = Image.open(io.BytesIO(example["image"])).convert("RGB")
    side = int(rng.integers(128, 376))
    left, top = int(rng.integers(501 - side)), int(rng.integers(376 - side))
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box)
    return {"image": np.asarray(image, np.float32) / 255, "label": np.int32(example["label"])}


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        """Basic or, with expansion 4, bottleneck."""

        def __init__(self, before, width, stride, expansion):
            super().__init__()
            after, self.expansion = width * expansion, expansion
            sizes = [3, 3] if expansion == 1 else [1, 3, 1]
            widths = [before, width, width, after] if expansion == 4 else [before, width, width]
            for i, size in enumerate(sizes, 1):
                step = stride if size == 3 and (i == 1 or expansion == 4) else 1
                conv = nn.Conv2d(widths[i - 1], widths[i], size, step, size // 2, bias=False)
                self.add_module(f"conv{i}", conv)
                self.add_module(f"norm{i}", nn.BatchNorm2d(widths[i]))
            self.shortcut_conv = None
            if stride > 1 or before != after:
                self.shortcut_conv = nn.Conv2d(before, after, 1, stride, bias=False)
                self.shortcut_norm = nn.BatchNorm2d(after)

        def forward(self, x):
            y = F.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(y))
            if self.expansion == 4:
                y = self.norm3(self.conv3(F.relu(y)))
            if self.shortcut_conv is not None:
                x = self.shortcut_norm(self.shortcut_conv(x))
            return F.relu(x + y)

    class ResNet(nn.Module):
        def __init__(self, counts, expansion, classes, small):
            super().__init__()
            size, stride = (3, 1) if small else (7, 2)
            self.conv1 = nn.Conv2d(3, 64, size, stride, size // 2, bias=False)
            self.norm1, self.small = nn.BatchNorm2d(64), small
            before, self.blocks = 64, []
            for i, count in enumerate(counts):
                for j in range(count):
                    block = Block(before, 64 * 2**i, 2 if i and not j else 1, expansion)
                    self.add_module(f"layer{i + 1}_{j}", block)
                    self.blocks.append(f"layer{i + 1}_{j}")
                    before = 64 * 2**i * expansion
            self.head = nn.Linear(before, classes)

        def forward(self, x):
            x = F.relu(self.norm1(self.conv1(x)))
            if not self.small:
                x = F.max_pool2d(x, 3, 2, 1)
            for name in self.blocks:
                x = getattr(self, name)(x)
            return self.head(x.mean((2, 3)))

    _, H, classes = SIZES[row]
    kind = ((2, 2, 2, 2), 1) if row == "resnet18" else ((3, 4, 6, 3), 4)
    module = ResNet(*kind, classes, H == 32)
    model, optimizer = wrap(module), torch.optim.SGD(module.parameters(), RATES[row], 0.9)

    def step(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
