"""Recurrent networks.

J. Elman, "Finding Structure in Time", Cognitive Science 1990: a layer that sees its own last state
beside the input keeps what it needs of the past in that state,

    h_t = tanh(W x_t + U h_{t-1} + b)                                              ("elman")

S. Hochreiter and J. Schmidhuber, "Long Short-Term Memory", Neural Computation 1997, with the forget
gate of F. Gers, J. Schmidhuber, F. Cummins, "Learning to Forget", 2000: a cell c that is only ever
added to and scaled, so that its gradient lasts,

    i, f, o = sigmoid(W x_t + U h_{t-1} + b) each,    g = tanh(W x_t + U h_{t-1} + b)
    c_t = f c_{t-1} + i g,    h_t = o tanh(c_t)                                    ("lstm")

K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", arXiv 1406.1078,
equations 5 to 8: two gates and no cell,

    r, z = sigmoid(W x_t + U h_{t-1} + b) each
    n = tanh(W x_t + b + r (U h_{t-1} + b')),    h_t = (1 - z) n + z h_{t-1}       ("gru")

Here the reset gate r scales the product U h, as in linen, PyTorch and cuDNN; equation 8 has
U (r h). Dropout goes between the layers and never into the recurrence (W. Zaremba, I. Sutskever,
O. Vinyals, arXiv 1409.2329, section 3.1); `variational` draws one mask for all steps of a sequence
(Y. Gal and Z. Ghahramani, arXiv 1512.05287, section 4). Left out: their mask on h_{t-1}.

Symbols: B batch, T steps, D inputs, H units, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlx import nn
from dlx.errors import BadInput, check_ranges
from dlx.nn.lengths import check_lengths

CELLS: dict[str, Any] = {"elman": nn.SimpleCell, "lstm": nn.OptimizedLSTMCell, "gru": nn.GRUCell}


class RNN(nn.Module):
    """Layers of one cell, each in one direction or in both, whose outputs then stand side by side.

    Attributes:
      units: H of each layer and direction.
      layers: one above the other.
      cell: "elman", "lstm" or "gru".
      bidirectional: a second cell in each layer reads the sequence from its end.
      dropout: rate of what each layer but the first takes in.
      variational: the same units are dropped at every step of a sequence.
      dtype: of the computation; parameters are float32 in any case.

    Raises:
      BadInput: an unknown cell, no layers or units, or a rate outside of [0, 1).
    """

    units: int
    layers: int = 1
    cell: str = "lstm"
    bidirectional: bool = False
    dropout: float = 0.0
    variational: bool = False
    dtype: Any = None

    def __post_init__(self):
        check_cell(self.cell)
        check_ranges(self, positive=("units", "layers"), share=("dropout",))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: Any = None,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, Any]:
        """(B, T, D) -> outputs (B, T, H or 2 H) and the state after each sequence's last step.

        Args:
          x: what stands behind a sequence's end is never looked at, and may be NaN.
          state: as returned, to go on from; None is zero. A tuple with one for each layer and
            direction (l0, l0 reversed, l1, ...): h (B, H), or (c, h) for "lstm".
          lengths: (B,) integers from 1 to T; None is T. The outputs behind them are 0.
          train: whether to drop.

        Raises:
          BadInput: lengths are no (B,) integers or, where they are known, not all in 1 ... T; the
            state has another number of parts.
        """
        valid = None
        if lengths is not None:
            lengths = check_lengths(lengths, x.shape[:2])
            valid = (jnp.arange(x.shape[1])[None] < lengths[:, None])[..., None]  # (B, T, 1)
            x = jnp.where(valid, x, jnp.zeros_like(x))  # NaN times a gradient of 0 would be NaN
        directions = ("", "_reverse") if self.bidirectional else ("",)
        dtype = self.dtype or x.dtype
        if state is None:
            zero = jnp.zeros((len(x), self.units), dtype)
            one = (zero, zero) if self.cell == "lstm" else zero
            state = (one,) * self.layers * len(directions)
        parts = self.layers * len(directions)
        if not isinstance(state, tuple) or len(state) != parts:
            found = f"{len(state)} parts" if isinstance(state, tuple) else type(state).__name__
            raise BadInput(f"state is of {found}: give a tuple of {parts}, see the docstring")
        carries = iter(jax.tree.map(lambda s: s.astype(dtype), state))
        last = []
        for i in range(self.layers):
            if i > 0:
                x = drop(self.dropout, self.variational, train, f"drop{i}")(x)
            outputs = []
            for back in directions:
                cell = CELLS[self.cell](self.units, dtype=self.dtype, name=f"layer{i}{back}")
                rnn = nn.RNN(cell, reverse=bool(back), keep_order=True, name=f"scan{i}{back}")
                carry, y = rnn(
                    x, initial_carry=next(carries), seq_lengths=lengths, return_carry=True
                )  # (B, T, H)
                outputs.append(y)
                last.append(carry)
            x = jnp.concatenate(outputs, -1) if len(outputs) > 1 else outputs[0]  # (B, T, H or 2 H)
            if valid is not None:
                x = jnp.where(valid, x, jnp.zeros_like(x))
        return x, tuple(last)


class LanguageModel(nn.Module):
    """p(next token) = softmax(W h_t + b), where h is the last layer on embedded tokens.

    Attributes:
      vocabulary: V.
      units: H of each layer, and of the embedding.
      layers: one above the other.
      cell: "elman", "lstm" or "gru".
      dropout: rate of the embedded tokens, of each layer's inputs and of the output's.
      variational: the same units are dropped at every step of a sequence.
      tied: W is the embedding's matrix (O. Press and L. Wolf, arXiv 1608.05859), and b is 0.
      dtype: of the computation; parameters are float32 in any case.

    Raises:
      BadInput: as `RNN`.
    """

    vocabulary: int
    units: int = 512
    layers: int = 1
    cell: str = "lstm"
    dropout: float = 0.0
    variational: bool = False
    tied: bool = False
    dtype: Any = None

    def __post_init__(self):
        check_cell(self.cell)
        names = ("vocabulary", "units", "layers")
        check_ranges(self, positive=names, share=("dropout",))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        state: Any = None,
        lengths: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, Any]:
        """(B, T) integers -> logits (B, T, V) of the tokens after them, and the state to go on
        from: the next part of the same text, or the token that was drawn. As `RNN` otherwise."""
        embedding = nn.Embed(self.vocabulary, self.units, dtype=self.dtype, name="embedding")
        x = embedding(tokens)  # (B, T, H)
        x = drop(self.dropout, self.variational, train, "drop_in")(x)
        rnn = RNN(
            self.units, self.layers, self.cell, False, self.dropout, self.variational, self.dtype,
            name="rnn",
        )  # fmt: skip
        x, state = rnn(x, state, lengths, train=train)  # (B, T, H)
        x = drop(self.dropout, self.variational, train, "drop_out")(x)
        if self.tied:
            return embedding.attend(x), state  # (B, T, V)
        return nn.Dense(self.vocabulary, dtype=self.dtype, name="head")(x), state


# The networks of Zaremba et al., section 4.1, for the 10,000 words of the Penn Treebank.
ZarembaSmall = partial(LanguageModel, 10_000, 200, 2)
ZarembaMedium = partial(LanguageModel, 10_000, 650, 2, dropout=0.5)
ZarembaLarge = partial(LanguageModel, 10_000, 1500, 2, dropout=0.65)


def language(model: LanguageModel) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Mean over all tokens of -log p(target | the text up to it), in nats.

    Back-propagation is truncated: with {"state": one of `model`} as the model state of the step, a
    batch goes on where the last one ended, and no gradient goes back there. With {} it starts at 0.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {"tokens": (B, T), "targets": (B, T)} of
      integers below V.
    """

    def loss_fn(params, model_state, batch, key):
        logits, state = model.apply(
            {"params": params}, batch["tokens"], model_state.get("state"),
            train=True, rngs={"dropout": key},
        )  # (B, T, V)  # fmt: skip
        if logits.dtype != jnp.float64:
            logits = logits.astype(jnp.float32)  # a bfloat16 network's loss is summed in float32
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return loss.mean(), ({"state": state} if model_state else {}, {})

    return loss_fn


