"""The rows of the benchmark: in each file the same models in dlx and in PyTorch, side by side.

A file has

- ``ROWS``: {name of the row: what it is, in a few words};
- ``WHY``: {row: why it is slower than it should be}, as a profile or another side shows it;
- ``ours(row) -> Ours``;
- ``theirs(row, wrap) -> Theirs``, whose networks' parts have the names of the flax parameters
  ("block0.conv1" for block0/conv1), so that the weights can be carried over. PyTorch is imported
  within it: the two sides may run in different Pythons.

Both sides take the same batch, a dict of NumPy arrays made from a fixed seed, with what is random
in a step (noise, say) among them, so that the losses of both can be compared. `theirs` gets it as
tensors, images as (B, C, H, W). Every step is forward, backward and update, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

BATCHES = 16  # that are read in turn


class Ours(NamedTuple):
    """init(key) -> state; step(state, batch) -> (state, {"loss": ...}); batch; and
    weights(state) -> {"params": ..., other collections}, for PyTorch's networks to start from.

    For the side "fit": augment(key, batch) -> batch, as the model's experiment has it; and data, as
    an Experiment has it, where its batches are not read from arrays."""

    init: Callable[..., Any]
    step: Callable[..., Any]
    batch: dict[str, Any]
    weights: Callable[..., Any] = lambda state: {"params": state.params} | state.model_state
    augment: Callable[..., Any] | None = None
    data: Callable[..., Any] | None = None


def in_bytes(batch: dict[str, Any]) -> Callable[..., Any]:
    """`Ours.data`: labels as in the batch, images as bytes, which is how the readers of dlx.data
    give them. `Ours.augment` makes numbers of them."""
    import numpy as np

    from dlx.data import arrays

    B, *shape = batch["image"].shape
    image = np.random.default_rng(0).integers(0, 256, (BATCHES * B, *shape), np.uint8)
    label = np.concatenate([batch["label"]] * BATCHES)
    return arrays.batches({"image": image, "label": label}, B, seed=0)


class Theirs(NamedTuple):
    """The network (a torch.nn.Module; several in a torch.nn.ModuleDict), and step(batch) -> loss.

    `wrap` (nothing, or torch.compile) must be called on what the step calls."""

    module: Any
    step: Callable[..., Any]
