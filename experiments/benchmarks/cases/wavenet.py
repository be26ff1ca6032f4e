"""A WaveNet of ten dilated layers on waveforms of 4,096 samples, Adam."""

from experiments.benchmarks.cases import Ours, Theirs

ROWS = {"wavenet": "WaveNet of 10 layers with 64 channels, 4,096 samples, batch 4"}
DILATIONS = tuple(2**i for i in range(10))


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.models import wavenet

    batch = {"sample": np.random.default_rng(0).integers(0, 256, (4, 4097)).astype(np.int32)}
    model, tx = wavenet.WaveNet(channels=64, skip=64, dilations=DILATIONS), optax.adam(1e-3)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["sample"][:, :-1]), tx)

    return Ours(init, dlx.make_step(wavenet.likelihood(model), tx), batch)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Conv1x1(nn.Linear):
        """On (B, C, T); flax has a dense layer here, whose kernel is (I, O)."""

        def forward(self, input):
            return F.conv1d(input, self.weight[:, :, None], self.bias)

    class Layer(nn.Module):
        def __init__(self, dilation, last):
            super().__init__()
            self.dilation = dilation
            self.gates = nn.Conv1d(64, 128, 2, dilation=dilation)
            self.residual = None if last else Conv1x1(64, 64)
            self.skip = Conv1x1(64, 64)

        def forward(self, x):
            filter, gate = self.gates(F.pad(x, (self.dilation, 0))).chunk(2, 1)
            z = torch.tanh(filter) * torch.sigmoid(gate)
            return x if self.residual is None else x + self.residual(z), self.skip(z)

    class WaveNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.causal = nn.Embedding(256, 128)  # the kernel of a causal convolution of width 2
            for i, dilation in enumerate(DILATIONS, 1):
                setattr(self, f"layer{i}", Layer(dilation, i == len(DILATIONS)))
            self.head1 = Conv1x1(64, 64)
            self.head2 = Conv1x1(64, 256)

        def forward(self, sample):
            old, x = self.causal(sample).transpose(1, 2).chunk(2, 1)
            x = x + F.pad(old, (1, 0))[..., :-1]
            total = torch.zeros(())
            for i in range(1, len(DILATIONS) + 1):
                x, skip = getattr(self, f"layer{i}")(x)
                total = total + skip
            return self.head2(F.relu(self.head1(F.relu(total))))

    module = WaveNet()
    model, optimizer = wrap(module), torch.optim.Adam(module.parameters(), 1e-3)

    def step(batch):
        optimizer.zero_grad()
        sample = batch["sample"]
        loss = F.cross_entropy(model(sample[:, :-1]), sample[:, 1:])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
