"""The digits and their split, the order of batches, augmentation, losses and the first model."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import nn
from dlx.data import arrays, digits, images
from dlx.models import cnn, mlp
from dlx.nn import losses
from dlx.tasks import classifier

KEY = jax.random.key(4)


@pytest.fixture
def promotion():
    """flax promotes dtypes within itself; what calls it here needs this."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# ---- Digits ------------------------------------------------------------------------------------

SPLIT = {  # images, of each class, sha256 of the labels and images as little-endian numbers
    "train": (
        1257,
        [124, 128, 123, 129, 127, 128, 127, 125, 120, 126],
        "bf93bdd54d3c38a581ef8c5eadd086cdd1ca3f73ce6a0ab7043e0a6fa83e8ffc",
    ),
    "validation": (
        180,
        [18] * 10,
        "0a7adc6391133ddba0012875793e1eca2e66a0535b9ba9b4a7473813ed3fa74e",
    ),
    "test": (
        360,
        [36] * 10,
        "31e5aa3c8a2c1ac6ba94ed06c0b8878e3dfcecf914bd300cd2e303015e4160b1",
    ),
}


def test_the_split_is_what_it_was():
    """Whoever changes one image of it changes every published figure."""
    assert set(digits.load()) == set(SPLIT)
    for name, (n, classes, sha256) in SPLIT.items():
        part = digits.load()[name]
        assert part["image"].shape == (n, 8, 8, 1) and part["image"].dtype == np.float32
        assert part["label"].shape == (n,) and part["label"].dtype == np.int32
        assert np.bincount(part["label"]).tolist() == classes
        assert (part["image"].min(), part["image"].max()) == (0.0, 1.0)
        content = part["label"].astype("<i4").tobytes() + part["image"].astype("<f4").tobytes()
        assert hashlib.sha256(content).hexdigest() == sha256


