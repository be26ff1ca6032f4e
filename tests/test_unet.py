"""U-Net: sizes against the network itself, equations 1 and 2 against slow NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx.models import unet


def variables(model, *shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_the_papers_network():
    """Figure 1: 572 x 572 pixels in, 388 x 388 out; 31.0 million parameters."""
    v = variables(unet.UNet(), 1, 572, 572, 1)
    assert sum(x.size for x in jax.tree.leaves(v)) == 31_030_658
    assert jax.eval_shape(unet.UNet().apply, v, jnp.zeros((1, 572, 572, 1))).shape[1:] == (
        388, 388, 2,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_padded(dtype, promoting):
    model = unet.PaddedUNet(features=4, depth=2, classes=3, dtype=dtype)
    v = variables(model, 2, 16, 24, 3)
    logits = jax.eval_shape(model.apply, v, jnp.zeros((2, 16, 24, 3)))
    assert logits.shape == (2, 16, 24, 3) and logits.dtype == (dtype or jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(v)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("padding", ["VALID", "SAME"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_sizes(depth, padding):
    """Size by size, as the layers take it: refused where one is odd or nothing is left."""

    def slow(size):
        border = 4 if padding == "VALID" else 0
        for _ in range(depth):
            size -= border
            if size <= 0 or size % 2:
                return None
            size //= 2
        size -= border
        for _ in range(depth):
            size = 2 * size - border if size > 0 else 0
        return size if size > 0 else None

    good = {size: slow(size) for size in range(1, 140) if slow(size)}
    for size in range(1, 120):
        if size in good:
            assert unet.output_size(size, depth, padding) == good[size]
        else:
            with pytest.raises(dlx.BadInput) as e:
                unet.output_size(size, depth, padding)
            near = [max(s for s in good if s < size)] if size > min(good) else []
            near.append(min(s for s in good if s > size))
            named = " and ".join(map(str, near)) + (" do" if len(near) > 1 else " is the least")
            assert str(e.value).endswith(f": {named}")
    model = unet.UNet(features=1, depth=depth, padding=padding)
    a, b = list(good)[:2]
    image = jnp.zeros((1, a, b, 1))
    out, _ = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), image))
    assert out.shape == (1, good[a], good[b], 2)


def test_an_image_that_does_not_fit():
    with pytest.raises(dlx.BadInput, match=r"width 570 does not .* \(VALID\): 556 and 572 do\b"):
        variables(unet.UNet(), 1, 572, 570, 1)
    with pytest.raises(dlx.BadInput, match=r"height 33 .* depth 3 \(SAME\): 32 and 40 do\b"):
        variables(unet.PaddedUNet(features=2, depth=3), 1, 33, 40, 1)


class Constant(unet.nn.Module):
    """Logits that are given, 2 pixels less on every side than the image."""

    logits: tuple

    def __call__(self, x, *, train):
        return jnp.asarray(self.logits)


@pytest.mark.parametrize("weighted", [False, True])
def test_loss(weighted, x64):
    """Equation 1, pixel by pixel; labels in either size; those outside [0, K) count nothing."""
    random = np.random.default_rng(0)
    logits, weight = random.normal(size=(2, 5, 6, 3)), random.uniform(1, 3, (2, 9, 10))
    label = random.integers(0, 4, (2, 9, 10))  # 3 is none
    E, hits = 0.0, 0
    for b in range(2):
        for i in range(5):
            for j in range(6):
                k = label[b, i + 2, j + 2]
                z = logits[b, i, j]
                p = np.exp(z) / np.exp(z).sum()
                if k < 3:
                    E -= np.log(p[k]) * (weight[b, i + 2, j + 2] if weighted else 1) / 60
                hits += z.argmax() == k
    loss_fn = unet.segmentation(Constant(tuple(map(tuple, logits.tolist()))))
    batch = {"image": np.zeros((2, 9, 10, 1)), "label": label}
    if weighted:
        batch["weight"] = weight
    inner = {k: v[:, 2:-2, 2:-2] for k, v in batch.items()}
    for part in (batch, inner):
        loss, (_, metrics) = loss_fn({}, {}, jax.tree.map(jnp.asarray, part), jax.random.key(0))
        np.testing.assert_allclose(loss, E, rtol=1e-12)
        np.testing.assert_allclose(metrics["accuracy"], hits / 60, rtol=1e-6)


def test_border_weights():
    """Equation 2 at each pixel, with all distances taken."""
    random = np.random.default_rng(0)
    cells = np.zeros((23, 31), int)
    for number, (y, x) in enumerate([(5, 6), (6, 14), (17, 10), (15, 24)], 3):
        rows, columns = np.mgrid[:23, :31]
        cells[(rows - y) ** 2 + (columns - x) ** 2 < random.integers(9, 20)] = number
    cells[4, 6] = 0  # a hole
    found = unet.border_weights(cells, (0.5, 2.0), w0=7.0, sigma=3.0)
    assert found.dtype == np.float32 and found.shape == cells.shape
    places = [np.argwhere(cells == n) for n in np.unique(cells[cells > 0])]
    for i in range(23):
        for j in range(31):
            d1, d2 = sorted(min(np.hypot(i - y, j - x) for y, x in cell) for cell in places)[:2]
            wanted = 0.5 + 7 * np.exp(-((d1 + d2) ** 2) / 18) if cells[i, j] == 0 else 2.0
            np.testing.assert_allclose(found[i, j], wanted, rtol=1e-6)
    one = np.where(cells == 3, cells, 0)
    np.testing.assert_array_equal(unet.border_weights(one, (0.5, 2.0)), np.where(one, 2.0, 0.5))


@pytest.mark.slow
def test_it_learns_to_segment():
    """A disc in noise, in a few steps of make_step, by which every value moves."""
    random, (rows, columns) = np.random.default_rng(0), np.mgrid[:16, :16]
    centres = random.integers(4, 12, (8, 2, 1, 1))
    label = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 10).astype(np.int32)
    image = label[..., None] + 0.3 * random.normal(size=(8, 16, 16, 1))
    batch = {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(label)}
    model, tx = unet.PaddedUNet(features=4, depth=1), optax.sgd(0.1, momentum=0.9)
    params = jax.jit(model.init)(jax.random.key(0), batch["image"])
    state = dlx.train_state(jax.random.key(0), params, tx)
    step, first = jax.jit(dlx.make_step(unet.segmentation(model), tx)), state
    for _ in range(40):
        state, metrics = step(state, batch)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(state.variables),
        jax.tree.leaves(first.variables),
        strict=True,
    ):
        assert np.isfinite(a).all() and (a != b).all(), jax.tree_util.keystr(path)
    assert metrics["accuracy"] > 0.97
    logits = jax.jit(model.apply)(state.variables, batch["image"])
    assert (np.argmax(logits, -1) == label).mean() > 0.9
