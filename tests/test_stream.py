"""Data beyond memory: one order for all sources, whatever reads them; prepared sets by name."""

import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import dlx
from dlx import examples, metrics
from dlx.data import arrays, files, mnist, stream, tfds
from tests import test_sets

ROOT = Path(__file__).parents[1]
N = 23
ARRAYS = {
    "image": np.random.default_rng(0).integers(0, 256, (N, 3, 4, 1), np.uint8),
    "label": np.arange(N, dtype=np.int32),
}
LIST = [{k: v[i] for k, v in ARRAYS.items()} for i in range(N)]


def everything(n):
    return slice(0, n)


@pytest.fixture(autouse=True)
def threads():
    """Whatever a test does, no thread that reads outlives it."""
    yield
    assert reading() == []


def reading():
    return [t.name for t in threading.enumerate() if t.name.startswith("grain")]


def take(data, n, first=0, rows=everything):
    it = data(first, rows)
    try:
        return [next(it) for _ in range(n)]
    finally:
        it.close()


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert a[k].dtype == b[k].dtype
            np.testing.assert_array_equal(a[k], b[k])


def noisy(example, rng):
    """Some numbers of the generator beside the example."""
    return {**example, "noise": rng.normal(size=3), "turn": rng.integers(0, 1000)}


# ---- The order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 1, 3, None])
@pytest.mark.parametrize("batch_size", [1, 4, 7, N])
def test_the_order_is_that_of_arrays(batch_size, threads):
    """Over several epochs, with batches that straddle two."""
    n = 3 * N // batch_size + 2
    wanted = take(arrays.batches(ARRAYS, batch_size, 5), n)
    same(take(stream.batches(LIST, batch_size, 5, threads=threads), n), wanted)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 1000])
def test_a_stream_from_any_step_is_the_tail_of_the_whole(start):
    data = stream.batches(LIST, 4, 5, noisy)
    whole = take(data, min(start, 6) + 6)
    if start < 1000:
        same(take(data, 6, start), whole[start : start + 6])
    else:
        same(take(data, 3, start + 3), take(data, 6, start)[3:])


