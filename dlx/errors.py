"""The one error that is the user's to mend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class BadInput(ValueError):
    """A value that cannot work, said in one line that names the value and the fix.

    The command line prints the line and exits with 2; in a notebook it is an ordinary
    ``ValueError``.
    """


def check_ranges(
    config: Any,
    *,
    positive: Sequence[str] = (),
    not_negative: Sequence[str] = (),
    share: Sequence[str] = (),
) -> None:
    """Single values of a configuration, for its ``__post_init__``.

    Args:
      config: has the named attributes, each a number.
      positive: names of values above 0.
      not_negative: names of values of 0 or more.
      share: names of values in [0, 1): rates, smoothing, decays.

    Raises:
      BadInput: a value is out of its range, infinite or NaN.
    """
    for name in positive:
        if not 0 < getattr(config, name) < math.inf:
            raise BadInput(f"{name} is {getattr(config, name)}: it must be positive")
    for name in not_negative:
        if not 0 <= getattr(config, name) < math.inf:
            raise BadInput(f"{name} is {getattr(config, name)}: it must be 0 or more")
    for name in share:
        if not 0 <= getattr(config, name) < 1:
            raise BadInput(f"{name} is {getattr(config, name)}: it must be in [0, 1)")
