"""Characters of Shakespeare, one after the other, by an LSTM: nats a character, and new text.

Paper     Graves, "Generating Sequences With Recurrent Neural Networks", arXiv 1308.0850, section 3;
          the text of Karpathy, "The Unreasonable Effectiveness of Recurrent Neural Networks", 2015
Command   python -m experiments.shakespeare_lstm
          python -m experiments.shakespeare_lstm sample --sample.prompt "ROMEO:"
Hardware  2 CPU cores, 30 minutes; two of the record's runs had one core each, and took 54
Expected  1.419 nats a character on the last tenth (seeds 0 to 2), every character predicted from
          all before it; a modified Kneser-Ney 7-gram has 1.5165
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import optax

import dlx
from dlx.data import shakespeare
from dlx.errors import check_ranges
from dlx.models import ngram, rnn
from dlx.tasks import generate, language

CARD = {
    "system": "LSTM, characters",
    "paper": "Graves 2013",
    "data": "tiny Shakespeare, 1,003,854 / 111,540 characters",
    "metric": "test/loss",
    "unit": "nats a character",
    "higher_is_better": False,
    "target": 1.50,
    "bar": {"metric": "test/loss_kn7", "source": "modified Kneser-Ney 7-gram, full context"},
    "reported": None,  # the paper's text is another
    "time": "30 min",
    "notes": "Every character is predicted from all before it. Feng et al., arXiv 2410.01201, "
    "print 1.548 for a minGRU, 1.555 for a minLSTM and 1.547 for a Transformer (second-hand), and "
    "nanoGPT's README 1.4697 for a Transformer of 10.65 million parameters: means over pieces of "
    "at most 256 characters, each begun with no context. "
    "The runs of seeds 0 and 1 had one core each, side by side; seed 2 had both.",
}
GRAMS = 7  # of the counted model beside the network


@dataclasses.dataclass(frozen=True)
class Config:
    """An LSTM on the characters of tiny Shakespeare."""

    units: int = 512  # H of each layer, and of the embedding
    layers: int = 1  # one above the other
    dropout: float = 0.4  # rate before, between and after the layers
    train: language.Parts = "train+validation"  # characters: 948,084, or 1,003,854
    batch_size: int = 32  # parts of the text that are read side by side
    length: int = 128  # T, characters of a step: as far as a gradient goes back
    learning_rate: float = 3e-3  # peak of a warm-up and cosine schedule
    weight_decay: float = 0.01  # AdamW's
    clip_norm: float = 1.0  # longest gradient
    ema: float = 0.999  # decay of the averaged parameters that are evaluated
    sample: generate.Sampling = generate.Sampling()  # of the `sample` command
    run: dlx.Run = dlx.Run(steps=5000, log_every=50, eval_every=1000, save_every=500)

    def __post_init__(self):
        check_ranges(
            self,
            positive=("units", "layers", "batch_size", "length", "learning_rate", "clip_norm"),
            not_negative=("weight_decay",),
            share=("dropout", "ema"),
        )


PRESETS = {
    "laptop": Config(),
    "paper": Config(units=1000),  # the one layer of section 3.1
    "test": Config(
        16, 2, train="train", batch_size=8, length=16, ema=0.9,
        run=dlx.Run(steps=60, log_every=10, eval_every=20, save_every=20),
    ),
}  # fmt: skip


def build(config: Config) -> dlx.Experiment:
    model: Any = rnn.LanguageModel(
        len(shakespeare.CHARACTERS), config.units, config.layers, dropout=config.dropout
    )
    steps = config.run.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 20, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, weight_decay=config.weight_decay),
    )
    made = language.experiment(
        model,
        rnn.language(model),
        tx,
        shakespeare.load,
        batch_size=config.batch_size,
        length=config.length,
        seed=config.run.seed,
        begin="\n",
        sampling=config.sample,
        train=config.train,
        ema=config.ema,
    )
    return made._replace(test=functools.partial(test, made.test))


def test(evaluate, state):
    """The last tenth, read once; beside the network the counted model of all the rest."""
    found = shakespeare.load()
    learnt = np.concatenate([found.train, found.validation])
    V = len(found.vocabulary)
    orders = ngram.fit(learnt, V, GRAMS)
    text = np.concatenate([learnt[-GRAMS:], found.test])
    counted = -ngram.log_probabilities(orders, V, text, GRAMS).mean()
    return {**evaluate(state), "loss_kn7": float(counted)}


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