@pytest.mark.parametrize("threads", [0, 2])
def test_several_processes_feed_the_batch_of_one(threads):
    """A process's rows may be a slice, an array of indices in any order, or none."""
    data = stream.batches(LIST, 6, 5, noisy, threads)
    whole = take(data, 9, 2)
    a = take(data, 9, 2, lambda n: slice(0, n // 2))
    b = take(data, 9, 2, lambda n: np.array([5, 3, 4]))
    none = take(data, 9, 2, lambda n: np.arange(0))
    for w, x, y, z in zip(whole, a, b, none, strict=True):
        for k in w:
            np.testing.assert_array_equal(np.concatenate([x[k], y[k][[1, 2, 0]]]), w[k])
            assert z[k].shape == (0, *w[k].shape[1:]) and z[k].dtype == w[k].dtype


def test_a_transform_draws_by_seed_and_position():
    """Not by thread, not by batch, not by the example: its second time it is another one."""
    runs = [take(stream.batches(LIST, 6, 5, noisy, threads), 12) for threads in (0, 1, 4)]
    same(runs[1], runs[0])
    same(runs[2], runs[0])

    def laid(batches, key):
        return np.concatenate([b[key] for b in batches])[:66]

    others = take(stream.batches(LIST, 11, 5, noisy), 6)
    np.testing.assert_array_equal(laid(others, "noise"), laid(runs[0], "noise"))
    assert len(np.unique(laid(runs[0], "noise"), axis=0)) == 66
    seeds = take(stream.batches(LIST, 6, 6, noisy), 11)
    assert not np.isin(laid(seeds, "noise"), laid(runs[0], "noise")).any()
    position = np.random.Philox(key=[5, 7], counter=[0, 0, 0, 1])
    wanted = np.random.Generator(position).normal(size=3).astype(np.float32)
    np.testing.assert_array_equal(runs[0][1]["noise"][1], wanted)


def test_sources_are_opened_with_the_stream():
    opened = []

    def source():
        opened.append(1)
        return LIST

    data = stream.batches(source, 4, 5)
    assert not opened
    same(take(data, 3), take(stream.batches(LIST, 4, 5), 3))
    assert opened == [1]


def test_it_trains():
    """The loop takes it as it takes arrays, and the run is the same."""

    def init(key, given):
        return np.zeros((), np.float32)

    def step(w, batch):
        mean = batch["label"].astype(np.float32).mean()
        return w + 0.1 * (mean - w), {"distance": abs(w - mean)}

    def train(data):
        return dlx.fit(dlx.Experiment(init, step, data), dlx.Run(steps=12), writers=[])[0]

    assert train(stream.batches(LIST, 8, 0)) == train(arrays.batches(ARRAYS, 8, 0))


# ---- What reads ahead --------------------------------------------------------------------------


class Slow:
    """Examples that take a while; notes what was asked for."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        self.asked.append(i)
        time.sleep(0.01)
        return {"x": i}


def test_closing_ends_the_threads_within_a_batch():
    before, source = set(threading.enumerate()), Slow()
    it = stream.batches(source, 100, 0, threads=3)(0, everything)
    next(it)
    assert set(threading.enumerate()) - before
    start = time.monotonic()
    it.close()
    assert time.monotonic() - start < 0.5  # a batch takes a second
    assert set(threading.enumerate()) <= before
    asked = len(source.asked)
    time.sleep(0.05)
    assert len(source.asked) == asked
    with pytest.raises(StopIteration):
        next(it)


def test_nothing_reads_before_the_first_batch_is_asked_for():
    source = Slow()
    it = stream.batches(source, 10, 0, threads=2)(0, everything)
    time.sleep(0.05)
    assert len(source.asked) == 1  # the example that the others must resemble
    it.close()


def test_it_reads_ahead_one_batch_a_thread():
    source = Slow()
    it = stream.batches(source, 2, 0, threads=2)(0, everything)
    next(it)
    time.sleep(0.3)
    assert 1 + 2 * 3 >= len(source.asked) > 1 + 2
    it.close()


def test_an_error_of_the_source_says_where_and_ends_the_threads():
    def broken(example, rng):
        if example["label"] == 3:
            raise OSError("disk")
        return example

    it = stream.batches(LIST, 4, 5, broken, 2)(0, everything)
    with pytest.raises(OSError, match="disk") as e:
        [next(it) for _ in range(6)]
    assert any("example 3, position" in note for note in e.value.__notes__)
    assert reading() == []


# ---- Examples ----------------------------------------------------------------------------------


def test_numbers_become_those_of_jax():
    palette = PIL.Image.new("P", (4, 3))
    palette.putpalette([10, 20, 30])
    example = {
        "float": 0.5, "int": 7, "bool": True, "list": [1, 2], "floats": [[1.0, 2.0]],
        "int64": np.int64(3), "float64": np.float64(0.1), "uint8": np.uint8(1),
        "float16": np.float16(2), "int16": np.zeros(2, np.int16),
        "grey": PIL.Image.new("L", (4, 3)), "colour": PIL.Image.new("RGB", (4, 3)),
        "palette": palette,
    }  # fmt: skip
    found = examples.numbers(example, "it")
    assert {k: (str(v.dtype), v.shape) for k, v in found.items()} == {
        "float": ("float32", ()), "int": ("int32", ()), "bool": ("bool", ()),
        "list": ("int32", (2,)), "floats": ("float32", (1, 2)),
        "int64": ("int32", ()), "float64": ("float32", ()), "uint8": ("uint8", ()),
        "float16": ("float16", ()), "int16": ("int16", (2,)),
        "grey": ("uint8", (3, 4, 1)), "colour": ("uint8", (3, 4, 3)),
        "palette": ("uint8", (3, 4, 3)),
    }  # fmt: skip
    assert found["palette"][0, 0].tolist() == [10, 20, 30]


def picture(i):
    return PIL.Image.fromarray(ARRAYS["image"][i, ..., 0])


class Rows:
    """What a dataset of Hugging Face does: rows as dicts of Python's values and images."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        assert type(i) is int
        return {"image": picture(i), "label": i}


def test_rows_of_python_values_and_pictures():
    same(take(stream.batches(Rows(), 5, 1), 8), take(arrays.batches(ARRAYS, 5, 1), 8))


def test_a_dataset_of_hugging_face():
    datasets = pytest.importorskip("datasets", reason="needs Hugging Face's: pip install datasets")
    import pyarrow

    def png(i):
        file = io.BytesIO()
        picture(i).save(file, "png")
        return {"bytes": file.getvalue(), "path": None}

    features = {"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=N)}
    features = datasets.Features(features)
    columns = {"image": [png(i) for i in range(N)], "label": list(range(N))}
    # Not by `from_dict`: it pickles parts of pyarrow, which not every version of it bears.
    table = pyarrow.table(columns, schema=features.arrow_schema)
    table, info = datasets.table.InMemoryTable(table), datasets.DatasetInfo(features=features)
    rows = datasets.Dataset(table, info, fingerprint="1")
    assert isinstance(rows[0]["image"], PIL.Image.Image)
    same(take(stream.batches(rows, 5, 1), 8), take(arrays.batches(ARRAYS, 5, 1), 8))
    with pytest.raises(dlx.BadInput, match="DatasetDict of train"):
        take(stream.batches(datasets.DatasetDict(train=rows), 5, 1), 1)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and ": " in text
    return text


def changed(**values):
    """The example 3 is another one."""
    return [{**x, **values} if i == 3 else x for i, x in enumerate(LIST)]


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    ("source", "batch_size", "words"),
    {
        "empty": ([], 4, ["empty"]),
        "no source": (7, 4, ["int", "len(source)"]),
        "an iterator": (iter(LIST), 4, ["iterator", "len(source)"]),
        "arrays": (ARRAYS, 4, ["dict of image, label", "arrays.batches"]),
        "too large a batch": (LIST, 24, ["24", "23"]),
        "no batch": (LIST, 0, ["batch_size 0"]),
        "no dict": ([1, 2, 3], 2, ["int", "transform"]),
        "an empty dict": ([{}], 1, ["empty dict", "transform"]),
        "another shape": (changed(image=np.zeros((2, 4, 1), np.uint8)), 4,
                          ["example 3, position", "image", "[2, 4, 1]", "[3, 4, 1]"]),
        "another dtype": (changed(label=0.5), 4, ["example 3, position", "float32", "int32"]),
        "another name": (changed(extra=1), 4, ["example 3, position", "extra"]),
        "one that is none": ([*LIST[:3], None, *LIST[4:]], 4, ["example 3, position", "NoneType"]),
        "ragged": (changed(image=[[1], [1, 2]]), 4, ["example 3, position", "image", "ragged"]),
        "text": (changed(label="cat"), 4, ["example 3, position", "label", "no number"]),
        "nothing": (changed(label=None), 4, ["example 3, position", "label", "NoneType"]),
        "too large": (changed(label=2**40), 4, ["example 3, position", "label", "int32"]),
    }.values(),
)  # fmt: skip
def test_what_is_wrong_is_told(source, batch_size, words, threads):
    with pytest.raises(dlx.BadInput) as e:
        take(stream.batches(source, batch_size, 5, threads=threads), 6)
    assert all(word in one_line(e) for word in words), e.value


def test_threads_are_not_negative():
    with pytest.raises(dlx.BadInput, match="threads is -1: "):
        take(stream.batches(LIST, 4, 5, threads=-1), 1)


@pytest.mark.parametrize(
    ("change", "words"),
    {
        "a column of labels": ({"label": np.zeros((N, 1), np.int32)}, "label has shape (23, 1): "),
        "one label for all": ({"label": np.int32(3)}, "label is a scalar: "),
        "labels as text": ({"label": np.full(N, "cat")}, "label has dtype <U3: "),
        "labels as floats": ({"label": np.zeros(N)}, "label has dtype float64: "),
        "no channels": ({"image": np.zeros((N, 3, 4), np.uint8)}, "image has shape (23, 3, 4): "),
    }.values(),
)
def test_arrays_of_a_wrong_shape_or_dtype(change, words):
    with pytest.raises(dlx.BadInput) as e:
        arrays.check({k: np.asarray(v) for k, v in {**ARRAYS, **change}.items()}, "some", N)
    assert words in one_line(e)


# ---- Prepared sets -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with sets of a name that tensorflow-datasets has never heard of.

    A process of its own prepares them, so that none is registered here.
    """
    folder = tmp_path_factory.mktemp("prepared")
    code = """
import sys
import numpy as np, PIL.Image
import tensorflow_datasets as tfds

class MySet(tfds.core.GeneratorBasedBuilder):
    def _info(self):
        features = {
            "grey": tfds.features.Image(shape=(5, 6, 1)),
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=7),
            "x": tfds.features.Tensor(shape=(3,), dtype=np.float32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(9)}

    def _generate_examples(self, n):
        for i in range(n):
            pixels = np.arange(90, dtype=np.uint8).reshape(5, 6, 3) + np.uint8(i)
            if i % 2:  # a PNG of grey pixels among those of colours
                image = PIL.Image.fromarray(pixels[..., 0])
            else:
                image = PIL.Image.fromarray(pixels)
            yield i, {
                "grey": PIL.Image.fromarray(pixels[..., 0]), "image": image,
                "label": (i + int(self.version.minor)) % 7, "x": np.full(3, i, np.float32),
            }

class MyConfigs(MySet):
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="small", description="Small.")]

