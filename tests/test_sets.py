"""Readers of the authors' files: found, verified, decoded; what is wrong is told in one line."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import struct
import tarfile
import threading
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest

import dlx
from dlx.data import cifar10, files, mnist, multi30k
from dlx.models import resnet

RANDOM = np.random.default_rng(0)
URLOPEN = urllib.request.urlopen
PARTS = {
    "train-images-idx3-ubyte": RANDOM.integers(0, 256, (30, 28, 28), np.uint8),
    "train-labels-idx1-ubyte": RANDOM.integers(0, 10, 30).astype(np.uint8),
    "t10k-images-idx3-ubyte": RANDOM.integers(0, 256, (10, 28, 28), np.uint8),
    "t10k-labels-idx1-ubyte": RANDOM.integers(0, 10, 10).astype(np.uint8),
}


def encode(x):
    """An IDX file, from its definition."""
    return struct.pack(f">HBB{x.ndim}I", 0, 8, x.ndim, *x.shape) + x.tobytes()


def nowhere(*args, **kwargs):
    raise OSError("tests do not download")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty data folder and no internet."""

    monkeypatch.setenv("DLX_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files.urllib.request, "urlopen", nowhere)
    mnist._load.cache_clear()
    cifar10._load.cache_clear()
    return tmp_path / "data"


@pytest.fixture
def small(home, monkeypatch):
    """A small set of the same layout."""
    folder = home / "mnist"
    folder.mkdir(parents=True)
    digests = {}
    for name, x in PARTS.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(encode(x)))
        digests[name] = hashlib.sha256(encode(x)).hexdigest()
    monkeypatch.setitem(mnist._SETS, "mnist", (*mnist._SETS["mnist"][:2], digests))
    monkeypatch.setattr(mnist, "VALIDATION", 5)
    return folder


def test_mnist(small):
    sets = mnist.load("mnist")
    assert {k: len(v["label"]) for k, v in sets.items()} == {
        "train": 25, "validation": 5, "test": 10,
    }  # fmt: skip
    image, label = PARTS["train-images-idx3-ubyte"], PARTS["train-labels-idx1-ubyte"]
    np.testing.assert_array_equal(sets["train"]["image"][..., 0], image[:25])
    np.testing.assert_array_equal(sets["validation"]["label"], label[25:])
    np.testing.assert_array_equal(sets["test"]["label"], PARTS["t10k-labels-idx1-ubyte"])
    assert sets["test"]["image"].shape == (10, 28, 28, 1)
    assert sets["test"]["label"].dtype == np.int32


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    "load, name", [(mnist.load, "mnist"), (lambda: mnist.load("fashion_mnist"), "fashion_mnist"),
                   (cifar10.load, "cifar10")]
)  # fmt: skip
def test_what_is_missing_is_told(load, name, home, monkeypatch):
    """The set, where it was looked for, the variable and the public address; nothing is left."""
    fashion = mnist._SETS["fashion_mnist"]
    monkeypatch.setitem(mnist._SETS, "fashion_mnist", (fashion[0], (), fashion[2]))
    with pytest.raises(dlx.BadInput) as e:
        load()
    text = one_line(e)
    assert text.startswith(f"{name}: ") and str(home / name) in text and "DLX_DATA_DIR" in text
    assert "http" in text
    assert not (home / name).exists()


def test_a_file_that_is_another_one(small):
    path = small / "train-images-idx3-ubyte.gz"
    wrong = PARTS["train-images-idx3-ubyte"].copy()
    wrong[3, 4, 5] ^= 1
    path.write_bytes(gzip.compress(encode(wrong)))
    with pytest.raises(dlx.BadInput, match=r"sha256.*get it anew") as e:
        mnist.load("mnist")
    assert str(path) in one_line(e)


@pytest.mark.parametrize("harm", [lambda b: b[:-20], lambda b: b"", lambda b: b"<html>"])
def test_a_file_that_cannot_be_read(harm, small):
    path = small / "train-images-idx3-ubyte.gz"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(dlx.BadInput, match="get it anew") as e:
        mnist.load("mnist")
    assert str(path) in one_line(e)


def test_another_header_of_gzip_is_the_same_file(small):
    """Packages strip name and time from it."""
    path = small / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), mtime=1))
    assert len(mnist.load("mnist")["train"]["label"]) == 25


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x0d\x01\0\0\0\1\0\0\0\0", b"\0\0\x08\x01\0\0\0\5\1"]
)
def test_what_is_no_idx(content):
    with pytest.raises(dlx.BadInput):
        mnist.idx(content, "file")


class Answers(http.server.BaseHTTPRequestHandler):
    """What a server may say instead of a file."""

    def do_GET(self):
        if self.path.endswith("garbage"):
            self.wfile.write(b"garbage\r\n\r\n")
            return
        self.send_response(200)
        if self.path.endswith("cut"):
            self.send_header("Content-Length", "100000")
        if self.path.endswith("chunk"):
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"ff\r\n<html>moved")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


