"""Language models of one recurrent layer, Adam."""

from experiments.benchmarks.cases import Ours, Theirs

ROWS = {
    "lstm": "LSTM language model, 512 units, 32 x 64 tokens",
    "gru": "GRU language model, 512 units, 32 x 64 tokens",
}
VOCABULARY, UNITS, B, T, RATE = 256, 512, 32, 64, 1e-3


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.models import rnn

    random = np.random.default_rng(0)
    text = random.integers(0, VOCABULARY, (B, T + 1)).astype(np.int32)
    batch = {"tokens": text[:, :-1].copy(), "targets": text[:, 1:].copy()}
    model, tx = rnn.LanguageModel(VOCABULARY, UNITS, cell=row), optax.adam(RATE)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["tokens"]), tx)

    return Ours(init, dlx.make_step(rnn.language(model), tx), batch)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            kind = nn.LSTM if row == "lstm" else nn.GRU
            self.layer = kind(UNITS, UNITS, batch_first=True)
            # Of the two biases of a gate only the sum counts, and only one may learn: Adam would
            # move the sum twice as far. The GRU's n is apart: both are in flax's as well.
            learns = torch.zeros(self.layer.bias_hh_l0.shape)
            if row == "gru":
                learns[2 * UNITS :] = 1
            self.layer.bias_hh_l0.register_hook(lambda g: g * learns)

        def forward(self, x):
            return self.layer(x)[0]

        def load(self, arrays):
            """{"layer0/ii/kernel": array}: flax's one bias of a gate becomes the first of
            PyTorch's two, whichever side it is on; the second is zero but for the GRU's n."""
            gates = "ifgo" if row == "lstm" else "rzn"

            def join(*names):
                return torch.cat([torch.from_numpy(arrays[n].T.copy()) for n in names])

            with torch.no_grad():
                for side in "ih":
                    kernels = [f"layer0/{side}{g}/kernel" for g in gates]
                    getattr(self.layer, f"weight_{side}h_l0").copy_(join(*kernels))
                biases = [f"layer0/{'h' if row == 'lstm' else 'i'}{g}/bias" for g in gates]
                self.layer.bias_ih_l0.copy_(join(*biases))
                self.layer.bias_hh_l0.zero_()
                if row == "gru":
                    self.layer.bias_hh_l0[2 * UNITS :] = join("layer0/hn/bias")

    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, UNITS)
            self.rnn = Layer()
            self.head = nn.Linear(UNITS, VOCABULARY)

        def forward(self, tokens):
            return self.head(self.rnn(self.embedding(tokens)))

    module = LanguageModel()
    model, optimizer = wrap(module), torch.optim.Adam(module.parameters(), RATE)

    def step(batch):
        optimizer.zero_grad()
        logits = model(batch["tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
