"""Captions from English to German: bidirectional GRU, attention, byte pairs, beam search.

Paper     Bahdanau, Cho, Bengio, "Neural Machine Translation by Jointly Learning to Align and
          Translate", 2015; data: Elliott, Frank, Sima'an, Specia, "Multi30K", 2016
Command   python -m experiments.multi30k_seq2seq
          python -m experiments.multi30k_seq2seq --preset paper      (RNNsearch's sizes)
          python -m experiments.multi30k_seq2seq sample
Hardware  2 CPU cores, 75 minutes
Expected  a BLEU of 38.14 on test_2016_flickr (seed 0; sacrebleu, 13a, cased); greedy 36.29
"""

import dataclasses
import functools

import optax

import dlx
from dlx.data import bpe, multi30k, pairs
from dlx.errors import check_ranges
from dlx.models import seq2seq
from dlx.tasks import translation

CARD = {
    "system": "sequence to sequence with attention",
    "paper": "Bahdanau, Cho, Bengio 2015, arXiv 1409.0473",
    "data": "Multi30k English to German, 29,000 / 1,014 / 1,000 pairs, test_2016_flickr",
    "metric": "test/bleu",
    "unit": "BLEU",
    "higher_is_better": True,
    "target": 33.0,
    "bar": {"metric": "test/bleu_greedy", "source": "the same network, greedy search"},
    "also": {"chrF": "test/chrf", "nats a token": "test/nll"},
    "reported": None,  # the paper's data is another
    "time": "75 min",
    "packages": ["sacrebleu", "tokenizers"],  # whose versions the figure depends on
    "notes": "sacrebleu nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp, detokenised.",
}
SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"  # sacrebleu's, without its version


@dataclasses.dataclass(frozen=True)
class Config:
    """Captions from English to German."""

    vocabulary: int = 6000  # byte pairs of each language, learnt from its training side
    english: str = "43979962c94b"  # digest of the vocabulary; empty: any
    german: str = "3de5f915685a"  # the other's
    embed: int = 256  # width of an embedded token
    units: int = 256  # of the decoder, the attention, and each direction of the encoder
    dropout: float = 0.4  # rate of embedded tokens, annotations and the output layer
    label_smoothing: float = 0.1  # share of the target spread over all tokens
    batch_size: int = 128  # pairs a step
    lengths: tuple[int, ...] = (13, 16, 20, 26, 40)  # a step pads to one; longer are left out
    learning_rate: float = 1.5e-3  # Adam's, peak of a warm-up and cosine schedule
    clip_norm: float = 1.0  # the gradient's largest norm
    ema: float = 0.999  # decay of the averaged parameters that are evaluated
    beams: int = 8  # of the search
    alpha: float = 1.0  # how much the search favours the long
    run: dlx.Run = dlx.Run(
        steps=226 * 36, log_every=113, eval_every=226 * 2, save_every=226 * 2,
        picture_every=226 * 12, best=("validation/bleu", "max"),
    )  # fmt: skip

    def __post_init__(self):
        check_ranges(
            self,
            positive=("embed", "units", "batch_size", "learning_rate", "clip_norm", "beams"),
            not_negative=("alpha",),
            share=("dropout", "label_smoothing", "ema"),
        )
        if self.vocabulary < bpe.LEAST:
            raise dlx.BadInput(
                f"vocabulary is {self.vocabulary}: bytes and special tokens alone are {bpe.LEAST}"
            )
        if list(self.lengths) != sorted(set(self.lengths)) or min(self.lengths, default=0) < 2:
            raise dlx.BadInput(f"lengths are {self.lengths}: give some from 2 on, in order")


PRESETS = {
    "laptop": Config(),
    "paper": Config(embed=620, units=1000, batch_size=80, beams=12),
    "test": Config(
        vocabulary=300, english="", german="", embed=8, units=16, batch_size=32, lengths=(12, 48),
        ema=0.9, beams=2, run=dlx.Run(steps=30, log_every=10, eval_every=15, save_every=15),
    ),
}  # fmt: skip


def build(config: Config) -> dlx.Experiment:
    steps = config.run.steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 20, steps)
    V = config.vocabulary
    return translation.experiment(
        seq2seq.Seq2Seq(V, V, config.embed, config.units, config.dropout),
        optax.adam(schedule),
        functools.partial(
            load, V, (config.english, config.german), config.lengths[-1]
        ),
        start=bpe.START,
        end=bpe.END,
        score=scores,
        batch_size=config.batch_size,
        seed=config.run.seed,
        longest=60,
        lengths=config.lengths,
        beams=config.beams,
        alpha=config.alpha,
        label_smoothing=config.label_smoothing,
        clip_norm=config.clip_norm,
        ema=config.ema,
        eval_batch=128,
    )  # fmt: skip


def load(size: int, digests: tuple[str, str], limit: int) -> translation.Corpus:
    """Vocabularies of the training sides, and all three splits in them."""
    lines = multi30k.load()
    return _load(tuple(tuple(both.values()) for both in lines.values()), size, digests, limit)


@functools.lru_cache(maxsize=2)
def _load(lines, size, digests, limit):
    train, *rest = lines
    words = [bpe.train(side, size) for side in train]
    for vocabulary, digest, name in zip(words, digests, ("English", "German"), strict=True):
        vocabulary.check(digest, name)
    arrays = {}
    for name, both in zip(("train", "validation", "test"), lines, strict=True):
        tokens = [v.encode(side) for v, side in zip(words, both, strict=True)]
        padded = pairs.pad(*tokens, end=bpe.END, limit=limit if name == "train" else None)
        arrays[name] = pairs.check(padded, f"multi30k: {name}", (len(words[0]), len(words[1])))
    text = {"validation": rest[0], "test": rest[1]}
    return translation.Corpus(arrays, text, *words)


def scores(found, true):
    """BLEU and chrF of a corpus, as sacrebleu has them by default."""
    import sacrebleu

    bleu = sacrebleu.BLEU()
    out = {
        "bleu": bleu.corpus_score(found, [true]).score,
        "chrf": sacrebleu.CHRF().corpus_score(found, [true]).score,
    }
    if not str(bleu.get_signature()).startswith(SIGNATURE):
        raise dlx.BadInput(f"sacrebleu counts {bleu.get_signature()} and not {SIGNATURE}")
    return out


if __name__ == "__main__":
    dlx.main(Config, build, PRESETS)