def test_every_image_is_in_one_part_alone():
    """No two of the 1,797 images are equal, so that each can be followed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    labels = {image.astype(np.uint8).tobytes(): y for image, y in zip(raw.images, raw.target)}  # noqa: B905
    assert len(labels) == len(raw.images) == 1797
    seen = []
    for part in digits.load().values():
        for image, label in zip(part["image"], part["label"], strict=True):
            pixels = (image[..., 0] * 16).astype(np.uint8).tobytes()
            assert labels[pixels] == label
            seen.append(pixels)
    assert len(seen) == len(set(seen)) == 1797


# ---- Batches -----------------------------------------------------------------------------------


def everything(n):
    return slice(0, n)


def take(stream, n):
    return [next(stream)["x"].tolist() for _ in range(n)]


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (10, 4), (7, 3), (5, 5), (3, 1), (11, 7)])
def test_each_example_comes_once_an_epoch(n, batch_size):
    """Where batches straddle two epochs as well: the epochs lie end to end."""
    data = arrays.batches({"x": np.arange(n), "y": 10 * np.arange(n)}, batch_size, 3)
    epochs = 4
    stream = data(0, everything)
    batches = [next(stream) for _ in range(-(-epochs * n // batch_size))]
    assert {len(b["x"]) for b in batches} == {batch_size}
    assert all((b["y"] == 10 * b["x"]).all() for b in batches)
    laid = np.concatenate([b["x"] for b in batches])[: epochs * n].reshape(epochs, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in laid)
    if n > 5:
        assert len({tuple(epoch) for epoch in laid}) == epochs  # each its own permutation


@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 100])
def test_a_stream_from_any_step_is_the_tail_of_the_whole(start):
    data = arrays.batches({"x": np.arange(10)}, 4, 5)
    assert take(data(start, everything), 6) == take(data(0, everything), start + 6)[start:]


def test_two_streams_do_not_disturb_each_other():
    data = arrays.batches({"x": np.arange(10)}, 4, 5)
    a, b = data(0, everything), data(3, everything)
    mixed = [(next(a)["x"].tolist(), next(b)["x"].tolist()) for _ in range(4)]
    assert [x for x, _ in mixed] == take(data(0, everything), 4)
    assert [y for _, y in mixed] == take(data(3, everything), 4)


def test_the_seed_decides_the_order():
    def order(seed):
        return take(arrays.batches({"x": np.arange(100)}, 100, seed)(0, everything), 2)

    assert order(1) == order(1)
    assert len({tuple(epoch) for seed in range(5) for epoch in order(seed)}) == 10


def test_rows_are_what_one_of_several_processes_feeds():
    data = arrays.batches({"x": np.arange(10)}, 6, 5)
    whole = take(data(1, everything), 5)
    first = take(data(1, lambda n: slice(0, n // 2)), 5)
    scattered = take(data(1, lambda n: np.array([5, 3, 4])), 5)
    assert first == [batch[:3] for batch in whole]
    assert scattered == [[batch[5], batch[3], batch[4]] for batch in whole]


def test_lazy_arrays_are_opened_with_the_stream():
    opened = []

    def open_arrays():
        opened.append(1)
        return {"x": np.arange(10)}

    data = arrays.batches(open_arrays, 4, 5)
    assert not opened
    assert take(data(0, everything), 3) == take(
        arrays.batches({"x": np.arange(10)}, 4, 5)(0, everything), 3
    )
    assert opened == [1]


def test_lists_are_arrays():
    batch = next(arrays.batches({"x": [[1, 2], [3, 4]], "label": [0, 1]}, 2, 0)(0, everything))
    assert batch["x"].shape == (2, 2) and sorted(batch["label"].tolist()) == [0, 1]
    assert arrays.check({"label": [0, 2, 1]}, "some", 3)["label"].tolist() == [0, 2, 1]


@pytest.mark.parametrize("row", [0, 1023, 1024, 2999])
def test_a_row_that_is_not_finite_is_found(row):
    x = np.zeros((3000, 2), np.float32)
    x[row, 1] = np.inf
    with pytest.raises(dlx.BadInput, match=f"x is not finite in row {row}: "):
        next(arrays.batches({"x": x}, 2, 0)(0, everything))


def test_labels_of_another_kind_are_let_be():
    """Of one-hot labels and flat images only the model knows what to make."""
    given = {"label": np.eye(3), "image": np.zeros((3, 64), jnp.bfloat16), "mask": np.ones(3, bool)}
    batch = next(arrays.batches(given, 2, 0)(0, everything))
    assert {k: v.shape for k, v in batch.items()} == {
        "label": (2, 3),
        "image": (2, 64),
        "mask": (2,),
    }


def test_check_returns_what_it_was_given():
    image, label = np.zeros((3, 2, 2, 1), np.float32), np.array([0, 2, 1], np.int32)
    found = arrays.check({"image": image, "label": label}, "some", 3)
    assert found["image"] is image and found["label"] is label


# ---- Augmentation ------------------------------------------------------------------------------


def forced(monkeypatch, *, angle=0.0, stretch=(0.0, 0.0), shear=0.0, offset=(0.0, 0.0)):
    """Takes the chance out of `affine`: an image's draws, in units of the limits, are these."""

    def uniform(key, shape, dtype, low, high):
        assert (low, high) == (-1, 1)
        return jnp.tile(jnp.asarray([angle, *stretch, shear, *offset], dtype), shape[0] // 6)

    monkeypatch.setattr(jax.random, "uniform", uniform)


def warp(x, **how):
    return np.asarray(
        images.affine(jax.random.key(0), jnp.asarray(x), degrees=1.0, scale=1.0, shift=1.0)
    )


PICTURES = np.random.default_rng(0).uniform(0.1, 1.0, (3, 8, 6, 2)).astype(np.float32)


def test_nothing_moves_within_no_limits():
    still = images.affine(jax.random.key(3), PICTURES, degrees=0.0, scale=0.0, shift=0.0)
    np.testing.assert_array_equal(still, PICTURES)


def test_affine_wants_two_pixels_along_each_axis():
    with pytest.raises(dlx.BadInput, match="1 x 6 pixels: at least 2 x 2"):
        images.affine(jax.random.key(0), PICTURES[:, :1], degrees=1.0, scale=1.0, shift=1.0)


@pytest.mark.parametrize("offset", [(1, 0), (0, 1), (-2, 3), (8, 0), (0, -6)])
def test_a_whole_shift_is_a_roll_with_zeros(monkeypatch, offset):
    forced(monkeypatch, offset=offset)
    wanted = np.zeros_like(PICTURES)
    _, H, W, _ = PICTURES.shape
    for y in range(H):
        for x in range(W):
            if 0 <= y + offset[0] < H and 0 <= x + offset[1] < W:
                wanted[:, y, x] = PICTURES[:, y + offset[0], x + offset[1]]
    np.testing.assert_array_equal(warp(PICTURES), wanted)


def test_a_quarter_turn_is_rot90(monkeypatch):
    square = PICTURES[:, :6]
    forced(monkeypatch, angle=90.0)
    np.testing.assert_allclose(warp(square), np.rot90(square, -1, (1, 2)), atol=1e-5)
    forced(monkeypatch, angle=-90.0)
    np.testing.assert_allclose(warp(square), np.rot90(square, 1, (1, 2)), atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [
        {"angle": 17.0},
        {"stretch": (0.2, -0.3)},
        {"shear": 0.25},
        {"offset": (0.3, -1.6)},
        {"angle": -31.0, "stretch": (-0.1, 0.2), "shear": -0.2, "offset": (0.7, 0.4)},
    ],
)
def test_a_warp_is_bilinear_interpolation(x64, monkeypatch, how):
    """Pixel by pixel: where it comes from, and its four neighbours there."""
    pictures = PICTURES.astype(np.float64)
    forced(monkeypatch, **how)
    found = warp(pictures)
    how = {"angle": 0.0, "stretch": (0.0, 0.0), "shear": 0.0, "offset": (0.0, 0.0)} | how
    a = np.deg2rad(how["angle"])
    matrix = (
        np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
        @ np.array([[1.0, how["shear"]], [0.0, 1.0]])
        @ np.diag(np.exp(how["stretch"]))
    )
    _, H, W, _ = pictures.shape
    centre = np.array([(H - 1) / 2, (W - 1) / 2])
    wanted = np.zeros_like(pictures)
    for place in np.ndindex(H, W):
        y, x = matrix @ (np.array(place) - centre) + centre + how["offset"]
        for v in (int(np.floor(y)), int(np.floor(y)) + 1):
            for u in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= v < H and 0 <= u < W:
                    share = (1 - abs(y - v)) * (1 - abs(x - u))
                    wanted[:, place[0], place[1]] += share * pictures[:, v, u]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert np.abs(found - pictures).max() > 0.1


def test_a_warp_is_linear_stays_in_range_and_differs_by_image_and_key():
    how = {"degrees": 20.0, "scale": 0.2, "shift": 2.0}
    x, y = np.random.default_rng(1).uniform(0, 1, (2, 16, 8, 8, 1)).astype(np.float32)
    key = jax.random.key(1)
    a, b = (np.asarray(images.affine(key, v, **how)) for v in (x, y))
    np.testing.assert_allclose(images.affine(key, 2 * x - y, **how), 2 * a - b, atol=1e-5)
    assert a.min() >= 0 and a.max() <= 1 + 1e-6 and a.dtype == np.float32
    same = np.asarray(images.affine(key, np.repeat(x[:1], 16, 0), **how))
    assert len({image.tobytes() for image in same}) == 16  # each image its own
    assert np.abs(np.asarray(images.affine(jax.random.key(2), x, **how)) - a).max() > 0.1


def test_flip_mirrors_about_half_of_the_images():
    x = np.random.default_rng(0).uniform(size=(400, 3, 4, 2)).astype(np.float32)
    y = np.asarray(images.flip(jax.random.key(0), x))
    mirrored = (y == x[:, :, ::-1]).all((1, 2, 3))
    assert ((y == x).all((1, 2, 3)) != mirrored).all()  # one or the other
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_is_a_window_of_the_padded_image(mode):
    """Each of the 25 windows comes, and nothing else does."""
    x = np.random.default_rng(0).uniform(size=(300, 6, 5, 2)).astype(np.float32)
    y = np.asarray(images.crop(jax.random.key(0), x, 2, mode))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode)
    seen = []
    for i in range(len(x)):
        found = [
            (r, c)
            for r in range(5)
            for c in range(5)
            if (padded[i, r : r + 6, c : c + 5] == y[i]).all()
        ]
        assert len(found) == 1
        seen += found
    assert len(set(seen)) == 25


