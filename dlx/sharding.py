"""How a state and its batches lie on devices: a mesh, rules, and global arrays.

A mesh always has three axes. `data` and `fsdp` split the batch; `fsdp` also splits the state;
`tensor` splits whatever a rule says. Model files know nothing of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlx.errors import BadInput

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split a batch
SMALL = 1024  # leaves with fewer elements are replicated: splitting them costs more than it saves


def make_mesh(spec: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh (data, fsdp, tensor) from text like ``"data=4,fsdp=2"``; empty: all on `data`.

    Raises:
      BadInput: an unknown axis, a size that is no positive number, or sizes whose product is
        not the number of devices.

    >>> dict(make_mesh("fsdp=1", jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = dict.fromkeys(AXES, 1)
    if not spec:
        sizes["data"] = len(devices)
    named = []
    for part in filter(None, spec.split(",")):
        axis, _, size = (x.strip() for x in part.partition("="))
        named.append(axis)
        if named.count(axis) > 1:
            raise BadInput(f"mesh {spec!r} names the axis {axis} twice: give each axis one size")
        if axis not in AXES:
            raise BadInput(f"mesh axis {axis!r} is unknown: the axes are {', '.join(AXES)}")
        if not size.isdecimal() or int(size) < 1:
            raise BadInput(f"mesh size {part!r} is no positive number: write {axis}=2")
        sizes[axis] = int(size)
    if spec and not named:
        raise BadInput(f"mesh {spec!r} names no axis: write it like data=4,fsdp=2")
    if math.prod(sizes.values()) != len(devices):
        shape = " x ".join(f"{a}={n}" for a, n in sizes.items())
        raise BadInput(
            f"mesh {shape} needs {math.prod(sizes.values())} devices and there are "
            f"{len(devices)} ({devices[0].platform}): change --mesh"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def path_of(path: Any) -> str:
    """A leaf's path as rules and messages see it: ``opt_state/0/mu/dense/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_key(x: Any) -> bool:
    """Whether an array holds PRNG keys."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def shardings(abstract: Any, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = ()) -> Any:
    """A NamedSharding for every leaf of a state.

    The first rule whose regular expression is found in the leaf's path decides. Optimizer state
    and EMA carry their parameter's path as the end of their own, so they follow it. Without a
    rule the largest dimension that `fsdp` divides is split over it. Keys and leaves of fewer
    than 1,024 elements are replicated.

    Raises:
      BadInput: a rule that matches nothing, or that does not fit the rank or the sizes of its
        leaf (a leaf of the optimizer, like adafactor's factors, then takes the default).
    """
    used = set()
    for regex, rule in rules:
        axes = [a for part in rule for a in (part if isinstance(part, tuple) else (part,)) if a]
        for a in axes:
            if a not in mesh.shape or axes.count(a) > 1:
                what = "is used twice" if a in mesh.shape else "is unknown"
                raise BadInput(
                    f"the sharding rule {regex!r}: axis {a!r} {what} in {rule}; the axes are "
                    f"{', '.join(mesh.shape)}, each once"
                )

    def fits(spec: PartitionSpec, shape: tuple[int, ...]) -> bool:
        if len(spec) > len(shape):
            return False
        for size, axes in zip(shape, spec, strict=False):
            names = axes if isinstance(axes, tuple) else (axes,)
            if size % math.prod(mesh.shape[a] for a in names if a is not None):
                return False
        return True

    def default(shape: tuple[int, ...]) -> PartitionSpec:
        n = mesh.shape["fsdp"]
        for d in sorted(range(len(shape)), key=lambda d: -shape[d]):
            if n > 1 and shape[d] % n == 0:
                return PartitionSpec(*("fsdp" if i == d else None for i in range(len(shape))))
        return PartitionSpec()

    def one(path: Any, leaf: Any) -> NamedSharding:
        name, shape = path_of(path), tuple(leaf.shape)
        spec = None
        for regex, candidate in rules:
            if re.search(regex, name):
                used.add(regex)
                spec = candidate
                break
        small = math.prod(shape) < SMALL or is_key(leaf)
        if small:
            spec = PartitionSpec()
        elif spec is None:
            spec = default(shape)
        elif not fits(spec, shape):
            if "opt_state" not in name.split("/"):
                sizes = ", ".join(f"{a}={n}" for a, n in mesh.shape.items())
                raise BadInput(
                    f"{name} of shape {shape} cannot be split by {spec} on the mesh {sizes}: "
                    "change the rule or the mesh"
                )
            spec = default(shape)
        return NamedSharding(mesh, spec)

    out = jax.tree_util.tree_map_with_path(one, abstract)
    for regex, _ in rules:
        if regex not in used:
            raise BadInput(f"the sharding rule {regex!r} matches no leaf: correct its path")
    return out


def place(abstract: Any, mesh: Mesh, rules: Sequence[tuple[str, PartitionSpec]] = ()) -> Any:
    """The shapes of a state, each with its sharding: what init makes and a restore fills."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract,
        shardings(abstract, mesh, rules),
    )


