"""Text, token by token, from any network that gives the logits of the next one.

It stands outside of `dlx.models` because it knows none of them: a recurrent network's state, a
Transformer's cache of keys and values and a plain window of tokens are all the same to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dlx.errors import BadInput, check_ranges

Apply = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the `sample` command draws text."""

    # A field `sample` of a configuration; nothing here may change what is trained.

    prompt: str = ""  # what the text begins with
    length: int = 500  # tokens after it
    temperature: float = 1.0  # logits are divided by it; 0: always the most probable token
    top_k: int = 0  # draw from the K most probable tokens; 0: from all
    top_p: float = 1.0  # draw from the fewest tokens that together have this probability
    seed: int = 0  # another one draws another text

    def __post_init__(self):
        check_ranges(self, positive=("length",), not_negative=("temperature", "top_k", "seed"))
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p is {self.top_p}: it must be above 0 and at most 1")


def cut(logits: jax.Array, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Logits (..., V) with -inf for the tokens that are not drawn from.

    Of equal ones the first are kept. `top_p` looks at what `top_k` has left, scaled to sum to 1
    (A. Holtzman et al., arXiv 1904.09751, section 3.1).

    >>> cut(jnp.log(jnp.array([0.1, 0.6, 0.3])), top_p=0.8).tolist()[0]
    -inf
    """
    V = logits.shape[-1]
    if not 0 < top_k < V and top_p >= 1:
        return logits
    order = jnp.argsort(-logits, axis=-1)  # (..., V) stable
    ranked = jnp.take_along_axis(logits, order, -1)
    if 0 < top_k < V:
        ranked = ranked.at[..., top_k:].set(-jnp.inf)
    if top_p < 1:
        p = jax.nn.softmax(ranked)
        # Kept while those before it do not reach top_p: so the first always is.
        ranked = jnp.where(p.cumsum(-1) - p < top_p, ranked, -jnp.inf)
    return jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), -1)


def draw(
    key: jax.Array,
    logits: jax.Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """Tokens (...) from logits (..., V): scaled by the temperature, then cut."""
    if temperature == 0:
        return logits.argmax(-1)
    return jax.random.categorical(key, cut(logits / temperature, top_k, top_p))


def generate(
    apply: Apply,
    prompt: jax.Array | np.ndarray,
    length: int,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> jax.Array:
    """(B, P) tokens -> the (B, length) after them. Pure; may be jitted.

    Token t is drawn with ``fold_in(key, t)``, so that a longer text begins as a shorter one.

    Args:
      apply: (tokens (B, T), state) -> (logits (B, T, V) of the token after each, state to go on
        from); the state is None at first, and then of one structure.
      prompt: integers below V, one at least.
      length: how many to draw.
      key: of the draws.
      temperature, top_k, top_p: see `Sampling`.

    Raises:
      BadInput: an option is out of range, or the prompt is empty or, where it is known, beyond
        the vocabulary.
    """
    Sampling("", length, temperature, top_k, top_p)
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise BadInput(f"the prompt has shape {prompt.shape}: give (B, P), a token at least")
    if not isinstance(prompt, Tracer):
        size = jax.eval_shape(apply, prompt, None)[0].shape[-1]
        for token in (int(prompt.min()), int(prompt.max())):
            if not 0 <= token < size:
                raise BadInput(
                    f"token {token} of the prompt is beyond the vocabulary: give 0 to {size - 1}"
                )
    prompt = jnp.asarray(prompt)

    def one(logits: jax.Array, t: jax.Array) -> jax.Array:
        drawn = draw(jax.random.fold_in(key, t), logits, temperature, top_k, top_p)
        return drawn.astype(prompt.dtype)  # (B,)

    def step(carry: Any, t: jax.Array) -> Any:
        token, state = carry
        logits, state = apply(token[:, None], state)
        return (one(logits[:, -1], t), state), token

    logits, state = apply(prompt, None)
    carry = one(logits[:, -1], jnp.int32(0)), state
    (last, _), tokens = jax.lax.scan(step, carry, jnp.arange(1, length))
    return jnp.concatenate([tokens, last[None]]).T  # (B, length)
