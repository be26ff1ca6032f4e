"""Recurrent networks: `flax.linen.RNN` in a form that is fast on a CPU.

For an `LSTMCell`, `OptimizedLSTMCell`, `GRUCell` or `SimpleCell` in its standard form (sigmoid and
tanh, one dtype throughout, float32 or float64); whatever else it is given runs as flax has it.

- The inputs' products with their kernels do not wait for one another: one product before the loop.
- Within the loop everything is transposed, (units, batch): the long kernel is then the left side
  of the product, which XLA reads as it is. As the right side it is packed anew in every step:
  twice slower for 512 units and 32 sequences.
- The gradient is written by hand. The loop leaves the gradients of the gates, in the memory where
  the gates were, and the kernels' gradients are one product each after it.
- A GRU's gradient of what its state adds to n has an array of its own; in that of the values it is
  made from, XLA would copy all of them twice in every step (a language model of 512 units, 32 x 64
  tokens: 117 -> 102 ms a training step, 2 cores of an Intel Xeon, jax 0.12).
- The barriers keep XLA from computing an exponential in each of the places that need it.

Second derivatives are those that JAX makes of `_reference`, the same equations in `lax.scan`.
Reverse mode works to any order, and vmap; forward mode does not (jax.custom_vjp): `nn.plain()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.linen.recurrent import flip_sequences
from jax import lax

from dlx.nn.lowering import fits, inherited, on_cpu

barrier = lax.optimization_barrier


class Form(NamedTuple):
    """One cell's equations in arrays of (units, B), G of them one below the other.

    gates: names of its kernels, sigmoids first.
    forward: (a, m, n, *state) -> (gates, kept, state): a is the inputs' part of the gates with the
      biases, m the state's, n the bias within a product; `kept` serves the backward pass.
    backward: (gates, kept, state before, gradients of the state) -> (gradient of a, gradient of m
      where it differs from a's below the sigmoids, what of the state's gradient passes by m).
    """

    gates: tuple[str, ...]
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def _lstm(a: Any, m: Any, n: Any, h: Any, c: Any) -> Any:
    """h' = o tanh(c'), c' = f c + i g."""
    a, units = a + m, len(h)
    gates = [jax.nn.sigmoid(a[: 3 * units]), jnp.tanh(a[3 * units :])]
    gates = barrier(jnp.concatenate(gates))
    i, f, o, g = jnp.split(gates, 4)
    c = barrier(f * c + i * g)
    return gates, c, (barrier(o * jnp.tanh(c)), c)


def _lstm_backward(gates: Any, c: Any, before: Any, dh: Any, dc: Any) -> Any:
    i, f, o, g = jnp.split(gates, 4)
    tanh = jnp.tanh(c)
    dc = barrier(dc + dh * o * (1 - tanh * tanh))
    di, df, do = dc * g * i * (1 - i), dc * before[1] * f * (1 - f), dh * tanh * o * (1 - o)
    da = barrier(jnp.concatenate([di, df, do, dc * i * (1 - g * g)]))
    return da, None, (None, barrier(dc * f))


def _gru(a: Any, m: Any, n: Any, h: Any) -> Any:
    """h' = (1 - z) n + z h, where n = tanh(W x + b + r (U h + b'))."""
    units = len(h)
    gates = barrier(jax.nn.sigmoid(a[: 2 * units] + m[: 2 * units]))
    r, z = jnp.split(gates, 2)
    k = barrier(m[2 * units :] + n.reshape(-1, 1))
    n = barrier(jnp.tanh(a[2 * units :] + r * k))
    return jnp.concatenate([gates, n]), k, (barrier((1 - z) * n + z * h),)


def _gru_backward(gates: Any, k: Any, before: Any, dh: Any) -> Any:
    r, z, n = jnp.split(gates, 3)
    dn = dh * (1 - z) * (1 - n * n)
    dr, dz = dn * k * r * (1 - r), dh * (before[0] - n) * z * (1 - z)
    return barrier(jnp.concatenate([dr, dz, dn])), barrier(dn * r), (barrier(dh * z),)


