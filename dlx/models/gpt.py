"""GPT: a decoder-only Transformer.

A. Radford, J. Wu, R. Child, D. Luan, D. Amodei, I. Sutskever, "Language Models are Unsupervised
Multitask Learners", 2019 (GPT-2): a network that predicts each token from those before it, made of
nothing but attention and small perceptrons, learns a language and a good deal of what is said in
it. The equations are those of A. Vaswani et al., "Attention Is All You Need", arXiv 1706.03762:

    h_0 = E[tokens] + P,    h = h + attention(norm(h)),    h = h + mlp(norm(h)),
    logits = norm(h_L) E^T

with the normalisation before each branch (GPT-2, section 2.3), learned positions P, GELU by tanh,
and the output weights tied to the embedding E. Left out: the cache for generating token by token.

Symbols: B batch, T tokens, V vocabulary, W width, H heads, D = W / H.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlx import nn
from dlx.errors import BadInput
from dlx.nn import torch

INIT = 0.02  # standard deviation of all matrices at the start
init = nn.initializers.normal(INIT)


def residual_init(layers: int) -> Any:
    """The 2 L branches add up to the variance of one (GPT-2, section 2.3)."""
    return nn.initializers.normal(INIT / np.sqrt(2 * layers))


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D) + M) V in each head (1706.03762, equation 1), where M is 0 for a
    token and those before it and minus infinity for those after it; then a linear layer."""

    heads: int
    layers: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, T, W) -> (B, T, W)."""
        B, T, W = x.shape
        qkv = nn.Dense(3 * W, kernel_init=init, dtype=self.dtype, name="qkv")(x)  # (B, T, 3 W)
        q, k, v = (
            part.reshape(B, T, self.heads, -1) for part in jnp.split(qkv, 3, -1)
        )  # (B, T, H, D) each
        drop = self.dropout > 0 and train
        y = nn.dot_product_attention(
            q, k, v,
            mask=np.tri(T, dtype=bool)[None, None],
            broadcast_dropout=False,
            dropout_rng=self.make_rng("dropout") if drop else None,
            dropout_rate=self.dropout,
            deterministic=not train,
            dtype=self.dtype,
            force_fp32_for_softmax=q.dtype.itemsize < 4,
        )  # (B, T, H, D)  # fmt: skip
        y = y.reshape(B, T, W)
        y = nn.Dense(W, kernel_init=residual_init(self.layers), dtype=self.dtype, name="out")(y)
        return nn.Dropout(self.dropout, deterministic=not train, name="drop")(y)


class MLP(nn.Module):
    """W_2 gelu(W_1 x + b_1) + b_2, four times as wide within."""

    layers: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, T, W) -> (B, T, W)."""
        W = x.shape[-1]
        x = nn.Dense(4 * W, kernel_init=init, dtype=self.dtype, name="up")(x)  # (B, T, 4 W)
        x = nn.gelu(x, approximate=True)
        x = nn.Dense(W, kernel_init=residual_init(self.layers), dtype=self.dtype, name="down")(x)
        return nn.Dropout(self.dropout, deterministic=not train, name="drop")(x)


class Block(nn.Module):
    """h = h + attention(norm(h)), then h = h + mlp(norm(h))."""

    heads: int
    layers: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, T, W) -> (B, T, W)."""
        rest = (self.layers, self.dropout, self.dtype)
        y = layer_norm(dtype=self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, *rest, name="attention")(y, train=train)
        y = layer_norm(dtype=self.dtype, name="norm2")(x)
        return x + MLP(*rest, name="mlp")(y, train=train)


layer_norm = partial(nn.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class GPT(nn.Module):
    """Embeddings, blocks, a last normalisation, and a distribution over the next token.

    Attributes:
      vocabulary: tokens there are, V.
      context: the longest T.
      layers: blocks, L.
      heads: of each attention.
      width: of the residual stream, W.
      dropout: rate on the embeddings, the attention weights and the output of each branch.
      tied: the output weights are the embedding's.
      dtype: of the computation; parameters are float32 in any case.

    Raises:
      BadInput: the heads do not divide the width, or (when called) T is beyond the context.
    """

    vocabulary: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    dropout: float = 0.1
    tied: bool = True
    dtype: Any = None

    def __post_init__(self):
        if self.width % self.heads:
            raise BadInput(f"width {self.width} is no multiple of heads {self.heads}: change one")
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """(B, T) integers -> logits (B, T, V) of the token after each."""
        T = tokens.shape[-1]
        if self.context < T:
            raise BadInput(f"{T} tokens are beyond the context of {self.context}: give fewer")
        embed = partial(nn.Embed, features=self.width, embedding_init=init, dtype=self.dtype)
        embedding = embed(self.vocabulary, name="embedding")
        places = embed(self.context, name="positions")(jnp.arange(T))  # (T, W)
        x = embedding(tokens) + places[None]  # (B, T, W)
        x = nn.Dropout(self.dropout, deterministic=not train, name="drop")(x)
        for i in range(self.layers):
            block = Block(self.heads, self.layers, self.dropout, self.dtype, name=f"block{i}")
            x = block(x, train=train)
        x = layer_norm(dtype=self.dtype, name="norm")(x)
        if self.tied:
            return embedding.attend(x)  # (B, T, V)
        return nn.Dense(
            self.vocabulary, use_bias=False, kernel_init=init, dtype=self.dtype, name="head"
        )(x)  # (B, T, V)


GPT2 = partial(GPT)
GPT2Medium = partial(GPT, layers=24, heads=16, width=1024)
GPT2Large = partial(GPT, layers=36, heads=20, width=1280)
GPT2XL = partial(GPT, layers=48, heads=25, width=1600)


NAMES = {
    "wte": "embedding", "wpe": "positions", "ln_f": "norm", "lm_head": "head", "ln_1": "norm1",
    "attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "ln_2": "norm2",
    "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
}  # fmt: skip


def from_torch(state: Mapping[str, np.ndarray], *, tied: bool = True) -> dict[str, Any]:
    """{"params"} from GPT-2's names in Hugging Face's transformers ("h.0.attn.c_attn.weight").

    Args:
      state: {name: array}, as ``safetensors.numpy.load_file`` reads it.
      tied: as the model's; lm_head.weight is then left out.
    """
    params: dict[str, Any] = {}
    for name, value in state.items():
        layer, _, last = name.removeprefix("transformer.").rpartition(".")
        if (layer == "lm_head" and tied) or re.search(r"\.attn\.(masked_)?bias$", name):
            continue  # the mask is no parameter
        block = re.match(r"h\.(\d+)\.", layer)
        layer = NAMES[layer[block.end() :] if block else layer]
        value = np.asarray(value)
        if layer in ("embedding", "positions"):
            last = "embedding"
        elif value.ndim == 2 and layer != "head":
            last = "kernel"  # (I, O) there as here
        else:
            _, last, value = torch.convert(last, value)
        place = params.setdefault(f"block{block[1]}", {}) if block else params
        *path, leaf = [*layer.split("."), last]
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return {"params": params}
