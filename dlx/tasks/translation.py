"""The Experiment of a network that turns one sequence into another: what several would write
alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dlx import metrics, pictures, sharding
from dlx.data import pairs
from dlx.errors import BadInput
from dlx.experiment import Experiment
from dlx.models import seq2seq
from dlx.step import make_step, train_state
from dlx.tasks import beam


class Words(Protocol):
    """A vocabulary, as people need it."""

    def decode(self, tokens: Sequence[int]) -> str: ...

    def pieces(self, tokens: Sequence[int]) -> list[str]: ...


class Corpus(NamedTuple):
    """What there is to learn, opened."""

    arrays: Mapping[str, pairs.Arrays]
    """{"train", "validation", "test"}: as `dlx.data.pairs.pad` makes them."""

    lines: Mapping[str, tuple[Sequence[str], Sequence[str]]]
    """{"validation", "test"}: (sources, references) as text, in the order of the arrays."""

    source: Words
    target: Words


Score = Callable[[Sequence[str], Sequence[str]], Mapping[str, float]]


def experiment(
    model: Any,
    tx: optax.GradientTransformation,
    load: Callable[[], Corpus],
    *,
    start: int,
    end: int,
    score: Score,
    batch_size: int,
    seed: int,
    longest: int,
    lengths: Sequence[int] = (),
    beams: int = 1,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    clip_norm: float | None = None,
    ema: float | None = None,
    eval_batch: int = 256,
) -> Experiment:
    """Cross-entropy on pairs; validation by greedy search, test by greedy and by beam search.

    Args:
      model: a `dlx.models.seq2seq.Seq2Seq`.
      tx: optimizer.
      load: opens the data; called when it is first needed.
      start: the token before the first.
      end: the token behind the last.
      score: (what the network wrote, references) -> {metric: value}. The validation metrics are
        these and nll, in nats a token; the test's the same by beam search, and NAME_greedy.
      batch_size: pairs a step.
      seed: of the order of the pairs.
      longest: tokens at most that are written.
      lengths: see `by_length`.
      beams: of the search.
      alpha: of its score; see `dlx.tasks.beam`.
      label_smoothing: share of the target that is spread over all tokens.
      clip_norm: the gradient's largest norm.
      ema: decay of averaged parameters, which are then the ones that are evaluated.
      eval_batch: pairs an evaluation takes at once.
    """

    def init(key: jax.Array, given: Any) -> Any:
        one = np.ones((1, 1), np.int32)
        variables = model.init(key, one, np.ones(1, np.int32), one)
        return train_state(key, variables, tx, ema=ema is not None)

    def write(state: Any, batch: Any, beams: int) -> jax.Array:
        """-> the best sequence of each source, (B, longest)."""
        variables, source = state.variables, batch["source"]
        known, s = model.apply(variables, source, batch["source_length"], method="encode")
        known = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), known)

        def step(s: Any, token: jax.Array) -> tuple[jax.Array, Any]:
            logits, s, _ = model.apply(variables, known, s, token, method="step")
            return jax.nn.log_softmax(logits.astype(jnp.float32)), s

        first = jnp.full(len(source), start, jnp.int32)
        found = beam.search(
            step, s, first, beams=beams, length=longest, end=end, alpha=alpha if beams > 1 else 0.0
        )
        return found.tokens[:, 0]

    compiled = jax.jit(write, static_argnums=2)

    def written(state: Any, arrays: pairs.Arrays, beams: int) -> np.ndarray:
        """-> (N, longest)"""
        mesh = jax.sharding.get_mesh()
        shares = 1 if mesh.empty else sharding.shares(mesh)
        size = -(-min(eval_batch, len(arrays["source"])) // shares) * shares
        inputs, out = {k: arrays[k] for k in ("source", "source_length")}, []
        for batch, mask in metrics.padded(inputs, size):
            if not mesh.empty:
                held = sharding.rows(mesh)(size)
                batch = sharding.put({k: v[held] for k, v in batch.items()}, mesh)
            out.append(sharding.fetch(compiled(state, batch, beams))[mask > 0])
        return np.concatenate(out)

    def measure(state: Any, batch: Any) -> dict[str, Any]:
        before = seq2seq.shifted(batch["target"], start)
        logits, _ = model.apply(state.variables, batch["source"], batch["source_length"], before)
        nll, _ = seq2seq.cross_entropy(logits, batch["target"])  # (B, T)
        n = batch["target_length"]
        valid = seq2seq.within(n, nll.shape[1])
        return {"nll": (jnp.where(valid, nll, 0.0).sum(1) / n.astype(nll.dtype), n)}

    def evaluate(part: str) -> Callable[[Any], dict[str, float]]:
        nll = metrics.evaluator(measure, lambda: load().arrays[part], eval_batch)

        def evaluated(state: Any) -> dict[str, float]:
            corpus = load()

            def scored(beams: int) -> Mapping[str, float]:
                found = written(state, corpus.arrays[part], beams)
                text = [corpus.target.decode(row) for row in found.tolist()]
                return score(text, corpus.lines[part][1])

            greedy = scored(1)
            if part != "test":
                return {**nll(state), **greedy}
            more = {f"{name}_greedy": value for name, value in greedy.items()}
            return {**nll(state), **(scored(beams) if beams > 1 else greedy), **more}

        names = ["nll", *score(["a"], ["a"])]
        evaluated.names = lambda state: names  # type: ignore[attr-defined]
        return evaluated

    def attention(state: Any) -> np.ndarray:
        """What the network looked at while it translated the first sentences of validation."""
        corpus = load()
        few = {k: v[:4] for k, v in corpus.arrays["validation"].items()}
        tokens = written(state, few, 1)
        _, alpha = aligned(state, few, tokens)
        alpha, shown = sharding.fetch(alpha), []
        for i, row in enumerate(tokens.tolist()):
            T = row.index(end) + 1 if end in row else len(row)
            S = int(few["source_length"][i])
            source = corpus.source.pieces(few["source"][i, :S].tolist())
            shown.append((source, corpus.target.pieces(row[:T]), alpha[i, :T, :S]))
        return draw(shown)

    @jax.jit
    def aligned(state: Any, batch: Any, tokens: jax.Array) -> Any:
        before = seq2seq.shifted(tokens, start)
        return model.apply(state.variables, batch["source"], batch["source_length"], before)

    def sample(state: Any, key: jax.Array) -> str:
        """Sentences of the validation set, their references, and what the network makes of them."""
        corpus = load()
        sources, references = corpus.lines["validation"]
        seed = jax.random.key_data(key).tolist()
        chosen = np.random.default_rng(seed).permutation(len(sources))[:8]
        few = {k: v[chosen] for k, v in corpus.arrays["validation"].items()}
        lines = []
        for i, row in zip(chosen.tolist(), written(state, few, beams).tolist(), strict=True):
            ours = corpus.target.decode(row)
            lines += [sources[i], f"  ours: {ours}", f"  true: {references[i]}"]
        return "\n".join(lines)

    def check(batch: Mapping[str, Any]) -> None:
        """What `predict` is given, of which the target may be missing."""
        arrays = {k: np.asarray(v) for k, v in batch.items()}
        for known, other in (("source", "target"), ("source_length", "target_length")):
            arrays.setdefault(other, np.ones_like(arrays[known]))
        pairs.check(arrays, "inputs", (model.source, model.target))

    loss_fn = seq2seq.translation(model, start, label_smoothing=label_smoothing)
    step = make_step(loss_fn, tx, clip_norm=clip_norm, ema=ema)
    return Experiment(
        init=init,
        step=by_length(step, lengths) if lengths else step,
        data=pairs.batches(lambda: load().arrays["train"], batch_size, seed),
        evals={"validation": evaluate("validation")},
        test=evaluate("test"),
        pictures={"attention": attention},
        predict=lambda state, batch: write(state, batch, beams),
        sample=sample,
        check=check,
    )


def by_length(step: Callable[..., Any], lengths: Sequence[int]) -> Callable[..., Any]:
    """A step that computes on the shortest of some lengths that holds its batch.

    Batches keep one shape, so nothing is compiled anew; the step is compiled once for each of the
    lengths, and what is chosen at run time is which of them runs.

    Args:
      step: (state, batch) -> (state, metrics), of batches of `dlx.data.pairs`.
      lengths: in ascending order; the last one is that of the batches.

    Raises:
      BadInput: they are not in order, or the last is not the batches' length.
    """
    if list(lengths) != sorted(set(lengths)) or not lengths or lengths[0] < 1:
        raise BadInput(f"lengths are {tuple(lengths)}: give positive ones in ascending order")

    def chosen(state: Any, batch: Any) -> Any:
        width = max(batch[side].shape[1] for side in pairs.SIDES)
        if lengths[-1] != width:
            raise BadInput(f"the last of lengths is {lengths[-1]}: batches have {width} tokens")

        def cut(length: int) -> Callable[..., Any]:
            return lambda state, batch: step(
                state, {k: v[:, :length] if v.ndim == 2 else v for k, v in batch.items()}
            )

        longest = jnp.maximum(*(batch[f"{side}_length"].max() for side in pairs.SIDES))
        which = sum((longest > n).astype(jnp.int32) for n in lengths[:-1])
        return jax.lax.switch(which, [cut(n) for n in lengths], state, batch)

    return chosen


def draw(shown: Sequence[tuple[Sequence[str], Sequence[str], np.ndarray]]) -> np.ndarray:
    """Attention as pictures, one beside the other.

    Args:
      shown: (pieces of the source, pieces of the target, (T, S) weights) of each.
    """
    inch, left, top = 0.17, 1.1, 1.0
    widths = [left + inch * len(source) + 0.1 for source, _, _ in shown]
    width, height = sum(widths), top + inch * max(len(target) for _, target, _ in shown) + 0.1
    fig, x = pictures.figure(width, height), 0.0
    for (source, target, alpha), wide in zip(shown, widths, strict=True):
        T, S = alpha.shape
        bottom = height - top - inch * T
        place = ((x + left) / width, bottom / height, inch * S / width, inch * T / height)
        panel = fig.add_axes(place)
        panel.imshow(alpha, cmap="gray", vmin=0, vmax=1, aspect="auto")
        panel.xaxis.tick_top()
        panel.set_xticks(range(S), [plain(t) for t in source], rotation=90, fontsize=7)
        panel.set_yticks(range(T), [plain(t) for t in target], fontsize=7)
        panel.tick_params(length=0, pad=2)
        x += wide
    return pictures.array(fig)


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
