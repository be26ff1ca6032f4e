"""GPTs on characters, AdamW, no dropout."""

from experiments.benchmarks.cases import Ours, Theirs

ROWS = {
    "gpt-4x128": "GPT, 4 layers, 4 heads, width 128, 12 x 64 tokens",
    "gpt-6x384": "GPT, 6 layers, 6 heads, width 384, 8 x 256 tokens",
}
SIZES = {"gpt-4x128": (4, 4, 128, 12, 64), "gpt-6x384": (6, 6, 384, 8, 256)}
VOCABULARY, RATE, DECAY = 65, 1e-3, 0.1
WHY = {
    "gpt-6x384": "Of 877 ms of operations, in part at once, in a step of 763: 685 matrix products, "
    "76 what attention transposes, 55 the sums of Adam and of GELU's gradient. On an Intel Xeon "
    "with AMX XLA's products run at 280 to 350 GFLOP/s, and PyTorch's at 350 to 410.",
}


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.models import gpt
    from dlx.nn import losses

    layers, heads, width, B, T = SIZES[row]
    random = np.random.default_rng(0)
    text = random.integers(0, VOCABULARY, (B, T + 1)).astype(np.int32)
    batch = {"tokens": text[:, :-1].copy(), "targets": text[:, 1:].copy()}
    model = gpt.GPT(VOCABULARY, T, layers, heads, width, dropout=0.0)
    tx = optax.adamw(RATE, weight_decay=DECAY)

    def init(key):
        return dlx.train_state(key, model.init(key, batch["tokens"]), tx)

    return Ours(init, dlx.make_step(losses.language(model), tx), batch)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    layers, heads, width, _, T = SIZES[row]

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(width, 3 * width)
            self.out = nn.Linear(width, width)

        def forward(self, x):
            B, T, W = x.shape
            q, k, v = self.qkv(x).split(W, 2)
            q, k, v = (a.view(B, T, heads, W // heads).transpose(1, 2) for a in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).contiguous().view(B, T, W))

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(width, 4 * width)
            self.down = nn.Linear(4 * width, width)

        def forward(self, x):
            return self.down(F.gelu(self.up(x), approximate="tanh"))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1 = nn.LayerNorm(width)
            self.attention = Attention()
            self.norm2 = nn.LayerNorm(width)
            self.mlp = MLP()

        def forward(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, width)
            self.positions = nn.Embedding(T, width)
            for i in range(layers):
                self.add_module(f"block{i}", Block())
            self.norm = nn.LayerNorm(width)

        def forward(self, tokens):
            x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1]))
            for i in range(layers):
                x = self.get_submodule(f"block{i}")(x)
            return F.linear(self.norm(x), self.embedding.weight)

    module = GPT()
    model = wrap(module)
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=DECAY)

    def step(batch):
        optimizer.zero_grad()
        logits = model(batch["tokens"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
