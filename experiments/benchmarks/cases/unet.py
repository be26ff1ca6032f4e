"""A padded U-Net with batch normalisation on 64 x 64 images, Adam."""

from experiments.benchmarks.cases import Ours, Theirs

ROWS = {"unet": "U-Net of 32 features and depth 3, 64x64, batch 16"}
WHY = {
    "unet": "Of 323 ms of operations 223 are XLA's convolutions and products, 43 what is joined "
    "and padded for kernels' gradients, some 45 batch normalisation and ReLU. On an Intel Xeon "
    "with AMX the convolutions run at 320 GFLOP/s, and PyTorch's matrix products at 400.",
}


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.models import unet

    random = np.random.default_rng(0)
    batch = {
        "image": random.normal(size=(16, 64, 64, 1)).astype(np.float32),
        "label": random.integers(0, 2, (16, 64, 64)).astype(np.int32),
    }
    model, tx = unet.PaddedUNet(features=32, depth=3, dropout=0.0), optax.adam(1e-3)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["image"]), tx)

    return Ours(init, dlx.make_step(unet.segmentation(model), tx), batch)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self, before, features):
            super().__init__()
            self.conv1 = nn.Conv2d(before, features, 3, padding=1, bias=False)
            self.norm1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, padding=1, bias=False)
            self.norm2 = nn.BatchNorm2d(features)

        def forward(self, x):
            x = F.relu(self.norm1(self.conv1(x)))
            return F.relu(self.norm2(self.conv2(x)))

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down0, self.down1, self.down2 = Block(1, 32), Block(32, 64), Block(64, 128)
            self.bottom = Block(128, 256)
            self.upconv2, self.up2 = nn.ConvTranspose2d(256, 128, 2, 2), Block(256, 128)
            self.upconv1, self.up1 = nn.ConvTranspose2d(128, 64, 2, 2), Block(128, 64)
            self.upconv0, self.up0 = nn.ConvTranspose2d(64, 32, 2, 2), Block(64, 32)
            self.head = nn.Conv2d(32, 2, 1)

        def forward(self, x):
            skip0 = self.down0(x)
            skip1 = self.down1(F.max_pool2d(skip0, 2))
            skip2 = self.down2(F.max_pool2d(skip1, 2))
            x = self.bottom(F.max_pool2d(skip2, 2))
            x = self.up2(torch.cat([skip2, self.upconv2(x)], 1))
            x = self.up1(torch.cat([skip1, self.upconv1(x)], 1))
            x = self.up0(torch.cat([skip0, self.upconv0(x)], 1))
            return self.head(x)

    module = UNet()
    model, optimizer = wrap(module), torch.optim.Adam(module.parameters(), 1e-3)

    def step(batch):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch["image"]), batch["label"])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
