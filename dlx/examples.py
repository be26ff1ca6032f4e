"""What training and evaluation read: arrays of one length, or a source of example after example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from dlx.errors import BadInput

_NARROW = {  # as JAX does
    np.dtype(wide): np.dtype(narrow)
    for wide, narrow in (("int64", "int32"), ("uint64", "uint32"), ("float64", "float32"))
}


def opened(given: Any) -> Any:
    """What was given, or what it opens where it is a function."""
    return given() if callable(given) and not hasattr(given, "__getitem__") else given


def table(arrays: Any, name: str) -> dict[str, np.ndarray]:
    """The arrays as they came; lists become arrays.

    Args:
      arrays: {name: (N, ...)}.
      name: of them all, for the message.

    Raises:
      BadInput: no dict, empty, ragged, of several lengths or no numbers.

    >>> table({"x": [1, 2]}, "it")
    {'x': array([1, 2])}
    """
    if not isinstance(arrays, Mapping):
        raise BadInput(f"{name} is a {type(arrays).__name__}: give {{name: array}}")
    found = {key: _asarray(values, f"{name}: {key}") for key, values in arrays.items()}
    for key, values in found.items():
        if not values.ndim:
            kind = "scalar" if _is_number(values.dtype) else type(arrays[key]).__name__
            raise BadInput(f"{name}: {key} is a {kind}: it must have a row an example")
    lengths = {k: len(v) for k, v in found.items()}
    if len(set(lengths.values())) > 1:
        raise BadInput(f"{name}: arrays differ in length ({lengths}): each needs a row an example")
    if not any(lengths.values()):
        raise BadInput(f"{name} is empty: it needs at least one example")
    for key, values in found.items():
        if values.dtype == object:
            raise BadInput(f"{name}: {key} has dtype object (ragged rows?): make it one array")
        if not _is_number(values.dtype):
            raise BadInput(f"{name}: {key} has dtype {values.dtype}: it must be numbers")
    return found


def source(given: Any, name: str) -> Any:
    """What was given, if it has a length and gives example i as `given[i]`.

    Args:
      name: of it, for the message.

    Raises:
      BadInput: it has not, or is empty.
    """
    kind = type(given).__name__
    if isinstance(given, Mapping):
        keys = ", ".join(map(str, given))[:60]
        raise BadInput(f"{name} is a {kind} of {keys}: give one split, or arrays to arrays.batches")
    if not (hasattr(given, "__getitem__") and hasattr(given, "__len__")):
        raise BadInput(f"{name} is a {kind}: it needs len(source) and source[i]")
    if not len(given):
        raise BadInput(f"{name} is empty: it needs at least one example")
    return given


def stack(examples: Iterable[Any], n: int, name: str) -> dict[str, np.ndarray]:
    """n examples, each as in `numbers`, as arrays {name: (n, ...)}.

    Raises:
      BadInput: an example is no dict of numbers, or differs from the first.

    >>> stack(iter([{"x": 1}, {"x": 2}]), 2, "two")
    {'x': array([1, 2], dtype=int32)}
    """
    out: dict[str, np.ndarray] = {}
    for row, example in enumerate(examples):
        found = numbers(example, f"{name}: example {row}")
        out = out or empty(n, found)
        put(out, row, found, f"{name}: example {row}")
    return out


def empty(n: int, like: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Room for n examples like this one: {name: (n, ...)}."""
    return {key: np.empty((n, *value.shape), value.dtype) for key, value in like.items()}


def put(out: dict[str, np.ndarray], row: int, example: Mapping[str, np.ndarray], name: str) -> None:
    """Writes an example into a row of `out`.

    Raises:
      BadInput: it has other names, shapes or dtypes than the rows.
    """
    if example.keys() != out.keys():
        raise BadInput(
            f"{name}, has {', '.join(map(str, example))} and the first example has "
            f"{', '.join(map(str, out))}: give all the same names"
        )
    for key, value in example.items():
        rows = out[key]
        if value.shape != rows.shape[1:] or value.dtype != rows.dtype:
            raise BadInput(
                f"{name}: {key} is {value.dtype}{list(value.shape)} and in the first example "
                f"{rows.dtype}{list(rows.shape[1:])}: make them alike in a transform"
            )
        rows[row] = value


def numbers(example: Any, name: str) -> dict[str, np.ndarray]:
    """An example as arrays that JAX takes as they are.

    Images of Pillow become (height, width, channels), numbers and lists arrays, and 64 bits 32.

    Args:
      example: {name: array, image, number or list of numbers}.
      name: of the example, for the message.

    Raises:
      BadInput: it is no dict, or a value is ragged, no number or too large for 32 bits.

    >>> numbers({"x": [1, 2], "y": 0.5}, "it")
    {'x': array([1, 2], dtype=int32), 'y': array(0.5, dtype=float32)}
    """
    if not isinstance(example, Mapping) or not example:
        what = "an empty dict" if isinstance(example, Mapping) else f"a {type(example).__name__}"
        raise BadInput(f"{name}, is {what}: give a transform that returns {{name: array}}")
    return {key: _array(value, f"{name}: {key}") for key, value in example.items()}


def _array(value: Any, name: str) -> np.ndarray:
    picture = hasattr(value, "getbands")  # an image of Pillow
    if picture and value.mode == "P":
        value = value.convert("RGB")  # else indices into a palette
    array = _asarray(value, name)
    if picture and array.ndim == 2:
        array = array[..., None]
    if not _is_number(array.dtype):
        kind = type(value).__name__ if array.dtype == object else array.dtype
        raise BadInput(f"{name} is {kind}, no number: leave it out or encode it in a transform")
    narrow = _NARROW.get(array.dtype)
    if narrow is None:
        return array
    if array.dtype.kind != "f" and array.size:
        limits = np.iinfo(narrow)
        if array.min() < limits.min or array.max() > limits.max:
            raise BadInput(f"{name} does not fit {narrow}: make it smaller in a transform")
    return array.astype(narrow)


def _asarray(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as e:
        raise BadInput(f"{name} is ragged: make it one shape") from e


def _is_number(dtype: np.dtype) -> bool:
    if dtype.kind == "V":  # bfloat16 and its like, or no number
        return jnp.issubdtype(dtype, jnp.number)
    return dtype.kind in "biufc"
