"""A multilayer perceptron on 28 x 28 images, Adam."""

from experiments.benchmarks.cases import Ours, Theirs, in_bytes

ROWS = {"mlp": "MLP 784-512-512-10, batch 128"}


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.data import images
    from dlx.models import mlp
    from dlx.nn import losses

    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(128, 28, 28, 1)).astype(np.float32),
        "label": random.integers(0, 10, 128).astype(np.int32),
    }
    model, tx = mlp.MLP((512, 512)), optax.adam(1e-3)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["image"]), tx)

    def augment(key, batch):
        return batch | {"image": images.normalise(batch["image"])}

    step = dlx.make_step(losses.classification(model), tx)
    return Ours(init, step, batch, augment=augment, data=in_bytes(batch))


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense1 = nn.Linear(784, 512)
            self.dense2 = nn.Linear(512, 512)
            self.head = nn.Linear(512, 10)

        def forward(self, x):
            x = F.relu(self.dense1(x.flatten(1)))
            return self.head(F.relu(self.dense2(x)))

    module = MLP()
    model, optimizer = wrap(module), torch.optim.Adam(module.parameters(), 1e-3)

    def step(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