@pytest.mark.parametrize("size", [3, 4])
def test_cutout_is_a_square_with_its_centre_anywhere(size):
    y = np.asarray(images.cutout(jax.random.key(0), np.ones((500, 7, 6, 2), np.float32), size))
    centres = set()
    for image in y:
        fits = []
        for r in range(7):
            for c in range(6):
                wanted = np.ones((7, 6, 2), np.float32)
                top, left = max(r - size // 2, 0), max(c - size // 2, 0)
                wanted[top : r - size // 2 + size, left : c - size // 2 + size] = 0
                if (wanted == image).all():
                    fits.append((r, c))
        assert len(fits) == 1
        centres |= set(fits)
    assert len(centres) == 42


def test_mixup_mixes_images_and_targets_alike(promoting):
    x = np.random.default_rng(0).uniform(size=(64, 3, 3, 1)).astype(np.float32)
    t = np.eye(64, dtype=np.float32)  # so that a target tells whose image it is
    image, target = images.mixup(jax.random.key(0), x, t, 0.4)
    np.testing.assert_allclose(target.sum(1), 1, rtol=1e-6)
    assert (np.asarray(target > 0).sum(1) <= 2).all() and (np.asarray(target) < 0.99).any()
    np.testing.assert_allclose(image, np.einsum("ij,jhwc->ihwc", target, x), atol=1e-6)
    assert images.mixup(jax.random.key(0), x, t, 0.0)[0] is x


def test_evaluation_with_the_mirrored_image(promotion):
    """The mean of two logits, of what the network takes."""
    x = jax.random.normal(KEY, (2, 3, 4, 1))
    rest = {"shape": (3, 4, 1), "names": "abc", "batch_size": 2, "seed": 0, "prepare": jnp.exp}

    def predicted(mirrored, image):
        made = classifier.experiment(
            mlp.MLP((5,), classes=3), optax.sgd(0.1), dict, mirrored=mirrored, **rest
        )
        return made.predict(made.init(KEY, None), image)

    one, other = predicted(False, x), predicted(False, x[:, :, ::-1])
    assert jnp.abs(one - other).max() > 0.01
    np.testing.assert_allclose(predicted(True, x), (one + other) / 2, rtol=1e-6)


# ---- The loss ----------------------------------------------------------------------------------


class Table:
    """A classifier of one parameter that notes how it is called."""

    def __init__(self):
        self.calls = []

    def apply(self, variables, image, *, train, rngs, mutable):
        self.calls.append((train, rngs, mutable))
        logits = image @ variables["params"]["w"]
        return logits, {"seen": {"count": variables["seen"]["count"] + 1}}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_classification_by_hand(x64, smoothing):
    rng = np.random.default_rng(2)
    image, w, label = rng.normal(size=(9, 4)), rng.normal(size=(4, 5)), rng.integers(0, 5, 9)
    table, key = Table(), jax.random.key(4)
    moved = []

    def augment(key, image):
        moved.append(key)
        return image + 1

    loss_fn = losses.classification(table, label_smoothing=smoothing, augment=augment)
    loss, (state, metrics) = loss_fn(
        {"w": jnp.asarray(w)}, {"seen": {"count": 3}}, {"image": image, "label": label}, key
    )
    logits = (image + 1) @ w
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    each = [
        -sum(((1 - smoothing) * (c == label[i]) + smoothing / 5) * log_p[i, c] for c in range(5))
        for i in range(9)
    ]
    assert loss.dtype == jnp.float64
    assert float(loss) == pytest.approx(np.mean(each), rel=1e-13)
    assert set(metrics) == {"accuracy"}
    assert float(metrics["accuracy"]) == pytest.approx(np.mean(logits.argmax(1) == label))
    assert state == {"seen": {"count": 4}}
    ((train, rngs, mutable),) = table.calls
    assert train is True and list(rngs) == ["dropout"] and mutable == ["seen"]
    keys = [jax.random.key_data(k).tolist() for k in (key, moved[0], rngs["dropout"])]
    assert len({tuple(k) for k in keys}) == 3  # no two uses share a key


@pytest.mark.parametrize(
    "label", [np.zeros((9, 1), int), np.zeros(9, np.float32), np.zeros(8, int), np.zeros((), int)]
)
def test_labels_that_would_be_broadcast(label):
    """Of (B, 1) they train each example against all others' labels, without a word."""
    loss_fn = losses.classification(Table())
    batch = {"image": np.zeros((9, 4)), "label": label}
    with pytest.raises(dlx.BadInput, match=r"label is .*: give integers of shape \(9,\)"):
        jax.eval_shape(loss_fn, {"w": jnp.zeros((4, 5))}, {"seen": {"count": 3}}, batch, KEY)


def test_classification_of_mixed_examples(x64):
    """The loss of mixed inputs against targets mixed alike."""
    rng = np.random.default_rng(2)
    x, label = rng.normal(size=(9, 1, 1, 4)), rng.integers(0, 5, 9)
    w, met = jnp.asarray(rng.normal(size=(4, 5))), []

    class Flat(Table):
        def apply(self, variables, image, **options):
            return super().apply(variables, image[:, 0, 0], **options)

    def mix(key, x, targets):
        met.append(key)
        return images.mixup(key, x, targets, alpha=0.7)

    batch = {"image": jnp.asarray(x), "label": label}
    loss, _ = losses.classification(Flat(), mix=mix)({"w": w}, {"seen": {"count": 3}}, batch, KEY)
    mixed, target = images.mixup(met[0], jnp.asarray(x), jnp.eye(5)[label], 0.7)
    log_p = jax.nn.log_softmax(mixed[:, 0, 0] @ w)
    assert float(loss) == pytest.approx(-float((target * log_p).sum(1).mean()), rel=1e-12)
    assert float(jnp.abs(mixed - x).max()) > 0.1
    with pytest.raises(dlx.BadInput, match="alpha is -1"):
        images.mixup(KEY, jnp.asarray(x), jnp.eye(5)[label], -1)


def test_classification_of_bfloat16_logits_is_summed_in_float32():
    class Half:
        def apply(self, variables, image, *, train, rngs, mutable):
            return image.astype(jnp.bfloat16), {}

    logits = np.array([[1.0, 2.0, 3.0], [0.5, 0.25, -1.0]], np.float32)  # exact in bfloat16
    batch = {"image": logits, "label": np.array([0, 0])}
    loss, (_, metrics) = losses.classification(Half())({}, {}, batch, jax.random.key(0))
    wanted = np.log(np.exp(logits).sum(1)) - logits[:, 0]
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(wanted.mean(), rel=1e-6)
    assert float(metrics["accuracy"]) == 0.5


# ---- The model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (4, 7), (7, 4), (8, 8), (5, 2)])
def test_max_pool(size):
    x = np.random.default_rng(3).normal(size=(2, *size, 3)).astype(np.float32)
    H, W = size[0] // 2, size[1] // 2
    wanted = np.zeros((2, H, W, 3), np.float32)
    for i, j in np.ndindex(H, W):
        wanted[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2))
    np.testing.assert_array_equal(nn.max_pool(jnp.asarray(x), (2, 2), (2, 2)), wanted)


def test_every_parameter_of_the_small_cnn_learns():
    model = cnn.SmallCNN((32, 64, 64), (True, False, True))
    batch = {k: v[:64] for k, v in digits.load()["train"].items()}
    variables = model.init(jax.random.key(0), batch["image"])
    params = variables.pop("params")
    loss_fn = losses.classification(model, label_smoothing=0.1)
    (_, (model_state, _)), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, variables, batch, jax.random.key(1)
    )
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-6, jax.tree_util.keystr(path)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), model_state, variables)
    assert min(jax.tree.leaves(moved)) > 0


def test_the_small_cnn_has_so_many_parameters():
    """3 x 3 kernels without bias, two vectors a normalisation, one linear layer on 2 x 2 x 64."""
    by_hand = 9 * (1 * 32 + 32 * 64 + 64 * 64) + 2 * (32 + 64 + 64) + (2 * 2 * 64 * 10 + 10)
    model = cnn.SmallCNN((32, 64, 64), (True, False, True))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == by_hand == 58474


def test_the_small_cnn_normalises_by_the_batch_in_training_alone(promotion):
    model = cnn.SmallCNN(channels=(4,), pool=(True,), dropout=0.5)
    x = digits.load()["train"]["image"][:8]
    variables = model.init(jax.random.key(0), x)
    whole = model.apply(variables, x)
    parts = [model.apply(variables, x[i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5, atol=1e-6)
    rngs = {"dropout": jax.random.key(1)}
    trained, _ = model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
    assert np.abs(np.asarray(trained - whole)).max() > 0.01
