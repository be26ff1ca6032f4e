"""What a call of a step takes and gives: state, log window and position, as lists of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dlx import metrics
from dlx.experiment import Run

Arrays = tuple[list[jax.Array], list[jax.Array]]


def packed(carry: tuple[Any, Any, Any]) -> tuple[Arrays, Callable, Callable]:
    """-> ((the state's arrays, the log window's and the position), pack, unpack): what a call takes
    and gives, and the way there and back.

    Dataclasses, named tuples and PRNG keys are put together by Python code, which an interrupt can
    come into. A list of arrays is not.
    """
    leaves, structure = jax.tree.flatten(carry)
    size = len(jax.tree.leaves(carry[0]))
    kinds = [
        jax.random.key_impl(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else None
        for x in leaves
    ]

    def pack(tree: Any) -> Arrays:
        pairs = zip(jax.tree.leaves(tree), kinds, strict=True)
        arrays = [jax.random.key_data(x) if kind else x for x, kind in pairs]
        return arrays[:size], arrays[size:]

    def unpack(arrays: Arrays) -> Any:
        pairs = zip([*arrays[0], *arrays[1]], kinds, strict=True)
        leaves = [jax.random.wrap_key_data(x, impl=kind) if kind else x for x, kind in pairs]
        return jax.tree.unflatten(structure, leaves)

    return pack(carry), pack, unpack


def compiled(
    step: Callable, run: Run, arrays: Arrays, pack: Callable, unpack: Callable
) -> tuple[Callable, Callable]:
    """(one step, `run.steps_per_call` steps): jitted (state, rest, batch) -> (state, rest), lists
    of arrays as `packed` makes them; the state is donated, the log window is not: it is read
    later."""
    places = jax.tree.map(lambda x: x.sharding, arrays)  # told, or the second call compiles again

    def jitted(fn: Callable) -> Callable:
        def advance(state, rest, batch):
            return pack(fn(*unpack((state, rest)), batch))

        return jax.jit(advance, donate_argnums=0, out_shardings=places)

    single = _advance(step, run.log_every)
    return jitted(single), jitted(_scanned(single, run.steps_per_call))


def _advance(step_fn: Callable, log_every: int) -> Callable:
    """(state, window, position, batch) -> the same after one step."""

    def advance(state, window, position, batch):
        state, values = step_fn(state, batch)
        return state, metrics.accumulate(window, values, position, log_every), position + 1

    return advance


def _scanned(advance: Callable, k: int) -> Callable:
    """K steps in one call; the leaves of `batches` are (K, B, ...)."""

    def several(state, window, position, batches):
        def body(carry, batch):
            return advance(*carry, batch), None

        return jax.lax.scan(body, (state, window, position), batches, length=k)[0]

    return several
