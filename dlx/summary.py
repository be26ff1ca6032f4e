"""What a step is made of, from shapes alone: parameters, bytes and FLOPs. Nothing is compiled."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.extend import core as jex
from jax.interpreters import partial_eval

from dlx.experiment import Experiment, parameters


def flops(jaxpr: jex.Jaxpr) -> tuple[int, bool]:
    """(FLOPs of matrix products and convolutions, whether that is exact).

    A multiply-add counts two. The body of a scan counts once a turn (XLA's own cost analysis
    counts it once); of a cond the dearest branch counts. The number of turns of a while loop is
    unknown: it counts once and the result is no longer exact. What no output needs does not count.

    >>> import jax.numpy as jnp
    >>> def f(x):
    ...     return jax.lax.scan(lambda c, _: (c @ x, None), x, length=10)[0]
    >>> flops(jax.make_jaxpr(f)(jnp.ones((4, 4))).jaxpr)
    (1280, True)
    """
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _count(jaxpr)


def _count(jaxpr: jex.Jaxpr) -> tuple[int, bool]:
    total, exact = 0, True
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        ins: Any = [v.aval for v in eqn.invars]
        outs: Any = [v.aval for v in eqn.outvars]
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            depth = math.prod(ins[0].shape[d] for d in contract)
            total += 2 * outs[0].size * depth
        elif name == "conv_general_dilated":
            total += _convolution(eqn)
        elif name == "cond":
            branches = [flops(b.jaxpr) for b in params["branches"]]
            platforms = params.get("branches_platforms") or ()
            if None in platforms:  # `jax.lax.platform_dependent`: its default is the plain form
                branches = [branches[platforms.index(None)]]
            total += max(n for n, _ in branches)
            exact &= all(e for _, e in branches)
        else:
            turns = params["length"] if name == "scan" else 1
            inner = [_count(j) for j in _jaxprs(params)]
            total += turns * sum(n for n, _ in inner)
            exact &= all(e for _, e in inner) and (name != "while" or not any(n for n, _ in inner))
    return total, exact


def _jaxprs(params: dict[str, Any]) -> list[jex.Jaxpr]:
    out = []
    for value in params.values():
        for v in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(v, jex.ClosedJaxpr):
                out.append(v.jaxpr)
            elif isinstance(v, jex.Jaxpr):
                out.append(v)
    return out


def _convolution(eqn: Any) -> int:
    """Each output is a product over the kernel's window and its input features; of a dilated
    input (the gradient of a strided convolution) only the places that are not holes count."""
    kernel, dims = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    window = math.prod(kernel[d] for d in dims[2:]) * kernel[dims[1]]
    holes = math.prod(eqn.params["lhs_dilation"])
    return 2 * eqn.outvars[0].aval.size * window // holes


def summary(experiment: Experiment, batch: Any, given: Any = None) -> str:
    """A table of the state's arrays, then totals.

    Args:
      batch: one batch, or its shapes.
      given: see `dlx.fit`.
    """
    state = jax.eval_shape(experiment.init, jax.random.key(0), given)
    leaves = [
        (jax.tree_util.keystr(p, simple=True, separator="/"), x)
        for p, x in jax.tree_util.tree_leaves_with_path(state)
    ]
    weights = [(n, x) for n, x in leaves if "params" in n.split("/")]
    shown = weights or leaves
    width = max([len(n) for n, _ in shown] + [10])
    lines = [f"{'array':{width}}  {'shape':>18}  {'dtype':>9}  {'numbers':>13}"]
    for name, x in shown:
        shape = " x ".join(map(str, x.shape)) or "scalar"
        lines.append(f"{name:{width}}  {shape:>18}  {x.dtype!s:>9}  {x.size:13,}")
    n, exact = flops(jax.make_jaxpr(experiment.step)(state, batch).jaxpr)
    examples = {x.shape[0] for x in jax.tree.leaves(batch) if x.shape}
    each = f" ({n / examples.pop():,.0f} an example)" if len(examples) == 1 else ""
    lines += [
        "",
        f"parameters      {parameters(state):,}",
        f"state           {_bytes(x for _, x in leaves)} (parameters, statistics, optimizer, keys)",
        f"gradients       {_bytes(x for _, x in weights)}",
        f"FLOPs a step    {n:,}{each}{'' if exact else ', and more: a while loop counts once'}",
    ]
    return "\n".join(lines)


def _bytes(arrays: Any) -> str:
    n = sum(x.size * x.dtype.itemsize for x in arrays)
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:,.1f} {unit}" if unit != "bytes" else f"{n} bytes"
        n /= 1000
    raise AssertionError
