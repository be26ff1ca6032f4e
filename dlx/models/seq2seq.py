"""Sequence to sequence, with attention.

D. Bahdanau, K. Cho, Y. Bengio, "Neural Machine Translation by Jointly Learning to Align and
Translate", arXiv 1409.0473. A network reads the source in both directions, so that each of its
states, an annotation h_j, knows what stands around word j. Another writes the target word by word,
and for each word looks anew at all annotations: no single vector must hold the whole sentence.

The annotations (section 3.2) are the states of two GRUs side by side, h_j = [->h_j; <-h_j]. The
decoder begins with s_0 = tanh(W_s <-h_1) (appendix A.2.2), and for the i-th word

    e_ij = v_a . tanh(W_a s_{i-1} + U_a h_j)            how well s_{i-1} and h_j fit (A.1.2)
    alpha_i = softmax(e_i),   c_i = sum_j alpha_ij h_j                     (equations 6 and 5)
    r, z = sigmoid(W E y_{i-1} + C c_i + U s_{i-1} + b) each               (A.2.2)
    n = tanh(W E y_{i-1} + C c_i + b + r (U s_{i-1} + b'))
    s_i = (1 - z) n + z s_{i-1}
    t_i = tanh(U_o s_i + V_o E y_{i-1} + C_o c_i)
    p(y_i | y_1 .. y_{i-1}, x) = softmax(E t_i + b_o)

U_a h_j and W E y_{i-1} do not wait for the decoder and are computed before its loop, t_i and the
logits after it. Other than in A.2.2 the reset gate r scales the product U s, as in linen and
PyTorch; t_i has s_i (equation 4) and tanh in place of s_{i-1} and maxout; the output's matrix is
the embedding's (O. Press and L. Wolf, arXiv 1608.05859).

Symbols: B batch, S and T words of source and target, D embedding, H units, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlx import nn
from dlx.errors import check_ranges
from dlx.nn.lengths import check_lengths


class Source(NamedTuple):
    """What the decoder knows of a sentence."""

    h: jax.Array  # (B, S, 2 H), the annotations; 0 behind the end
    keys: jax.Array  # (B, S, H), U_a h
    valid: jax.Array  # (B, S) bool


class Encoder(nn.Module):
    """Words -> annotations."""

    vocabulary: int
    embed: int
    units: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, words: jax.Array, lengths: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """(B, S) integers, (B,) -> h (B, S, 2 H) and <-h_1 (B, H)."""
        drop = nn.Dropout(self.dropout, deterministic=not train, name="drop")
        x = nn.Embed(self.vocabulary, self.embed, dtype=self.dtype, name="embedding")(words)
        x = drop(x)  # (B, S, D)
        sides, zero = [], jnp.zeros((len(x), self.units), x.dtype)
        for name in ("right", "left"):
            cell = nn.GRUCell(self.units, dtype=self.dtype, name=name)
            rnn = nn.RNN(cell, reverse=name == "left", keep_order=True, name=f"scan_{name}")
            sides.append(rnn(x, initial_carry=zero, seq_lengths=lengths))  # (B, S, H)
        h = jnp.concatenate(sides, -1)  # (B, S, 2 H)
        valid = within(lengths, words.shape[1])
        return jnp.where(valid[..., None], h, jnp.zeros_like(h)), sides[1][:, 0]


class Decoder(nn.Module):
    """One step: attention, then the recurrent state."""

    units: int
    dtype: Any = None

    @nn.compact
    def __call__(self, s: jax.Array, word: jax.Array, source: Source) -> Any:
        """s_{i-1} (B, H), W E y_{i-1} + b (B, 3 H) -> s_i, and (s_i, c_i, alpha_i (B, S))."""
        query = nn.Dense(self.units, use_bias=False, dtype=self.dtype, name="W_a")(s)  # (B, H)
        fit = jnp.tanh(query[:, None] + source.keys)  # (B, S, H)
        e = nn.Dense(1, use_bias=False, dtype=self.dtype, name="v_a")(fit)[..., 0]  # (B, S)
        alpha = jax.nn.softmax(jnp.where(source.valid, e, -jnp.inf))
        c = (alpha[..., None] * source.h).sum(1)  # (B, 2 H)
        a = word + nn.Dense(3 * self.units, use_bias=False, dtype=self.dtype, name="C")(c)
        u = nn.Dense(3 * self.units, kernel_init=gates, dtype=self.dtype, name="U")(s)
        r, z = jnp.split(nn.sigmoid((a + u)[:, : 2 * self.units]), 2, -1)
        n = jnp.tanh(a[:, 2 * self.units :] + r * u[:, 2 * self.units :])
        s = (1 - z) * n + z * s  # (B, H)
        return s, (s, c, alpha)


class Seq2Seq(nn.Module):
    """p(target | source). `__call__` for known targets, `encode` and `step` to search for one.

    Attributes:
      source: vocabulary of the source.
      target: V, vocabulary of the target.
      embed: D of both.
      units: H of the decoder, of each direction of the encoder, and of the attention.
      dropout: rate of embedded words, annotations and t.
      dtype: of the computation; parameters are float32 in any case.

    Raises:
      BadInput: a size that is not positive, or a rate outside of [0, 1).
    """

    source: int
    target: int
    embed: int = 256
    units: int = 256
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self):
        names = ("source", "target", "embed", "units")
        check_ranges(self, positive=names, share=("dropout",))
        super().__post_init__()

    def setup(self):
        def dense(width: int, bias: bool) -> nn.Dense:
            return nn.Dense(width, use_bias=bias, dtype=self.dtype)

        H = self.units
        self.encoder = Encoder(self.source, self.embed, H, self.dropout, self.dtype)
        self.embedding = nn.Embed(self.target, self.embed, dtype=self.dtype)
        self.W_s, self.U_a, self.W = dense(H, True), dense(H, False), dense(3 * H, True)
        self.decoder = Decoder(H, self.dtype)
        self.U_o, self.V_o, self.C_o = (dense(self.embed, bias) for bias in (True, False, False))
        self.bias = self.param("bias", nn.initializers.zeros, (self.target,))
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, source: jax.Array, lengths: jax.Array, before: jax.Array, *, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Logits of the words of known targets.

        Args:
          source: (B, S) integers; what stands behind a sentence's end changes nothing.
          lengths: (B,) integers from 1 to S.
          before: (B, T) integers, the words before each target word: y_0, .., y_{T-1}.
          train: whether to drop.

        Returns:
          (B, T, V) logits of y_1, .., y_T, and their attention alpha, (B, T, S).

        Raises:
          BadInput: as `encode`.
        """
        known, s = self.encode(source, lengths, train=train)
        y = self.drop(self.embedding(before), deterministic=not train)  # (B, T, D)
        words = self.W(y).swapaxes(0, 1)  # (T, B, 3 H)
        scan = nn.scan(
            lambda decoder, s, word: decoder(s, word, known),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        _, (s, c, alpha) = scan(self.decoder, s, words)  # (T, B, ...)
        logits = self.output(s.swapaxes(0, 1), y, c.swapaxes(0, 1), train=train)
        return logits, alpha.swapaxes(0, 1)

    def encode(
        self, source: jax.Array, lengths: jax.Array, *, train: bool = False
    ) -> tuple[Source, jax.Array]:
        """What the decoder looks at, and its first state s_0 (B, H). Arguments as `__call__`.

        Raises:
          BadInput: lengths are no (B,) integers or, where they are known, not all in 1 ... S.
        """
        lengths = check_lengths(lengths, source.shape)
        h, first = self.encoder(source, lengths, train=train)
        h = self.drop(h, deterministic=not train)
        return Source(h, self.U_a(h), within(lengths, source.shape[1])), jnp.tanh(self.W_s(first))

    def step(
        self, known: Source, s: jax.Array, word: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """s_{i-1} (B, H) and y_{i-1} (B,) -> logits of y_i (B, V), s_i and alpha_i (B, S)."""
        y = self.embedding(word)  # (B, D)
        s, (_, c, alpha) = self.decoder(s, self.W(y), known)
        return self.output(s, y, c), s, alpha

    def output(self, s: jax.Array, y: jax.Array, c: jax.Array, *, train: bool = False) -> jax.Array:
        """(..., H), (..., D), (..., 2 H) -> logits (..., V)."""
        t = jnp.tanh(self.U_o(s) + self.V_o(y) + self.C_o(c))  # (..., D)
        t = self.drop(t, deterministic=not train)
        bias = self.bias.reshape((1,) * (t.ndim - 1) + (-1,)).astype(t.dtype)
        return self.embedding.attend(t) + bias


def gates(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> jax.Array:
    """(H, 3 H): an orthogonal matrix for each gate."""
    one = nn.initializers.orthogonal()
    three = jax.vmap(lambda key: one(key, (shape[0],) * 2, dtype))(jax.random.split(key, 3))
    return jnp.concatenate(list(three), -1)


def translation(
    model: Seq2Seq, start: int, *, label_smoothing: float = 0.0
) -> Callable[..., tuple[jax.Array, tuple[Any, dict[str, Any]]]]:
    """Mean over all target words of their cross-entropy, in nats.

    Args:
      model: the network.
      start: y_0, the word before the first.
      label_smoothing: e in [0, 1): a target is (1 - e) one-hot + e / V.

    Returns:
      loss_fn(params, model_state, batch, key) of a batch {"source": (B, S), "source_length": (B,),
      "target": (B, T), "target_length": (B,)}; metrics are nll, without smoothing, and the weight.
    """

    def loss_fn(params, model_state, batch, key):
        logits, _ = model.apply(
            {"params": params}, batch["source"], batch["source_length"],
            shifted(batch["target"], start), train=True, rngs={"dropout": key},
        )  # (B, T, V)  # fmt: skip
        nll, uniform = cross_entropy(logits, batch["target"])  # (B, T)
        valid = within(batch["target_length"], nll.shape[1])
        smooth = (1 - label_smoothing) * nll + label_smoothing * uniform
        count = valid.sum().astype(nll.dtype)
        loss, nll = (jnp.where(valid, x, jnp.zeros_like(x)).sum() for x in (smooth, nll))
        return loss / count, (model_state, {"nll": (nll, count), "weight": count})

    return loss_fn


def cross_entropy(logits: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(..., V), (...) -> -log p(target), and the mean over all words of -log p, (...) each."""
    if logits.dtype != jnp.float64:
        logits = logits.astype(jnp.float32)  # a bfloat16 network's loss is summed in float32
    total = jax.nn.logsumexp(logits, -1)
    own = jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
    return total - own, total - logits.mean(-1)


def within(lengths: jax.Array, width: int) -> jax.Array:
    """(B,) -> (B, width) bool: which places are before each end."""
    return jnp.arange(width, dtype=lengths.dtype)[None] < lengths[:, None]


def shifted(target: jax.Array, start: int) -> jax.Array:
    """(B, T) y_1, .., y_T -> y_0, .., y_{T-1}."""
    return jnp.concatenate([jnp.full_like(target[:, :1], start), target[:, :-1]], 1)
