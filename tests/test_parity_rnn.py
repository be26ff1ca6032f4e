"""Recurrent networks against PyTorch on packed sequences, in float64: outputs, last states and the
gradients of parameters, inputs and first states. Needs torch (the extra `parity`), or skips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx.models import rnn

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
THEIRS = {"elman": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}
B, T, D, H = 4, 7, 3, 5


def close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape and np.abs(np.asarray(a) - b).max() <= 1e-8 * np.abs(b).max()


@pytest.mark.parametrize("lengths", [None, (7, 1, 4, 6)])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("cell", rnn.CELLS)
def test_packed_sequences(cell, layers, bidirectional, lengths, x64):
    random = np.random.default_rng(0)
    theirs = THEIRS[cell](D, H, layers, batch_first=True, bidirectional=bidirectional).double()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.from_numpy(random.normal(size=tuple(p.shape)) / 2))
    names = dict(theirs.named_parameters())
    params = rnn.from_torch({k: p.detach().numpy() for k, p in names.items()}, cell)
    model = rnn.RNN(H, layers, cell, bidirectional)
    sides = layers * (1 + bidirectional)
    x = random.normal(size=(B, T, D))
    start = random.normal(size=(2 if cell == "lstm" else 1, sides, B, H))  # h, then c
    steps = T if lengths is None else max(lengths)
    weights = random.normal(size=(B, steps, H * (1 + bidirectional)))
    ends = random.normal(size=start.shape)

    inputs, states = (torch.from_numpy(a).requires_grad_() for a in (x, start))
    given = inputs
    if lengths is not None:
        given = torch.nn.utils.rnn.pack_padded_sequence(
            inputs, torch.tensor(lengths), True, enforce_sorted=False
        )
    y, last = theirs(given, tuple(states) if cell == "lstm" else states[0])
    if lengths is not None:
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, True)
    last = torch.stack(last) if cell == "lstm" else last[None]
    loss = (y * torch.from_numpy(weights)).sum() + (last * torch.from_numpy(ends)).sum()
    loss.backward()

    def ours(states):
        """(2 or 1, sides, B, H) -> a carry for each side."""
        if cell == "lstm":
            return tuple((states[1, i], states[0, i]) for i in range(sides))
        return tuple(states[0, i] for i in range(sides))

    @jax.jit
    def gradients(params, x, states):
        def loss(params, x, states):
            known = None if lengths is None else jnp.array(lengths)
            y, last = model.apply({"params": params}, x, ours(states), known)
            ends_ = jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), last, ours(ends)))
            return (y * weights).sum() + sum(ends_), (y, last)

        return jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, states)

    (dparams, dx, dstates), (y_, last_) = gradients(params, x, start)
    close(y_, y.detach().numpy())
    close(last_, jax.tree.map(np.asarray, ours(last.detach().numpy())))
    close(dx, inputs.grad.numpy())
    close(dstates, states.grad.numpy())
    # The gradient of a sum of two biases is that of either.
    grads = {k: p.grad.numpy() for k, p in names.items()}
    for k in list(grads):
        apart = 2 * H if cell == "gru" else None
        if k.startswith("bias_hh"):
            assert np.allclose(grads[k][:apart], grads[k.replace("hh", "ih")][:apart], atol=1e-10)
            grads[k] = grads[k] * (np.arange(len(grads[k])) >= (3 * H if apart is None else apart))
            if cell != "gru":
                grads[k] = 0 * grads[k]
    close(dparams, rnn.from_torch(grads, cell))