for cls, version in (MySet, "1.9.0"), (MySet, "1.10.0"), (MyConfigs, "2.0.0"):
    cls.VERSION = tfds.core.Version(version)
    builder = cls(data_dir=sys.argv[1], file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def home(prepared, tmp_path, monkeypatch):
    """DLX_DATA_DIR; nothing is anywhere else."""
    monkeypatch.setenv("DLX_DATA_DIR", str(prepared))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "theirs"))
    return prepared


def pixels(i):
    return np.arange(90, dtype=np.uint8).reshape(5, 6, 3) + np.uint8(i)


def test_a_set_that_nobody_has_heard_of(home, capfd):
    source = tfds.source("my_set", "train")
    assert len(source) == 40
    seen = set()
    for k in range(len(source)):
        example = source[k]
        i = int(example["x"][0])
        seen.add(i)
        assert example["x"].tolist() == [i] * 3 and example["label"] == (i + 10) % 7
        np.testing.assert_array_equal(example["grey"], pixels(i)[..., :1])
        wanted = np.repeat(pixels(i)[..., :1], 3, -1) if i % 2 else pixels(i)
        np.testing.assert_array_equal(example["image"], wanted)
    assert seen == set(range(40))
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")


def test_it_is_streamed_in_the_one_order(home):
    source = tfds.source("my_set", "train")
    whole = examples.stack((source[i] for i in range(40)), 40, "whole")
    wanted = take(arrays.batches(whole, 12, 3), 7)
    same(take(stream.batches(lambda: tfds.source("my_set", "train"), 12, 3), 7), wanted)


