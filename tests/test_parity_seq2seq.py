"""The encoder-decoder with attention against PyTorch's layers, in float64: logits, attention and
the gradients of all parameters. Needs torch (the extra `parity`), or skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx.models import seq2seq

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
nn = torch.nn
B, S, T, D, H, V, W = 4, 6, 5, 3, 4, 9, 8
GATES = "rzn"


class Theirs(nn.Module):
    """Packed sequences, a GRUCell on [E y; c], attention over what is there."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(W, D), nn.Embedding(V, D)
        self.encoder = nn.GRU(D, H, batch_first=True, bidirectional=True)
        self.first = nn.Linear(H, H)
        self.query, self.keys = nn.Linear(H, H, bias=False), nn.Linear(2 * H, H, bias=False)
        self.score = nn.Linear(H, 1, bias=False)
        self.cell = nn.GRUCell(D + 2 * H, H)
        self.out = nn.Linear(H + D + 2 * H, D)
        self.bias = nn.Parameter(torch.zeros(V))

    def forward(self, source, lengths, before):
        packed = nn.utils.rnn.pack_padded_sequence(
            self.source(source), lengths, True, enforce_sorted=False
        )
        h, last = self.encoder(packed)
        h, _ = nn.utils.rnn.pad_packed_sequence(h, True, total_length=S)
        s = torch.tanh(self.first(last[1]))
        behind = torch.arange(S)[None] >= lengths[:, None]
        logits, alphas = [], []
        for i in range(T):
            y = self.target(before[:, i])
            e = self.score(torch.tanh(self.query(s)[:, None] + self.keys(h)))[..., 0]
            alpha = torch.softmax(e.masked_fill(behind, -torch.inf), -1)
            c = (alpha[..., None] * h).sum(1)
            s = self.cell(torch.cat([y, c], -1), s)
            t = torch.tanh(self.out(torch.cat([s, y, c], -1)))
            logits.append(t @ self.target.weight.T + self.bias)
            alphas.append(alpha)
        return torch.stack(logits, 1), torch.stack(alphas, 1)


def converted(named):
    """PyTorch's parameters, or their gradients, under our names."""
    p = {k: np.asarray(v) for k, v in named.items()}

    def side(end):
        wx, wh, bx, bh = (
            np.split(p[f"encoder.{kind}_l0{end}"], 3)
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        out = {"hn": {"kernel": wh[2].T, "bias": bh[2]}}
        for i, g in enumerate(GATES):
            out[f"i{g}"] = {"kernel": wx[i].T, "bias": bx[i] + (bh[i] if g != "n" else 0)}
            if g != "n":
                out[f"h{g}"] = {"kernel": wh[i].T}
        return out

    kernel = p["cell.weight_ih"].T
    return {
        "encoder": {
            "embedding": {"embedding": p["source.weight"]},
            "right": side(""),
            "left": side("_reverse"),
        },
        "embedding": {"embedding": p["target.weight"]},
        "W_s": {"kernel": p["first.weight"].T, "bias": p["first.bias"]},
        "U_a": {"kernel": p["keys.weight"].T},
        "W": {"kernel": kernel[:D], "bias": p["cell.bias_ih"]},
        "decoder": {
            "W_a": {"kernel": p["query.weight"].T},
            "v_a": {"kernel": p["score.weight"].T},
            "C": {"kernel": kernel[D:]},
            "U": {"kernel": p["cell.weight_hh"].T, "bias": p["cell.bias_hh"]},
        },
        "U_o": {"kernel": p["out.weight"].T[:H], "bias": p["out.bias"]},
        "V_o": {"kernel": p["out.weight"].T[H : H + D]},
        "C_o": {"kernel": p["out.weight"].T[H + D :]},
        "bias": p["bias"],
    }


def close(found, wanted):
    assert np.shape(found) == np.shape(wanted)
    error = np.abs(np.asarray(found) - wanted).max()
    assert error <= 1e-8 * np.abs(wanted).max(), error


@pytest.mark.parametrize("lengths", [(6, 6, 6, 6), (6, 1, 4, 2)])
def test_torch(lengths, x64):
    random = np.random.default_rng(0)
    theirs = Theirs().double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.from_numpy(random.normal(size=tuple(p.shape)) * 0.6))
    names = dict(theirs.named_parameters())
    params = jax.tree.map(jnp.asarray, converted({k: p.detach() for k, p in names.items()}))
    source, before = random.integers(0, W, (B, S)), random.integers(0, V, (B, T))
    weights, more = random.normal(size=(B, T, V)), random.normal(size=(B, T, S))
    model = seq2seq.Seq2Seq(W, V, D, H)
    shapes = jax.eval_shape(model.init, jax.random.key(0), source, np.array(lengths), before)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes["params"])

    logits, alpha = theirs(
        torch.from_numpy(source), torch.tensor(lengths), torch.from_numpy(before)
    )
    loss = (logits * torch.from_numpy(weights)).sum() + (alpha * torch.from_numpy(more)).sum()
    loss.backward()

    @jax.jit
    def ours(params):
        def loss(params):
            logits, alpha = model.apply({"params": params}, source, jnp.array(lengths), before)
            return (logits * weights).sum() + (alpha * more).sum(), (logits, alpha)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (found, found_alpha) = ours(params)
    close(found, logits.detach().numpy())
    close(found_alpha, alpha.detach().numpy())
    grads = {k: p.grad.numpy() for k, p in names.items()}
    for end in ("", "_reverse"):  # the gradient of a sum of two biases is that of either
        grads[f"encoder.bias_hh_l0{end}"] = grads[f"encoder.bias_hh_l0{end}"] * (
            np.arange(3 * H) >= 2 * H
        )
    wanted = converted(grads)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)
    jax.tree.map(close, gradients, wanted)
