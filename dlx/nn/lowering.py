"""Which form of an operation is compiled: the one for a CPU, or the plain one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax

# Part of the key of every jit cache: a function is traced anew where it changes.
_plain = jax.make_user_context(os.environ.get("DLX_PLAIN", "") not in ("", "0"))


def plain(yes: bool = True) -> Any:
    """``with dlx.nn.plain():`` every layer is exactly flax's, on a CPU too.

    For a whole process: the environment variable ``DLX_PLAIN=1``. The plain forms have what the
    fast ones lack (forward-mode derivatives), and are what to compare with.
    """
    return _plain(yes)


def is_plain() -> bool:
    """Whether the switch is on."""
    return bool(_plain.value)


def on_cpu(fast: Callable[..., Any], plain: Callable[..., Any], *args: Any) -> Any:
    """fast(*args) in what is lowered for a CPU, plain(*args) on every other platform."""
    if is_plain():
        return plain(*args)
    return jax.lax.platform_dependent(*args, cpu=fast, default=plain)