def _simple(a: Any, m: Any, n: Any, h: Any) -> Any:
    """h' = tanh(W x + b + U h)."""
    h = barrier(jnp.tanh(a + m))
    return h, None, (h,)


def _simple_backward(gates: Any, k: Any, before: Any, dh: Any) -> Any:
    return barrier(dh * (1 - gates * gates)), None, (None,)


LSTM = Form(("i", "f", "o", "g"), _lstm, _lstm_backward)
FORMS = {
    linen.LSTMCell: LSTM,
    linen.OptimizedLSTMCell: LSTM,
    linen.GRUCell: Form(("r", "z", "n"), _gru, _gru_backward),
    linen.SimpleCell: Form(("",), _simple, _simple_backward),
}


class Weights(NamedTuple):
    """Of each gate wx (I, units) and wh (units, units); b (G units,); the GRU's inner bias n."""

    wx: tuple[jax.Array, ...]
    wh: tuple[jax.Array, ...]
    b: jax.Array
    n: jax.Array | None


def _weights(form: Form, params: Mapping[str, Any]) -> Weights:
    def all_of(side: str, leaf: str) -> tuple[jax.Array, ...]:
        return tuple(params[side + gate][leaf] for gate in form.gates)

    b = jnp.concatenate(all_of("h" if form is LSTM else "i", "bias"))
    n = params["hn"]["bias"] if "n" in form.gates else None
    return Weights(all_of("i", "kernel"), all_of("h", "kernel"), b, n)


def _at(x: jax.Array, t: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(x, t, 0, keepdims=False)


def _put(x: jax.Array, value: jax.Array, t: Any) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x, value, t, 0)


def _inputs(w: Weights, x: jax.Array) -> jax.Array:
    """(T, B, I) -> the gates' part that does not depend on the state, (T, G units, B)."""
    wx = barrier(jnp.concatenate(w.wx, -1))
    return barrier(jnp.dot(x, wx)).swapaxes(1, 2) + w.b.reshape(1, -1, 1)


def _reference(form: Form, every: bool, w: Weights, state: Any, x: jax.Array) -> Any:
    """As `scan`, in operations that JAX can derive again."""
    kernel = jnp.concatenate([k.T for k in w.wh])

    def step(state: Any, a: jax.Array) -> Any:
        _, _, state = form.forward(a, kernel @ state[0], w.n, *state)
        return state, state if every else state[:1]

    last, history = lax.scan(step, tuple(s.T for s in state), _inputs(w, x))
    history = tuple(s.swapaxes(1, 2) for s in history)
    return history if every else (*history, *(s.T for s in last[1:]))


def _forward(
    form: Form, every: bool, w: Weights, state: Any, x: jax.Array, save: bool = False
) -> Any:
    """As `scan`; with `save` -> (that, what `_backward` needs)."""
    x = barrier(x)
    a, kernel = _inputs(w, x), barrier(jnp.concatenate([k.T for k in w.wh]))
    start = tuple(s.T for s in state)
    empty = jnp.zeros((len(x) + 1, *start[0].shape), x.dtype)  # with the state before the first
    # Which parts of the state are kept for every step; of the others there is but the last.
    parts = len(start) if every or (save and form is LSTM) else 1
    history = tuple(empty.at[0].set(s) for s in start[:parts])
    kept = empty[1:] if save and "n" in form.gates else None

    def step(t: Any, carry: Any) -> Any:
        state, a, kept, history = carry
        gates, k, state = form.forward(_at(a, t), kernel @ state[0], w.n, *state)
        if save:
            a = _put(a, gates, t)
        if kept is not None:
            kept = _put(kept, k, t)
        history = tuple(_put(s, new, t + 1) for s, new in zip(history, state, strict=False))
        return state, a, kept, history

    last, a, kept, history = lax.fori_loop(0, len(x), step, (start, a, kept, history))
    h = history[0].swapaxes(1, 2)  # (T + 1, B, units)
    rest = (
        tuple(s[1:].swapaxes(1, 2) for s in history[1:]) if every else tuple(s.T for s in last[1:])
    )
    outputs = (h[1:], *rest)
    return (outputs, (w, x, a, kept, history, h)) if save else outputs