@pytest.mark.parametrize(
    ("name", "split", "n", "first"),
    [
        ("my_set", "test", 9, 10), ("my_set:1.9.0", "test", 9, 9),
        ("my_set", "train[:25%]", 10, 10), ("my_configs/small", "train", 40, 0),
        ("my_configs/small:2.0.0", "test", 9, 0),
    ],
)  # fmt: skip
def test_names_and_splits(name, split, n, first, home):
    """Of several versions the newest: 1.10 is above 1.9."""
    source = tfds.source(name, split)
    assert len(source) == n
    assert (source[0]["label"] - source[0]["x"][0]) % 7 == first % 7


@pytest.mark.parametrize(
    "place", ["data", "data/tensorflow_datasets", "cache", "cache/dlx", "theirs"]
)
def test_where_sets_are_found(place, home, tmp_path, monkeypatch):
    where = tmp_path / {"cache": "cache/dlx/data"}.get(place, place)
    shutil.copytree(home / "my_set" / "1.9.0", where / "my_set" / "1.9.0")
    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path / "data"))
    assert len(tfds.source("my_set", "test")) == 9
    with pytest.raises(dlx.BadInput):
        tfds.source("my_set", "test", data_dir=tmp_path)
    assert len(tfds.source("my_set", "test", data_dir=where)) == 9


def test_a_small_set_as_arrays(home):
    found = tfds.arrays("my_set", "test")
    assert {k: (v.shape, str(v.dtype)) for k, v in found.items()} == {
        "grey": ((9, 5, 6, 1), "uint8"), "image": ((9, 5, 6, 3), "uint8"),
        "label": ((9,), "int32"), "x": ((9, 3), "float32"),
    }  # fmt: skip
    assert sorted(found["x"][:, 0]) == list(range(9))