@pytest.mark.parametrize("file", ["cut", "garbage", "chunk", "page", "page.gz", "page.tar.gz"])
def test_a_download_that_is_not_the_file_is_not_kept(file, server, home, monkeypatch):
    monkeypatch.setattr(files.urllib.request, "urlopen", URLOPEN)
    with pytest.raises(dlx.BadInput, match=f"some: {file} is in none of .* get it from {server}/"):
        files.find("some", file, f"{server}/{file}", "0" * 64)
    assert not [path for path in home.rglob("*") if path.is_file()]
    content = b"ff\r\n<html>moved"
    sha256 = hashlib.sha256(content).hexdigest()
    if file in ("page", "page.tar.gz"):
        path = files.find("some", file, f"{server}/{file}", sha256)
        assert path == home / "some" / file and path.read_bytes() == content


@pytest.mark.parametrize("load", [lambda: mnist.load("mnist"), cifar10.load, multi30k.load])
def test_a_folder_that_may_not_be_read(load, home, monkeypatch):
    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(dlx.BadInput, match=r"cannot be read \(Permission denied\): change") as e:
        load()
    assert str(home) in one_line(e)


@pytest.mark.parametrize("place", ["data/mnist", "data", "cache/dlx/data/mnist", "cache/dlx/mnist"])
def test_where_files_are_found(place, home, tmp_path):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"it")
    assert files.find("mnist", "file", "http://nowhere/file") == folder / "file"


def test_downloads_are_kept(home, monkeypatch):
    monkeypatch.setattr(files.urllib.request, "urlopen", lambda *a, **k: io.BytesIO(b"x" * 3000000))
    path = files.find("some", "file", "http://example.org/file")
    assert path == home / "some" / "file" and path.stat().st_size == 3000000
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    monkeypatch.undo()
    monkeypatch.setenv("DLX_DATA_DIR", str(home))
    assert files.find("some", "file", "http://example.org/file") == path


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10(packed, home, monkeypatch):
    """Laid out as the authors do: label, then the planes of red, green and blue."""
    image = RANDOM.integers(0, 256, (6, 4, 32, 32, 3), np.uint8)
    label = RANDOM.integers(0, 10, (6, 4)).astype(np.uint8)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    folder = home / "cifar10" / cifar10.FOLDER
    folder.mkdir(parents=True)
    for name, x, y in zip(names, image, label, strict=True):
        rows = np.concatenate([y[:, None], x.transpose(0, 3, 1, 2).reshape(4, -1)], 1)
        (folder / name).write_bytes(rows.tobytes())
        monkeypatch.setitem(cifar10._DIGESTS, name, hashlib.sha256(rows.tobytes()).hexdigest())
    if packed:
        with tarfile.open(home / "cifar10" / "cifar-10-binary.tar.gz", "w:gz") as tar:
            tar.add(folder, cifar10.FOLDER)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    monkeypatch.setattr(cifar10, "VALIDATION", 3)
    sets = cifar10.load()
    np.testing.assert_array_equal(
        sets["train+validation"]["image"], image[:5].reshape(20, 32, 32, 3)
    )
    np.testing.assert_array_equal(sets["test"]["label"], label[5])
    assert [len(sets[k]["label"]) for k in ("train", "validation")] == [17, 3]
    (folder / "data_batch_3.bin").unlink()
    cifar10._load.cache_clear()
    with pytest.raises(dlx.BadInput, match=r"data_batch_3.bin is missing: get .*http"):
        cifar10.load()


# ---- The real sets, where they are -------------------------------------------------------------


def real(load, name):
    try:
        return load()
    except dlx.BadInput as e:
        pytest.skip(f"{name} is not here: {e}")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_sets(name, monkeypatch):
    monkeypatch.setattr(files.urllib.request, "urlopen", nowhere)
    sets = real(lambda: mnist.load(name), name)
    assert [len(sets[k]["label"]) for k in ("train", "validation", "test")] == [55000, 5000, 10000]
    if name == "fashion_mnist":
        assert (np.bincount(sets["test"]["label"]) == 1000).all()


@pytest.mark.slow
def test_published_weights_score_as_published(monkeypatch, promoting):
    """ResNet-20 of the best known reproduction, 91.73 % on CIFAR-10's test images."""
    monkeypatch.setattr(files.urllib.request, "urlopen", nowhere)
    test = real(cifar10.load, "cifar10")["test"]
    path = Path(os.environ.get("DLX_DATA_DIR", "")) / "resnet_cifar10_weights"
    path /= "resnet20-12fca82f.npz"
    if not path.is_file():
        pytest.skip(
            f"{path.name} is not in DLX_DATA_DIR/resnet_cifar10_weights: convert "
            "https://github.com/akamaster/pytorch_resnet_cifar10's resnet20-12fca82f.th"
        )
    with np.load(path) as weights:
        variables = resnet.from_torch(weights)
    # As those weights were trained: the mean and deviation of ImageNet.
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    predict = jax.jit(lambda x: resnet.CifarResNet(20).apply(variables, x).argmax(-1))
    hits = 0
    for i in range(0, 10_000, 500):
        x = (test["image"][i : i + 500] / np.float32(255) - mean) / std
        hits += int((np.asarray(predict(x)) == test["label"][i : i + 500]).sum())
    assert hits == 9173
