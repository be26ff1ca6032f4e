"""Convolutional networks on 28 x 28 images, Adam."""

from experiments.benchmarks.cases import Ours, Theirs, in_bytes

ROWS = {
    "lenet": "LeNet-5, 28x28, batch 128",
    "cnn": "CNN of 32 and 64 channels, 28x28, batch 128",
}


def ours(row):
    import jax
    import numpy as np
    import optax

    import dlx
    from dlx.data import images
    from dlx.models import cnn
    from dlx.nn import losses

    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(128, 28, 28, 1)).astype(np.float32),
        "label": random.integers(0, 10, 128).astype(np.int32),
    }
    model = cnn.LeNet5() if row == "lenet" else cnn.ConvNet()
    tx = optax.adam(1e-3)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["image"]), tx)

    def augment(key, batch):
        image = images.normalise(batch["image"])
        if row == "lenet":
            image = images.affine(key, image, degrees=12, scale=0.12, shift=2)
        else:
            mirrored, moved = jax.random.split(key)
            image = images.crop(moved, images.flip(mirrored, image), 2)
        return batch | {"image": image}

    step = dlx.make_step(losses.classification(model), tx)
    return Ours(init, step, batch, augment=augment, data=in_bytes(batch))


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class LeNet5(nn.Module):
        def __init__(self):
            super().__init__()
            self.c1 = nn.Conv2d(1, 6, 5, padding=2)
            self.c3 = nn.Conv2d(6, 16, 5)
            self.c5 = nn.Linear(400, 120)
            self.c5.image = (5, 5, 16)
            self.f6 = nn.Linear(120, 84)
            self.head = nn.Linear(84, 10)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.c1(x)), 2)
            x = F.max_pool2d(F.relu(self.c3(x)), 2)
            return self.head(F.relu(self.f6(F.relu(self.c5(x.flatten(1))))))

    class ConvNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
            self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
            self.dense = nn.Linear(3136, 256)
            self.dense.image = (7, 7, 64)
            self.head = nn.Linear(256, 10)

        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2)
            return self.head(F.relu(self.dense(x.flatten(1))))

    module = LeNet5() if row == "lenet" else ConvNet()
    model, optimizer = wrap(module), torch.optim.Adam(module.parameters(), 1e-3)

    def step(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