def rows(mesh: Mesh) -> Callable[[int], slice | np.ndarray]:
    """global batch size -> the rows of the global batch that this process feeds.

    Raises:
      BadInput: the batch does not divide over the devices that share it.
    """

    def of(batch: int) -> slice | np.ndarray:
        if jax.process_count() == 1:
            return slice(0, batch)
        _check_divides(batch, mesh)
        return np.concatenate([np.arange(a, b) for a, b in _spans(batch, mesh)])

    return of


def _spans(batch: int, mesh: Mesh) -> list[tuple[int, int]]:
    """The parts of a global batch that lie on devices of this process, in order, each once."""
    place = NamedSharding(mesh, PartitionSpec(BATCH))
    found = place.addressable_devices_indices_map((batch,)).values()
    return sorted({index[0].indices(batch)[:2] for index in found if index})


def whole(batch: Any, mesh: Mesh, lead: int = 0) -> Any:
    """The shapes of the global arrays that `put` makes of this process's rows."""
    if jax.process_count() == 1:
        return batch
    n = shares(mesh)
    part = len(_spans(n, mesh))

    def one(x: Any) -> jax.ShapeDtypeStruct:
        shape = list(np.shape(x))
        if len(shape) > lead:
            shape[lead] = shape[lead] * n // part
        return jax.ShapeDtypeStruct(tuple(shape), jax.dtypes.canonicalize_dtype(x.dtype))

    return jax.tree.map(one, batch)


def straight(mesh: Mesh) -> bool:
    """Whether NumPy arrays go into a step's call as they are: on one CPU device there is nowhere to
    bring them, and an array around each costs more than a small step has."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def placed(batch: Any, mesh: Mesh) -> Any:
    """The shapes of a global batch, each with the sharding that `put` gives it."""
    shapes = jax.eval_shape(lambda x: x, batch)
    if straight(mesh):
        return shapes
    place = NamedSharding(mesh, PartitionSpec(BATCH))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)


def put(batch: Any, mesh: Mesh, lead: int = 0) -> Any:
    """Host arrays -> global arrays split over `data` and `fsdp` along dimension `lead`; on one CPU
    device they stay as they are (`straight`).

    Args:
      batch: the rows of the global batch that `rows` gives to this process, in that order.

    Raises:
      BadInput: the batch does not divide over the devices that share it.
    """
    if straight(mesh):
        return batch
    place = NamedSharding(mesh, PartitionSpec(*[None] * lead, BATCH))

    def whole_here(x: Any) -> jax.Array:
        if not isinstance(x, np.ndarray):
            return jax.device_put(x, place)
        # The same of device_put costs three times as much of the interpreter, which the loop needs.
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
        return jax.make_array_from_callback(x.shape, place, x.__getitem__)

    if jax.process_count() == 1:
        return jax.tree.map(whole_here, batch)

    def one(x: np.ndarray, all_rows: jax.ShapeDtypeStruct) -> jax.Array:
        n = all_rows.shape[lead]
        held = np.arange(n)[rows(mesh)(n)]

        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[lead].indices(n)
            at = int(np.searchsorted(held, begin))
            rows_there = x[(*index[:lead], slice(at, at + end - begin))]
            return rows_there.astype(all_rows.dtype, copy=False)

        return jax.make_array_from_callback(all_rows.shape, place, part)

    return jax.tree.map(one, batch, whole(batch, mesh, lead))


def fetch(x: jax.Array) -> np.ndarray:
    """A global array as a host array, in every process; all of them must ask."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def shares(mesh: Mesh) -> int:
    """Into how many parts the mesh splits a batch."""
    return math.prod(mesh.shape[a] for a in BATCH)


def check_batch(batch: Any, mesh: Mesh) -> int:
    """The number of examples in a global batch, which must divide over the mesh.

    Raises:
      BadInput: it does not divide, a leaf has no leading dimension, or leaves disagree.
    """
    shapes = {path_of(p): np.shape(x) for p, x in jax.tree_util.tree_leaves_with_path(batch)}
    for name, shape in shapes.items():
        if not shape:
            raise BadInput(f"batch leaf {name} is a scalar: its first dimension must be the batch")
    sizes = {shape[0] for shape in shapes.values()}
    if len(sizes) > 1:
        raise BadInput(f"batch leaves disagree on the batch size: {shapes}"[:200])
    size = sizes.pop() if sizes else 0
    _check_divides(size, mesh)
    return size


def _check_divides(size: int, mesh: Mesh) -> None:
    if size % shares(mesh):
        raise BadInput(
            f"a batch of {size} does not divide over data x fsdp = {shares(mesh)} devices: "
            f"use a multiple of {shares(mesh)}, or another --mesh"
        )