@pytest.mark.parametrize(
    ("name", "split", "words"),
    [
        ("nowhere", "train", ["nowhere is not prepared", "DLX_DATA_DIR", "array_record", "theirs",
                              "https://tensorflow.org/datasets/catalog/nowhere"]),
        ("my_set", "test[:0]", ["my_set: the split 'test[:0]' is empty"]),
        ("my_set:3.0.0", "train", ["my_set:3.0.0 is not prepared", "has 1.10.0, 1.9.0"]),
        ("my_configs", "train", ["my_configs is not prepared", "my_configs/CONFIG", "small"]),
        ("../my_set", "train", ["'../my_set' is no name"]),
        ("", "train", ["'' is no name"]),
        ("my_set", "validation", ["my_set has no split 'validation'", "train", "test"]),
        ("my_set", "train[:x]", ["my_set has no split 'train[:x]'"]),
    ],
)  # fmt: skip
def test_what_is_not_there_is_told(name, split, words, home):
    with pytest.raises(dlx.BadInput) as e:
        tfds.source(name, split)
    assert all(word in one_line(e) for word in words), e.value


def test_the_line_of_a_missing_set_is_short(monkeypatch):
    """The command line cuts what has 200 characters or more."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DLX_DATA_DIR", "/data")
    for name in ("XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(dlx.BadInput, match=r"in /data, /home/me/.cache/dlx, /home/me/t\w+: ") as e:
        tfds.source("imagenet2012", "train")
    assert len(f"error: {one_line(e)}") < 200


def test_a_folder_of_sets_that_may_not_be_read(home, monkeypatch):
    def refused(self, pattern):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "glob", refused)
    with pytest.raises(dlx.BadInput, match=r"my_set cannot be read \(Permission denied\): ") as e:
        tfds.source("my_set", "train")
    assert str(home) in one_line(e)


def harmed(harm):
    """A file of records -> the same with this harm."""

    def change(path):
        content = path.read_bytes()
        middle = len(content) // 2
        if harm == "missing":
            path.unlink()
        elif harm == "cut off":
            path.write_bytes(content[:middle])
        elif harm == "an image":  # its PNG; the record as such is whole
            from array_record.python import array_record_module as records

            reader = records.ArrayRecordReader(str(path))
            rows = reader.read_all()
            reader.close()
            writer = records.ArrayRecordWriter(str(path), "group_size:1")
            for row in rows:
                writer.write(row.replace(b"IDAT", b"iDOT"))
            writer.close()
        else:
            path.write_bytes(bytes(200) + content[200:])

    return change


@pytest.mark.parametrize("harm", ["missing", "cut off", "its head", "an image"])
def test_a_damaged_set_is_told(harm, home, tmp_path, monkeypatch):
    """In training and in evaluation, whichever example comes first."""
    folder = tmp_path / "data" / "my_set" / "1.9.0"
    shutil.copytree(home / "my_set" / "1.9.0", folder)
    (records,) = folder.glob("*-train.array_record*")
    harmed(harm)(records)
    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path / "data"))
    source = tfds.source("my_set", "train")
    evaluate = metrics.evaluator(lambda state, batch: {"x": batch["label"]}, source, 40)
    for read in (lambda: take(stream.batches(source, 40, 5), 1), lambda: evaluate(None),
                 lambda: tfds.arrays("my_set", "train")):  # fmt: skip
        with pytest.raises(dlx.BadInput, match=r"^my_set \(train\): example \d+ cannot be") as e:
            read()
        assert one_line(e).endswith(f"prepare {folder} anew")


def test_a_set_in_another_format_is_told(home, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "my_set" / "1.9.0"
    shutil.copytree(home / "my_set" / "1.9.0", folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(dlx.BadInput, match=r"it is tfrecord\).*file_format='array_record'") as e:
        tfds.source("my_set", "train")
    assert str(folder) in one_line(e)


def test_the_own_builder(tmp_path, monkeypatch):
    """The pattern to copy, on a few images of the authors' format."""
    from dlx.data import tfds_fashion

    folder, digests = tmp_path / "data" / "fashion_mnist", {}
    folder.mkdir(parents=True)
    for name, x in test_sets.PARTS.items():
        content = test_sets.encode(x)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        digests[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setitem(mnist._SETS, "fashion_mnist", ("http://nowhere/", (), digests))
    monkeypatch.setattr(mnist, "VALIDATION", 5)
    monkeypatch.setattr(files.urllib.request, "urlopen", test_sets.nowhere)
    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path / "data"))
    mnist._load.cache_clear()
    with monkeypatch.context() as patch, pytest.raises(dlx.BadInput, match="fashion_mnist: ") as e:
        patch.setenv("DLX_DATA_DIR", str(tmp_path / "empty"))
        tfds_fashion.prepare()
    one_line(e)
    try:
        home = tfds_fashion.prepare()
        assert home == tmp_path / "data" / "fashion_mnist_idx" / "1.0.0"
        assert tfds_fashion.prepare() == home  # is there already
        for split, part in mnist.load("fashion_mnist").items():
            found = tfds.arrays("fashion_mnist_idx", split)

            def rows(batch):
                pairs = zip(batch["image"], batch["label"], strict=True)
                return sorted((x.tobytes(), int(y)) for x, y in pairs)

            assert rows(found) == rows(part)
            assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in part.items()}
    finally:
        mnist._load.cache_clear()


