"""The Experiment of a recurrent language model: what several experiments would write alike."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from dlx import sharding
from dlx.data import text
from dlx.errors import BadInput
from dlx.experiment import Experiment
from dlx.step import make_step, train_state
from dlx.tasks import generate

Parts = Literal["train", "train+validation"]
CHUNK = 512  # tokens that an evaluation reads at once: it changes no figure


def experiment(
    model: Any,
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    load: Callable[[], text.Text],
    *,
    batch_size: int,
    length: int,
    seed: int | None,
    begin: str,
    sampling: generate.Sampling,
    train: Parts = "train",
    ema: float | None = None,
) -> Experiment:
    """Truncated back-propagation through time with the state carried on; the loss in nats a token
    and the perplexity of whole texts; text drawn token by token.

    The state that training carries is the model state of the step, {"state": ...}. It is part of
    every checkpoint, so that a run that resumes reads on where it stopped.

    Args:
      model: a linen module (tokens (B, T), state, train) -> (logits (B, T, V), state), with an
        attribute `vocabulary`, V.
      loss: what `make_step` takes; given {"state": ...} as the model state it goes on from there.
      tx: optimizer.
      load: opens the text; called when data is first needed.
      batch_size: B, parts of the text that are read side by side.
      length: T, tokens of a step: as far as a gradient goes back.
      seed: of where an epoch begins, see `dlx.data.text.streams`.
      begin: the token that stands before a text, for the first one to be predicted from.
      sampling: what `sample` draws.
      train: "train+validation" trains on both, and there is no evaluation then.
      ema: decay of averaged parameters, which are then the ones that are evaluated.
    """

    def opened() -> text.Text:
        found = load()
        if len(found.vocabulary) != model.vocabulary:
            raise BadInput(
                f"the vocabulary has {len(found.vocabulary):,} tokens and the network knows "
                f"{model.vocabulary:,}: this checkpoint belongs to another text"
            )
        return found

    def part(name: str) -> np.ndarray:
        found = opened()
        tokens = np.concatenate([getattr(found, p) for p in name.split("+")])
        return text.check(tokens, model.vocabulary, name)

    def evaluated(name: str) -> np.ndarray:
        before = opened().vocabulary.numbers[begin]
        return np.concatenate([np.array([before], np.int32), part(name)])

    def apply(params: Any, tokens: jax.Array, carried: Any) -> tuple[jax.Array, Any]:
        return model.apply({"params": params}, tokens, carried)

    def init(key: jax.Array, given: Any) -> Any:
        variables = model.init(key, jnp.zeros((1, 1), jnp.int32))
        carried = zero_state(apply, variables["params"], batch_size)
        return train_state(key, {**variables, "state": carried}, tx, ema=ema is not None)

    def loss_fn(params: Any, model_state: Any, batch: Mapping[str, jax.Array], key: Any) -> Any:
        def kept(s: jax.Array) -> jax.Array:
            return jnp.where(batch["begins"][:, None], jnp.zeros_like(s), s)

        return loss(params, jax.tree.map(kept, model_state), batch, key)

    def sample(state: Any, key: jax.Array) -> str:
        vocabulary = opened().vocabulary
        options = dataclasses.asdict(sampling)
        del options["prompt"]
        key = jax.random.fold_in(key, options.pop("seed"))
        prompt = vocabulary.encode(sampling.prompt) if sampling.prompt else np.zeros(0, np.int32)
        first = np.array([vocabulary.numbers[begin]], np.int32)
        tokens = np.concatenate([first, prompt])[None]  # (1, P)
        drawn = jax.jit(
            lambda params: generate.generate(
                functools.partial(apply, params), tokens, key=key, **options
            )
        )(parameters(state))  # (1, length)
        return vocabulary.decode([*prompt.tolist(), *sharding.fetch(drawn)[0].tolist()])

    evals = {}
    if train == "train":
        evals["validation"] = whole(apply, functools.partial(evaluated, "validation"))
    return Experiment(
        init=init,
        step=make_step(loss_fn, tx, ema=ema),
        data=text.streams(functools.partial(part, train), batch_size, length, seed),
        evals=evals,
        test=whole(apply, functools.partial(evaluated, "test")),
        # As the rows of the batch lie.
        rules=((r"^model_state/", PartitionSpec(sharding.BATCH)),),
        predict=lambda state, tokens: apply(parameters(state), tokens, None)[0],
        sample=sample,
        check=lambda tokens: text.check(np.ravel(tokens), model.vocabulary, "tokens"),
    )


def parameters(state: Any) -> Any:
    return state.params if state.ema is None else state.ema


def zero_state(apply: Callable[..., Any], params: Any, batch_size: int) -> Any:
    """What a network of B rows carries before it has read anything."""
    _, shapes = jax.eval_shape(apply, params, jnp.zeros((batch_size, 1), jnp.int32), None)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def whole(
    apply: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    tokens: Callable[[], np.ndarray],
    chunk: int = CHUNK,
) -> Callable[[Any], dict[str, float]]:
    """state -> {"loss": nats a token, "perplexity": its exponential} of a whole text, in which
    every token is predicted from all that stand before it: the state is carried through.

    Args:
      apply: (parameters, tokens (1, T), carried state or None) -> (logits (1, T, V), state).
      tokens: opens N + 1 integers; the first is only read, and N are predicted.
      chunk: tokens read at once; the last ones are padded and not counted.
    """

    @jax.jit
    def part(params: Any, carried: Any, window: Any, n: Any) -> tuple[jax.Array, Any]:
        logits, carried = apply(params, window[:, :-1], carried)  # (1, T, V)
        if logits.dtype != jnp.float64:
            logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])[0]  # (T,)
        counted = jnp.arange(len(loss), dtype=n.dtype) < n
        return jnp.where(counted, loss, jnp.zeros_like(loss)).sum(), carried

    def evaluate(state: Any) -> dict[str, float]:
        read, params, total = tokens(), parameters(state), 0.0
        if len(read) < 2:
            raise BadInput("the text to evaluate is empty: there is nothing to measure")
        carried = zero_state(apply, params, 1)
        for at in range(0, len(read) - 1, chunk):
            window = read[at : at + chunk + 1]
            n = len(window) - 1
            window = np.pad(window, (0, chunk - n))[None]  # (1, T + 1)
            loss, carried = part(params, carried, window, np.int32(n))
            total += float(loss)
        mean = total / (len(read) - 1)
        return {"loss": mean, "perplexity": float(np.exp(mean))}

    def names(state: Any) -> list[str]:
        """Opens the data, compiles nothing."""
        tokens()
        return ["loss", "perplexity"]

    evaluate.names = names  # type: ignore[attr-defined]
    return evaluate