def _backward(form: Form, every: bool, saved: Any, gradients: Any) -> Any:
    """Gradients of `scan`'s results -> those of (weights, state, inputs)."""
    w, x, a, kept, history, h = saved
    given = tuple(g.swapaxes(1, 2) for g in (gradients if every else gradients[:1]))
    wh = barrier(jnp.concatenate(w.wh, -1))

    def step(i: Any, carry: Any) -> Any:
        t = len(x) - 1 - i
        state, a, dks = carry
        new = tuple(s + _at(g, t) for s, g in zip(state, given, strict=False))
        state = (*new, *state[len(new) :])
        # A copy of the gates, read but once: or XLA copies all of `a` before it writes there. As
        # it would copy `kept` if dk were written there, which does not wait for k to be read.
        gates, before = barrier(_at(a, t)), tuple(_at(s, t) for s in history)
        k = _at(history[1], t + 1) if form is LSTM else None if kept is None else _at(kept, t)
        da, dk, state = form.backward(gates, k, before, *state)
        a, dm = _put(a, da, t), da
        if dks is not None:
            dks, dm = _put(dks, dk, t), jnp.concatenate([da[: -len(dk)], dk])
        dh = wh @ dm
        return (dh if state[0] is None else state[0] + dh, *state[1:]), a, dks

    last = (
        tuple(g.T for g in gradients[1:])
        if not every
        else tuple(jnp.zeros_like(s[0]) for s in history[1:])
    )
    dks = None if kept is None else jnp.zeros_like(kept)
    state, a, dks = lax.fori_loop(0, len(x), step, ((jnp.zeros_like(history[0][0]), *last), a, dks))
    db, dn = a.sum((0, 2)), None
    da = a.swapaxes(1, 2)  # (T, B, G units)
    dm = da
    if dks is not None:
        dn, dk = dks.sum((0, 2)), dks.swapaxes(1, 2)
        dm = barrier(jnp.concatenate([da[..., : -dk.shape[-1]], dk], -1))
    over = ((0, 1), (0, 1)), ((), ())
    dwx = barrier(lax.dot_general(x, da, over))
    dwh = barrier(lax.dot_general(h[:-1], dm, over))
    dx = barrier(jnp.dot(da, jnp.concatenate(w.wx, -1).T))
    dwx, dwh = (tuple(jnp.split(d, len(form.gates), -1)) for d in (dwx, dwh))
    return Weights(dwx, dwh, db, dn), tuple(s.T for s in state), dx


def scan(form: Form, every: bool, w: Weights, state: Any, x: jax.Array) -> Any:
    """A cell over all steps.

    Args:
      form: of the cell.
      every: whether c, too, is wanted after every step.
      w: its weights.
      state: (h,) or (h, c), (B, units) each.
      x: (T, B, I).

    Returns:
      (h,) or (h, c): h (T, B, units), and c alike or, without `every`, the last, (B, units).
    """

    def plain(*args: Any) -> Any:
        return _reference(form, every, *args)

    @jax.custom_vjp
    def gradient(args: Any, saved: Any, dy: Any) -> Any:
        return _backward(form, every, saved, dy)

    def again(saved: Any, ddx: Any) -> Any:
        args, saved, dy = saved
        dargs, ddy = jax.vjp(lambda args, dy: jax.vjp(plain, *args)[1](dy), args, dy)[1](ddx)
        return dargs, jax.tree.map(jnp.zeros_like, saved), ddy

    gradient.defvjp(lambda *all: (gradient(*all), all), again)

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return _forward(form, every, *args)

    def run_saving(*args: Any) -> Any:
        y, saved = _forward(form, every, *args, save=True)
        return y, (args, saved)

    run.defvjp(run_saving, lambda saved, dy: gradient(*saved, dy))
    return run(w, state, x)