# ---- Beyond memory -----------------------------------------------------------------------------

RECORDS, BYTES, BATCH = 50_000, 40_960, 250  # 2 GB

CHILD = """
import hashlib, json, re, resource, sys
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from dlx.data import stream

path, first, steps, lo, hi, size = sys.argv[1], *map(int, sys.argv[2:])

def decode(record, rng):
    return {"x": np.frombuffer(record, np.uint8), "noise": rng.integers(0, 2**31)}

data = stream.batches(lambda: ArrayRecordDataSource(path), size, 3, decode)
batches, digests, read = data(first, lambda n: slice(lo, hi)), [], 0
for _ in range(steps):
    batch = next(batches)
    read += batch["x"].nbytes
    rows = zip(batch["x"], batch["noise"])
    digests.append([hashlib.blake2b(x.tobytes() + y.tobytes(), digest_size=8).hexdigest()
                    for x, y in rows])
batches.close()
if sys.platform == "linux":  # where a child's ru_maxrss begins at what its parent takes
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on a Mac in bytes
print(json.dumps({"digests": digests, "peak": peak, "read": read}))
"""


@pytest.mark.slow
def test_two_gigabytes_in_less_than_one(tmp_path):
    """An epoch and more of a file that is twice the memory; resumed; fed by two processes."""
    if shutil.disk_usage(tmp_path).free < 2 * RECORDS * BYTES:
        pytest.skip("4 GB of free disk are needed")
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "random.array_record"
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    random = np.random.default_rng(0)
    pool = random.bytes(2**26)
    for start in random.integers(0, 2**26 - BYTES, RECORDS):
        writer.write(pool[start : start + BYTES])
    writer.close()
    assert path.stat().st_size > 2e9

    def start(first, steps, lo, hi):
        args = [sys.executable, "-c", CHILD, str(path), *map(str, (first, steps, lo, hi, BATCH))]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(args, stdout=subprocess.PIPE, text=True, env=env)

    def end(process):
        out, _ = process.communicate()
        assert process.returncode == 0
        return json.loads(out)

    try:
        epoch = RECORDS // BATCH
        whole = end(start(0, epoch + 5, 0, BATCH))
        assert whole["read"] > RECORDS * BYTES
        assert whole["peak"] < 1e9, f"{whole['peak']:,} bytes"
        laid = [x for digests in whole["digests"] for x in digests]
        assert len(set(laid)) == len(laid)  # no image twice with the same noise
        again = end(start(epoch - 5, 10, 0, BATCH))
        assert again["digests"] == whole["digests"][epoch - 5 :]
        half = BATCH // 2
        two = [start(epoch - 5, 10, 0, half), start(epoch - 5, 10, half, BATCH)]
        a, b = (end(process)["digests"] for process in two)
        assert [x + y for x, y in zip(a, b, strict=True)] == again["digests"]
    finally:
        path.unlink()