def drop(rate: float, variational: bool, train: bool, name: str) -> nn.Dropout:
    """Dropout on (B, T, H); variational: with one mask for all T."""
    return nn.Dropout(rate, (1,) if variational else (), deterministic=not train, name=name)


def check_cell(cell: str) -> None:
    if cell not in CELLS:
        raise BadInput(f"cell is {cell!r}: give one of {', '.join(CELLS)}")


def from_torch(state: Mapping[str, np.ndarray], cell: str) -> dict[str, Any]:
    """Parameters of `RNN` from those of torch.nn.RNN, LSTM or GRU ("weight_ih_l0").

    PyTorch has two bias vectors for each gate, here there is their sum: an LSTM's stands with the
    recurrent kernels ("hi"), a GRU's and Elman's with the inputs' ("ir"), but the GRU's n keeps
    both ("in" and "hn"), for r comes between them.

    Args:
      state: {name: array}, weights (G H, D or H) and biases (G H,).
      cell: "elman", "lstm" or "gru".
    """
    check_cell(cell)
    gates = {"elman": [""], "lstm": ["i", "f", "g", "o"], "gru": ["r", "z", "n"]}[cell]
    out: dict[str, Any] = {}
    for name in [n for n in state if n.startswith("weight_ih_l")]:
        which = name.removeprefix("weight_ih_l")  # "0_reverse"
        part = {
            kind: np.split(np.asarray(state[f"{kind}_l{which}"]), len(gates))
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        layer = out.setdefault(f"layer{which}", {})
        for i, gate in enumerate(gates):
            layer["i" + gate] = {"kernel": part["weight_ih"][i].T}
            layer["h" + gate] = {"kernel": part["weight_hh"][i].T}
            apart = gate == "n"
            both = part["bias_ih"][i] + (0 if apart else part["bias_hh"][i])
            layer[("h" if cell == "lstm" else "i") + gate]["bias"] = both
            if apart:
                layer["hn"]["bias"] = part["bias_hh"][i]
    return out
