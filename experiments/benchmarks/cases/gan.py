"""A DCGAN on 28 x 28 images: one update of the discriminator, one of the generator, each by Adam.

The noise is in the batch. The generated images of the discriminator's update are made once and
serve the generator's too, as in PyTorch's tutorial. The loss is the generator's.
"""

from experiments.benchmarks.cases import Ours, Theirs

ROWS = {"dcgan": "DCGAN, 64 and 128 channels, 100 latents, 28x28, batch 128"}


def ours(row):
    import jax
    import numpy as np
    import optax

    import dlx
    from dlx.models import gan

    random = np.random.default_rng(0)
    batch = {
        "image": np.tanh(random.normal(size=(128, 28, 28, 1))).astype(np.float32),
        "noise": random.normal(size=(128, 100)).astype(np.float32),
    }
    generator, discriminator = gan.Generator(28, (128, 64)), gan.Discriminator((64, 128))
    tx = optax.adam(2e-4, b1=0.5)
    d_step = dlx.make_step(gan.discriminator_loss(discriminator), tx)
    g_step = dlx.make_step(gan.generator_loss(discriminator), tx)

    def init(key):
        d, g = jax.random.split(key)
        return {
            "discriminator": dlx.train_state(d, discriminator.init(d, batch["image"]), tx),
            "generator": dlx.train_state(g, generator.init(g, batch["noise"]), tx),
        }

    def step(state, batch):
        g, noise = state["generator"], batch["noise"]
        fake, generate = gan.generate(generator, g.model_state, g.params, noise)
        d, _ = d_step(state["discriminator"], {"image": batch["image"], "fake": fake})
        g, metrics = g_step(g, {"noise": noise}, generate=generate, judge=d.variables)
        return {"discriminator": d, "generator": g}, {"loss": metrics["loss"]}

    def weights(state):
        collections = ("params", "batch_stats")
        return {c: {name: s.variables[c] for name, s in state.items()} for c in collections}

    return Ours(init, step, batch, weights)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv0 = nn.ConvTranspose2d(100, 128, 7, bias=False)
            self.norm0 = nn.BatchNorm2d(128)
            self.conv1 = nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False)
            self.norm1 = nn.BatchNorm2d(64)
            self.conv2 = nn.ConvTranspose2d(64, 1, 4, 2, 1)

        def forward(self, z):
            x = F.relu(self.norm0(self.conv0(z[:, :, None, None])))
            return torch.tanh(self.conv2(F.relu(self.norm1(self.conv1(x)))))

    class Discriminator(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 64, 4, 2, 1)
            self.conv2 = nn.Conv2d(64, 128, 4, 2, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(128)
            self.head = nn.Linear(128 * 7 * 7, 1)
            self.head.image = (7, 7, 128)

        def forward(self, x):
            x = F.leaky_relu(self.conv1(x), 0.2)
            x = F.leaky_relu(self.norm2(self.conv2(x)), 0.2)
            return self.head(x.flatten(1))[:, 0]

    module = nn.ModuleDict({"generator": Generator(), "discriminator": Discriminator()})
    generator, discriminator = wrap(module["generator"]), wrap(module["discriminator"])
    optimizers = {
        name: torch.optim.Adam(part.parameters(), 2e-4, betas=(0.5, 0.999))
        for name, part in module.items()
    }

    def step(batch):
        optimizers["discriminator"].zero_grad()
        F.softplus(-discriminator(batch["image"])).mean().backward()
        fake = generator(batch["noise"])
        F.softplus(discriminator(fake.detach())).mean().backward()
        optimizers["discriminator"].step()
        optimizers["generator"].zero_grad()
        loss = F.softplus(-discriminator(fake)).mean()
        loss.backward()
        optimizers["generator"].step()
        return loss.detach()

    return Theirs(module, step)
