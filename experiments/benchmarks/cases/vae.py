"""A convolutional variational autoencoder on 28 x 28 images, Adam. The noise is in the batch."""

from experiments.benchmarks.cases import Ours, Theirs

ROWS = {"conv-vae": "convolutional VAE, 32 and 64 channels, 32 latents, 28x28, batch 128"}


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.models import vae

    random = np.random.default_rng(0)
    batch = {
        "image": random.uniform(size=(128, 28, 28, 1)).astype(np.float32),
        "noise": random.normal(size=(128, 32)).astype(np.float32),
    }
    model, tx = vae.convolutional((32, 64), latents=32), optax.adam(1e-3)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["image"], batch["noise"]), tx)

    return Ours(init, dlx.make_step(vae.loss(model), tx), batch)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 4, 2, 1)
            self.conv2 = nn.Conv2d(32, 64, 4, 2, 1)
            self.head = nn.Linear(64 * 7 * 7, 2 * 32)
            self.head.image = (7, 7, 64)

        def forward(self, x):
            x = F.relu(self.conv2(F.relu(self.conv1(x))))
            return self.head(x.flatten(1)).chunk(2, 1)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(32, 64 * 7 * 7)
            self.conv1 = nn.ConvTranspose2d(64, 32, 4, 2, 1)
            self.conv2 = nn.ConvTranspose2d(32, 1, 4, 2, 1)

        def forward(self, z):
            x = F.relu(self.dense(z)).view(-1, 7, 7, 64).permute(0, 3, 1, 2)
            return self.conv2(F.relu(self.conv1(x)))

    class VAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Encoder(), Decoder()

        def forward(self, x, noise):
            """-> the mean of - L(x)."""
            mean, log_variance = self.encoder(x)
            logits = self.decoder(mean + torch.exp(0.5 * log_variance) * noise)
            entropy = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
            return (entropy + kl) / len(x)

    module = VAE()
    model, optimizer = wrap(module), torch.optim.Adam(module.parameters(), 1e-3)

    def step(batch):
        optimizer.zero_grad()
        loss = model(batch["image"], batch["noise"])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
