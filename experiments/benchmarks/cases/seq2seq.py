"""Translation by a bidirectional GRU with additive attention, Adam."""

from experiments.benchmarks.cases import Ours, Theirs

ROWS = {"seq2seq": "GRU encoder-decoder with attention, 256 units, 128 x 16 tokens"}
VOCABULARY, EMBED, UNITS, B, T, RATE, START = 6000, 256, 256, 128, 16, 1e-3, 1


def ours(row):
    import numpy as np
    import optax

    import dlx
    from dlx.models import seq2seq

    random = np.random.default_rng(0)
    batch = {
        side: random.integers(0, VOCABULARY, (B, T)).astype(np.int32)
        for side in ("source", "target")
    }
    # Sources without padding: PyTorch's packed sequences are slower than whole ones.
    batch |= {"source_length": np.full(B, T, np.int32)}
    batch |= {"target_length": random.integers(T // 2, T + 1, B).astype(np.int32)}
    model = seq2seq.Seq2Seq(VOCABULARY, VOCABULARY, EMBED, UNITS)
    tx = optax.adam(RATE)

    def init(key):
        known = batch["source"], batch["source_length"], batch["target"]
        return dlx.train_state(key, model.init(key, *known), tx)

    step = dlx.make_step(seq2seq.translation(model, START, label_smoothing=0.1), tx)
    return Ours(init, step, batch)


def theirs(row, wrap):
    import torch
    from torch import nn
    from torch.nn import functional as F

    H, V = UNITS, VOCABULARY

    class Seq2Seq(nn.Module):
        def __init__(self):
            super().__init__()
            self.source, self.target = nn.Embedding(V, EMBED), nn.Embedding(V, EMBED)
            self.encoder = nn.GRU(EMBED, H, batch_first=True, bidirectional=True)
            # Of the two biases of r and z only the sum counts, and only one may learn.
            learns = (torch.arange(3 * H) >= 2 * H).float()
            for end in ("", "_reverse"):
                getattr(self.encoder, f"bias_hh_l0{end}").register_hook(lambda g: g * learns)
            self.W_s, self.U_a = nn.Linear(H, H), nn.Linear(2 * H, H, bias=False)
            self.W_a, self.v_a = nn.Linear(H, H, bias=False), nn.Linear(H, 1, bias=False)
            self.W, self.C = nn.Linear(EMBED, 3 * H), nn.Linear(2 * H, 3 * H, bias=False)
            self.U, self.U_o = nn.Linear(H, 3 * H), nn.Linear(H, EMBED)
            self.V_o = nn.Linear(EMBED, EMBED, bias=False)
            self.C_o = nn.Linear(2 * H, EMBED, bias=False)
            self.bias = nn.Parameter(torch.zeros(V))

        def forward(self, source, lengths, before):
            h, last = self.encoder(self.source(source))
            behind = torch.arange(T)[None] >= lengths[:, None]
            keys, s, y = self.U_a(h), torch.tanh(self.W_s(last[1])), self.target(before)
            states, contexts = [], []
            for word in self.W(y).unbind(1):
                e = self.v_a(torch.tanh(self.W_a(s)[:, None] + keys))[..., 0]
                alpha = torch.softmax(e.masked_fill(behind, -torch.inf), -1)
                c = torch.bmm(alpha[:, None], h)[:, 0]
                a, u = word + self.C(c), self.U(s)
                r, z = torch.sigmoid((a + u)[:, : 2 * H]).chunk(2, -1)
                s = (1 - z) * torch.tanh(a[:, 2 * H :] + r * u[:, 2 * H :]) + z * s
                states.append(s)
                contexts.append(c)
            s, c = torch.stack(states, 1), torch.stack(contexts, 1)
            t = torch.tanh(self.U_o(s) + self.V_o(y) + self.C_o(c))
            return F.linear(t, self.target.weight, self.bias)

        def load(self, arrays):
            """{"decoder/W_a/kernel": array}, the encoder's gates one by one."""
            own = {"bias": arrays["bias"], "source.weight": arrays["encoder/embedding/embedding"],
                   "target.weight": arrays["embedding/embedding"]}  # fmt: skip
            for name in ("W_s", "U_a", "W", "U_o", "V_o", "C_o"):
                own[f"{name}.weight"] = arrays[f"{name}/kernel"].T
                if f"{name}/bias" in arrays:
                    own[f"{name}.bias"] = arrays[f"{name}/bias"]
            for name in ("W_a", "v_a", "C", "U"):
                own[f"{name}.weight"] = arrays[f"decoder/{name}/kernel"].T
            own["U.bias"] = arrays["decoder/U/bias"]
            with torch.no_grad():
                for name, array in own.items():
                    self.get_parameter(name).copy_(torch.from_numpy(array.copy()))
                for end, side in (("", "right"), ("_reverse", "left")):

                    def join(*names, side=side):
                        found = [arrays[f"encoder/{side}/{n}"].T.copy() for n in names]
                        return torch.cat([torch.from_numpy(a) for a in found])

                    for letter in "ih":
                        kernels = [f"{letter}{g}/kernel" for g in "rzn"]
                        getattr(self.encoder, f"weight_{letter}h_l0{end}").copy_(join(*kernels))
                    biases = [f"i{g}/bias" for g in "rzn"]
                    getattr(self.encoder, f"bias_ih_l0{end}").copy_(join(*biases))
                    inner = getattr(self.encoder, f"bias_hh_l0{end}")
                    inner.zero_()[2 * H :] = join("hn/bias")

    module = Seq2Seq()
    model, optimizer = wrap(module), torch.optim.Adam(module.parameters(), RATE)

    def step(batch):
        optimizer.zero_grad()
        target = batch["target"].long()
        before = torch.cat([torch.full_like(target[:, :1], START), target[:, :-1]], 1)
        logits = model(batch["source"], batch["source_length"], before)
        loss = F.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none", label_smoothing=0.1
        )
        valid = torch.arange(T)[None] < batch["target_length"][:, None]
        loss = (loss * valid.flatten()).sum() / valid.sum()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Theirs(module, step)
