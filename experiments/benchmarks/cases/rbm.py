"""A restricted Boltzmann machine on binary images, CD-1, SGD. The loss is the reconstruction's.

The uniform numbers are in the batch. Of the side "fit" the step draws them, as in training.
"""

from experiments.benchmarks.cases import BATCHES, Ours, Theirs

ROWS = {"rbm": "RBM 784-500, CD-1, batch 100"}


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.data import arrays
    from dlx.models import rbm

    random = np.random.default_rng(0)
    batch = {
        "visible": (random.random((100, 784)) < 0.2).astype(np.float32),
        "uniform_hidden": random.random((100, 1, 500)).astype(np.float32),
        "uniform_visible": random.random((100, 1, 784)).astype(np.float32),
    }
    tx = optax.sgd(0.1)
    update = dlx.make_step(rbm.divergence(), tx)

    def init(key):
        return dlx.train_state(key, {"params": rbm.init(key, 784, 500)}, tx)

    def step(state, batch):
        state, metrics = update(state, batch)
        return state, {"loss": metrics["reconstruction"]}

    def weights(state):
        return {"params": {"rbm": state.params}}

    def augment(key, batch):
        return {"visible": batch["visible"].astype(np.float32)}

    images = {"visible": np.tile(batch["visible"], (BATCHES, 1)).astype(np.uint8)}
    data = arrays.batches(images, 100, seed=0)
    return Ours(init, step, batch, weights, augment, data)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class RBM(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.zeros(784, 500))
            self.visible = nn.Parameter(torch.zeros(784))
            self.hidden = nn.Parameter(torch.zeros(500))

        def load(self, arrays):
            self.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()})

        def forward(self, v, uniform_hidden, uniform_visible):
            """Of the update: the statistics of the data less those of the chain."""
            p0 = torch.sigmoid(F.linear(v, self.weights.T, self.hidden))
            h = (uniform_hidden < p0).float()
            p = torch.sigmoid(F.linear(h, self.weights, self.visible))
            v1 = (uniform_visible < p).float()
            p1 = torch.sigmoid(F.linear(v1, self.weights.T, self.hidden))
            n = len(v)
            weights = (v.T @ p0 - v1.T @ p1) / n
            return weights, (v - v1).mean(0), (p0 - p1).mean(0), F.mse_loss(p, v)

    module = RBM()
    model = wrap(module)

    @torch.no_grad()
    def step(batch):
        uniforms = batch["uniform_hidden"][:, 0], batch["uniform_visible"][:, 0]
        weights, visible, hidden, loss = model(batch["visible"], *uniforms)
        module.weights += 0.1 * weights
        module.visible += 0.1 * visible
        module.hidden += 0.1 * hidden
        return loss

    return Theirs(nn.ModuleDict({"rbm": module}), step)
