"""Which form of an operation is compiled: the one for a CPU, or the plain one."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType

# Part of the key of every jit cache: a function is traced anew where it changes.
_plain = jax.make_user_context(os.environ.get("DLX_PLAIN", "") not in ("", "0"))


def plain(yes: bool = True) -> Any:
    """``with dlx.nn.plain():`` every layer is exactly flax's, on a CPU too.

    For a whole process: the environment variable ``DLX_PLAIN=1``. The plain forms have what the
    fast ones lack (forward-mode derivatives, `jax.linear_transpose`), and are what to compare with.
    The switch is a thread's own.
    """
    return _plain(yes)


def is_plain() -> bool:
    """Whether the switch is on."""
    return bool(_plain.value)


def fits(*arrays: Any) -> bool:
    """Whether fast forms may stand in for plain ones on these: the switch is off, every size is a
    number above 0, and no axis of a mesh is explicit or manual (`jax.shard_map`), for there types
    say how arrays are split, and gradients written by hand would have to say it too."""
    if is_plain():
        return False
    types = {kind for a in arrays for kind in jax.typeof(a).sharding.mesh.axis_types}
    types |= set(jax.sharding.get_abstract_mesh().axis_types)
    return not types & {AxisType.Explicit, AxisType.Manual} and all(
        isinstance(n, int) and n > 0 for a in arrays for n in a.shape
    )


def spread(x: jax.Array) -> bool:
    """Whether x may lie on several devices: its mesh has them. Then it is not worked on a few
    examples at a time, for every turn of such a loop would exchange data; and jax 0.10 keeps
    exchanges within a loop and outside in no common order, so that CPU devices wait for each
    other until XLA ends the process."""
    meshes = jax.typeof(x).sharding.mesh, jax.sharding.get_abstract_mesh()
    return any(mesh.size > 1 for mesh in meshes)


def inherited(layer: type) -> Callable[..., Any]:
    """flax's own ``layer.__call__`` for a subclass's: called as ``super().__call__`` it would be
    one more call to flax's interceptors and captured intermediates."""
    return inspect.unwrap(layer.__call__)


def on_cpu(fast: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    """fast(*args) in what is lowered for a CPU, plain(*args) on every other platform."""
    if is_plain():
        return plain(*args)
    return jax.lax.platform_dependent(*args, cpu=fast, default=plain)
