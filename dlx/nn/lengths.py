"""Lengths of padded sequences, as people give them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dlx.errors import BadInput


def check_lengths(lengths: Any, shape: tuple[int, ...]) -> jax.Array:
    """The lengths as integers of JAX's usual width, which hold T where an int8 may not.

    Args:
      lengths: (B,) integers from 1 to T, an array or a list.
      shape: (B, T) of the sequences.

    Raises:
      BadInput: they are no (B,) integers or, where they are known, not all in 1 ... T.
    """
    (B, T), known = shape, not isinstance(lengths, Tracer)
    # Not jnp.asarray: within jit it would make a tracer of what is known.
    given = np.asarray(lengths) if known else lengths
    if not jnp.issubdtype(given.dtype, jnp.integer) or given.shape != (B,):
        found = f"{given.dtype} of shape {given.shape}"
        raise BadInput(f"lengths are {found}: give integers of shape ({B},)")
    if known:
        for n in given.tolist():
            if not 1 <= n <= T:
                raise BadInput(f"a length is {n}: all must be from 1 to the {T} steps of the input")
    return jnp.asarray(given, jnp.result_type(int))
