"""ResNet-50 of ImageNet: its published size, its step for accelerators, and a run on a prepared set
of JPEGs from the files to the mesh."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import dlx
from dlx import metrics, sharding, summary
from experiments import imagenet_resnet50 as imagenet
from tests.test_contract import assert_same, recorded

# ---- The paper's preset, from shapes -----------------------------------------------------------

IMAGES = jax.ShapeDtypeStruct((256, 224, 224, 3), np.uint8)
LABELS = jax.ShapeDtypeStruct((256,), np.int32)


def test_the_paper_s_preset_and_its_step_on_a_tpu(promoting):
    config = imagenet.PRESETS["paper"]
    experiment = imagenet.build(config)  # opens no data
    experiment = experiment._replace(step=jax.jit(experiment.step))  # traced once
    batch = {"image": IMAGES, "label": LABELS}
    mesh = dlx.make_mesh("data=4,fsdp=2")
    state = jax.eval_shape(experiment.init, jax.random.key(0), None)
    abstract = sharding.place(state, mesh, experiment.rules)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.BATCH))
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    after, values = jax.eval_shape(experiment.step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss", "accuracy", "grad_norm"} <= values.keys()
    text = experiment.step.trace(abstract, placed).lower(lowering_platforms=("tpu",)).as_text()
    assert "tensor<256x224x224x3xui8>" in text
    assert text.count("stablehlo.convolution") == 3 * 53 - 1  # the images need no gradient
    assert "optimization_barrier" not in text
    table = summary.summary(experiment, batch)
    assert "parameters      25,557,032\n" in table
    each = int(table.split("(")[-1].split()[0].replace(",", ""))  # FLOPs of an example
    assert 3 * 2 * 4.0e9 < each < 3 * 2 * 4.2e9  # 4.1 G multiply-adds (torchvision), and backward


def test_rates():
    """A tenth at 30, 60 and 80 of 90 epochs."""
    config = imagenet.PRESETS["paper"]
    assert config.run.steps == 90 * -(-1_271_167 // 256)
    falls = imagenet.falls(config.run.steps)
    assert sorted(x / 4966 for x in falls) == [30, 60, 80] and set(falls.values()) == {0.1}


# ---- Views -------------------------------------------------------------------------------------


def ramp(H, W):
    """An image whose red is its column and whose green is its row."""
    y, x = np.mgrid[:H, :W]
    return np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)


@pytest.mark.parametrize("H, W", [(64, 64), (64, 200), (200, 64)])
def test_the_centre(H, W):
    """7/8 of the short side about the middle, to the width of a pixel."""
    found = imagenet.centre_crop(imagenet.rgb(ramp(H, W)), 56).astype(float)
    assert found.shape == (56, 56, 3)
    for axis, length in ((0, W), (1, H)):  # red along the width, green along the height
        line = found[:, :, axis].mean(axis)
        np.testing.assert_allclose(line, (length - 56) / 2 + np.arange(56), atol=0.51)


@pytest.mark.parametrize("H, W", [(100, 100), (60, 240), (240, 60), (1, 1), (250, 2)])
def test_random_crops(H, W):
    """Within the image, 8 to 100 % of its area, 3:4 to 4:3, a function of the generator alone."""
    image, boxes = imagenet.rgb(ramp(H, W)), []

    def seen(image, box, size):
        boxes.append(box)
        return np.zeros((size, size, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet, "view", seen)
        for i in range(300):
            imagenet.some_crop(image, np.random.default_rng(i), 32)
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= W and bottom.max() <= H
    if min(H, W) >= 60:
        w, h = right - left, bottom - top
        assert (w * h / (W * H)).min() > 0.075 and (w * h / (W * H)).max() <= 1.0
        assert (w / h).min() > 0.72 and (w / h).max() < 1.39
        assert len(set(boxes)) > 250
    one, other = (imagenet.some_crop(image, np.random.default_rng(1), 32) for _ in range(2))
    assert one.shape == (32, 32, 3) and np.array_equal(one, other)


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class(label):
    config = imagenet.PRESETS["test"]
    source = [{"image": ramp(40, 40), "label": label}]
    with pytest.raises(dlx.BadInput, match=f"the label {label}: set --classes"):
        imagenet.Centred(source, config)[0]


# ---- Evaluation of what does not fit in memory -------------------------------------------------


class Rows:
    """Arrays as a source, which counts what is asked of it."""

    def __init__(self, arrays, broken=None):
        self.arrays, self.broken, self.asked = arrays, broken, []

    def __len__(self):
        return len(self.arrays["x"])

    def __getitem__(self, i):
        self.asked.append(i)
        if i == self.broken:
            raise OSError("on purpose")
        return {k: v[i] for k, v in self.arrays.items()}


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_a_source_is_evaluated_as_arrays_are(batch_size):
    """Each example read once, in order; the last batch is padded and masked."""
    arrays = {"x": np.random.default_rng(0).normal(size=(14, 3)).astype(np.float32)}
    source = Rows(arrays)
    pairs = zip(metrics.padded(source, batch_size), metrics.padded(arrays, batch_size), strict=True)
    for (one, mask), (other, wanted) in pairs:
        assert one["x"].shape == (batch_size, 3)
        np.testing.assert_array_equal(one["x"], other["x"])
        np.testing.assert_array_equal(mask, wanted)
    assert sorted(source.asked) == list(range(14))

    def measure(state, batch):
        return {"x": batch["x"].sum(-1)}

    evaluate = metrics.evaluator(measure, lambda: source, batch_size)
    assert evaluate(None) == metrics.evaluator(measure, arrays, batch_size)(None)
    source.asked.clear()
    assert evaluate.names(None) == ["x"]
    assert len(source.asked) <= 2  # shapes need no whole batch


def test_a_source_that_fails():
    source = Rows({"x": np.arange(9.0)}, broken=5)
    evaluate = metrics.evaluator(lambda state, batch: {"x": batch["x"]}, source, 2)
    with pytest.raises(OSError, match="on purpose"):
        evaluate(None)


# ---- A run from the files ----------------------------------------------------------------------


def jpegs(n, seed):
    """n JPEGs of smooth colours and many sizes; every fifth grey, and one in CMYK, as ImageNet has
    them."""
    random = np.random.default_rng(seed)
    for i in range(n):
        W, H = (int(x) for x in random.integers(40, 120, 2))
        small = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        image = small.resize((W, H), Image.Resampling.BICUBIC)
        image = image.convert("L" if i % 5 == 1 else "CMYK" if i == 3 else "RGB")
        content = io.BytesIO()
        image.save(content, "jpeg")
        content.seek(0)
        yield i, {"image": content, "label": i % 10}


class StrangeImages(tfds.core.GeneratorBasedBuilder):
    """A set that no registry has heard of, laid out as imagenet2012."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": jpegs(48, 0), "validation": jpegs(16, 1)}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    builder = StrangeImages(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return folder


@pytest.fixture
def config(prepared, monkeypatch):
    monkeypatch.setenv("DLX_DATA_DIR", str(prepared))
    return imagenet.PRESETS["test"]


def strange(config):
    return dataclasses.replace(config, dataset="strange_images")


def test_every_kind_of_jpeg(config):
    experiment = imagenet.build(strange(config))
    batches = experiment.data(0, lambda n: slice(0, n))
    for _ in range(3):  # an epoch
        batch = next(batches)
        assert batch["image"].shape == (16, 32, 32, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        assert batch["image"].std((1, 2)).max(1).min() > 3  # none is blank
    batches.close()


@pytest.mark.slow
def test_a_run_from_the_files_to_the_mesh(config, tmp_path, promoting):
    """Decoded, cropped and trained on eight devices; stopped at step 10, it ends the same."""
    config, mesh = strange(config), dlx.make_mesh("data=4,fsdp=2")
    ends = {}
    for name, stops in (("whole", [None]), ("stopped", [10, None])):
        for stop in stops:
            experiment = recorded(imagenet.build(config), [], stop)
            ends[name], rows = dlx.fit(
                experiment, config.run, workdir=tmp_path / name, mesh=mesh, writers=[]
            )
            assert rows[-1]["step"] == (stop or config.run.steps)
    assert_same(ends["whole"], ends["stopped"])
    for file in ("metrics.jsonl", "result.json"):
        one, other = (tmp_path / name / file for name in ends)
        assert one.read_bytes() == other.read_bytes(), file
    spread = {x.sharding.spec for x in jax.tree.leaves(ends["whole"].params) if x.size >= 1024}
    assert any("fsdp" in spec for spec in spread)
