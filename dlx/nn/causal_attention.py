"""Causal attention that XLA compiles well on a CPU.

Queries are taken 128 at a time, and what they cannot see is not computed; the backward pass keeps
the weights and needs one sum less. Values and gradients of 6 heads of 64: 1 x 2,048 tokens 460 ->
101 ms, 2 x 1,024 89 -> 57, 4 x 512 46 -> 33, 8 x 256 27.3 -> 23.7; of 128 tokens and fewer nothing
is gained, and they are left to flax (2 cores of an Intel Xeon at 2.5 GHz, float32, jax 0.12). A few
sequences at a time, to stay in the cache, was slower: what is copied around the loop costs more.

Reverse mode works to any order, and vmap; forward mode does not (jax.custom_vjp): `nn.plain()`.

Symbols: B sequences, T tokens, H heads, D numbers of each, q, k, v (B, T, H, D).
"""

from __future__ import annotations

import inspect
from functools import partial, wraps
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np

from dlx.nn import dense
from dlx.nn.lowering import fits, on_cpu

ROWS = 128  # queries that are worked on together


@wraps(linen.dot_product_attention, assigned=())
def dot_product_attention(query, key, value, *args, **kwargs):
    """`flax.linen.dot_product_attention`: (..., T, H, D) three times -> (..., T, H, D).

    It is fast on a CPU where T is above 128 and the mask is causal, and known to be when the
    function is traced: a NumPy array, ``mask=np.tri(T, dtype=bool)[None, None]``.
    """
    signature = inspect.signature(linen.dot_product_attention)
    options = signature.bind(query, key, value, *args, **kwargs).arguments
    options = {k: v for k, v in options.items() if k not in ("query", "key", "value")}
    plain = partial(linen.dot_product_attention, **options)
    if not fits(query, key, value) or not _ordinary(query, key, value, **options):
        return plain(query, key, value)
    return on_cpu(_causal, plain, query, key, value)


def _ordinary(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: Any = None,
    dtype: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    broadcast_dropout: Any = None,
    dropout_rng: Any = None,
    force_fp32_for_softmax: bool = False,
    **others: Any,
) -> bool:
    """Causal self-attention of many tokens in one precision, and nothing out of the ordinary."""
    T, dtypes = query.shape[-3], {query.dtype, key.dtype, value.dtype}
    return (
        T > ROWS
        and all(option is None for option in others.values())
        and (dropout_rate == 0 or deterministic)
        and dtypes | {jnp.dtype(dtype or query.dtype)} == {query.dtype}
        and query.dtype
        in ((jnp.float32,) if force_fp32_for_softmax else (jnp.float32, jnp.float64))
        and key.shape == value.shape == query.shape
        and isinstance(mask, np.ndarray)
        and mask.ndim <= query.ndim
        and mask.shape[-2:] == (T, T) == (mask.size // T, T)
        and bool((mask.reshape(T, T) == np.tri(T)).all())
    )


def _blocks(T: int) -> list[slice]:
    return [slice(i, min(i + ROWS, T)) for i in range(0, T, ROWS)]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    """(B, H, D, T), (B, H, T, D), (B, H, D, T) -> (B, H, D, T), the weights."""
    parts, weights = [], []
    for rows in _blocks(k.shape[2]):
        n = rows.stop
        s = k[:, :, :n] @ q[..., rows]  # (B, H, n, R)
        seen = np.tri(n, dtype=bool).T[:, rows]
        s = jnp.where(jnp.broadcast_to(seen, s.shape), s, -jnp.inf)
        p = jnp.exp(s - s.max(-2, keepdims=True))
        weights.append(p / p.sum(-2, keepdims=True))
        parts.append(v[..., :n] @ weights[-1])  # (B, H, D, R)
    return jnp.concatenate(parts, -1), weights


def _backward(
    q: jax.Array, kT: jax.Array, v: jax.Array, do: jax.Array, doT: jax.Array, o: jax.Array,
    weights: list[jax.Array],
) -> Any:  # fmt: skip
    """With P = softmax(S):  dS = P (dP - o . do),  since o . do is the mean of dP under P.

    q, v, do (B, H, T, D), kT, doT, o (B, H, D, T) -> the gradients of q as (B, H, D, T), of k and
    v as (B, H, T, D).
    """
    T = q.shape[2]
    mean = (doT * o).sum(-2, keepdims=True)  # (B, H, 1, T)
    dqs: list[jax.Array] = []
    dk = dv = jnp.zeros_like(q)
    for rows, p in zip(_blocks(T), weights, strict=True):
        n = rows.stop
        rest = ((0, 0), (0, 0), (0, T - n), (0, 0))
        ds = p * (v[:, :, :n] @ doT[..., rows] - mean[..., rows])  # (B, H, n, R)
        dqs.append(kT[..., :n] @ ds)  # (B, H, D, R)
        dk += jnp.pad(ds @ q[:, :, rows], rest)
        dv += jnp.pad(p @ do[:, :, rows], rest)
    return jnp.concatenate(dqs, -1), dk, dv


@jax.custom_vjp
def _causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _causal_saving(q, k, v)[0]


def _columns(x: jax.Array) -> jax.Array:
    """(..., T, H, D) -> (B, H, D, T)."""
    return x.reshape(-1, *x.shape[-3:]).transpose(0, 2, 3, 1)


def _rows(x: jax.Array) -> jax.Array:
    """(..., T, H, D) -> (B, H, T, D)."""
    return x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2)


def _causal_saving(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    scale = np.sqrt(q.shape[-1]).astype(q.dtype)
    o, weights = _forward(_columns(q) / scale, _rows(k), _columns(v))
    return o.transpose(0, 3, 1, 2).reshape(v.shape), (q, k, v, o, weights)


def _causal_backward(saved: Any, dy: jax.Array) -> Any:
    q, k, v, o, weights = saved
    scale = np.sqrt(q.shape[-1]).astype(q.dtype)
    dq, dk, dv = _backward(
        _rows(q) / scale, _columns(k), _rows(v), _rows(dy), _columns(dy), o, weights
    )
    gradients = (dq / scale).transpose(0, 3, 1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)
    return tuple(g.reshape(q.shape) for g in gradients)


_causal.defvjp(_causal_saving, _causal_backward)


class MultiHeadDotProductAttention(linen.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` on `dot_product_attention` of this file and
    `dense.dot_general`. (`nn.SelfAttention` and `nn.MultiHeadAttention` are flax's as they are.)"""

    attention_fn: Any = dot_product_attention
    qkv_dot_general: Any = dense.dot_general
    out_dot_general: Any = dense.dot_general