class RNN(linen.RNN):
    """`flax.linen.RNN`: its arguments, parameters and numbers.

    The fast form does not call the cell: `nn.intercept_methods` sees this layer alone.
    """

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any = None,
        init_key: Any = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """(*batch, T, I) -> outputs (*batch, T, units), or (carry, outputs): see flax.linen.RNN."""
        options = {
            "seq_lengths": seq_lengths,
            "return_carry": self.return_carry if return_carry is None else return_carry,
            "time_major": self.time_major if time_major is None else time_major,
            "reverse": self.reverse if reverse is None else reverse,
            "keep_order": self.keep_order if keep_order is None else keep_order,
        }
        cell: Any = self.cell
        form = FORMS.get(type(cell), LSTM)
        standard = (
            type(cell) in FORMS
            and fits(inputs)
            and not self.is_initializing()
            and cell.activation_fn is linen.tanh
            and getattr(cell, "gate_fn", linen.sigmoid) is linen.sigmoid
            and not getattr(cell, "residual", False)
            and not self.variable_axes
            and self.variable_broadcast == "params"
            and self.variable_carry is False
            and dict(self.split_rngs) == {"params": False}
            and "params" in cell.variables
        )
        if standard:
            time = 0 if options["time_major"] else inputs.ndim - 2
            batch = inputs.shape[:time] + inputs.shape[time + 1 : -1]
            whole = seq_lengths is None or not options["return_carry"] or len(batch) == 1
            carry = initial_carry
            if carry is None:
                key = jax.random.key(0) if init_key is None else init_key
                carry = cell.initialize_carry(key, (*batch, inputs.shape[-1]))
            params = meta.unbox(cell.variables["params"])
            dtypes = {a.dtype for a in jax.tree.leaves((params, carry, inputs))}
            dtypes |= {jnp.dtype(cell.dtype)} if cell.dtype else set()
            if (
                whole
                and len(dtypes) == 1
                and dtypes <= {jnp.dtype("float32"), jnp.dtype("float64")}
            ):
                free = cell.clone(parent=None, name=None)

                def plain(params: Any, carry: Any, inputs: jax.Array) -> Any:
                    rnn = linen.RNN(free, unroll=self.unroll, parent=None)
                    variables = {"params": {"cell": params}}
                    return rnn.apply(variables, inputs, initial_carry=carry, **options)

                def fast(params: Any, carry: Any, inputs: jax.Array) -> Any:
                    return _rnn(form, params, carry, inputs, **options)

                return on_cpu(fast, plain, params, carry, inputs)
        flax = inherited(linen.RNN)
        return flax(self, inputs, initial_carry=initial_carry, init_key=init_key, **options)


def _rnn(
    form: Form,
    params: Any,
    carry: Any,
    inputs: jax.Array,
    *,
    seq_lengths: jax.Array | None,
    return_carry: bool,
    time_major: bool,
    reverse: bool,
    keep_order: bool,
) -> Any:
    """What `flax.linen.RNN` does around its scan, on one batch axis and time first."""

    def flip(x: jax.Array) -> jax.Array:
        return flip_sequences(x, lengths, 1, time_major=True)  # pyright: ignore[reportArgumentType]

    x = inputs if time_major else jnp.moveaxis(inputs, -2, 0)
    batch = x.shape[1:-1]
    x = x.reshape(len(x), -1, x.shape[-1])  # (T, B, I)
    lengths = None if seq_lengths is None else seq_lengths.reshape(-1)
    state = (carry[1], carry[0]) if form is LSTM else (carry,)
    state = tuple(s.reshape(-1, s.shape[-1]) for s in state)
    every = return_carry and lengths is not None
    history = scan(form, every, _weights(form, params), state, flip(x) if reverse else x)
    y = flip(history[0]) if reverse and keep_order else history[0]
    y = y.reshape(len(y), *batch, -1)
    y = y if time_major else jnp.moveaxis(y, 0, -2)
    if not return_carry:
        return y
    if lengths is None:
        last = [history[0][-1], *history[1:]]
    else:
        last = [s[lengths - 1, jnp.arange(s.shape[1])] for s in history]
    last = [s.reshape(*batch, -1) for s in last]
    return ((last[1], last[0]) if form is LSTM else last[0]), y
