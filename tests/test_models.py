"""All models from one table: parameters counted, every one of them learns, batches of any size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import dlx
from dlx.models import airbench, cnn, mlp, resnet
from dlx.nn import torch

KEY = jax.random.key(0)

# name: (model, an image's shape, parameters), the counts as published or as torchvision has them.
MODELS = {
    "mlp": (mlp.MLP((300, 100)), (28, 28, 1), 266_610),
    "lenet5": (cnn.LeNet5(), (28, 28, 1), 61_706),
    "small_cnn": (cnn.SmallCNN(), (28, 28, 1), 87_274),
    "vgg11": (cnn.VGG11(norm=False), (32, 32, 3), 132_863_336),
    "vgg11_bn": (cnn.VGG11(), (32, 32, 3), 132_868_840),
    "vgg16": (cnn.VGG16(norm=False), (32, 32, 3), 138_357_544),
    "vgg16_bn": (cnn.VGG16(), (32, 32, 3), 138_365_992),
    "resnet18": (resnet.ResNet18(), (64, 64, 3), 11_689_512),
    "resnet34": (resnet.ResNet34(), (64, 64, 3), 21_797_672),
    "resnet50": (resnet.ResNet50(), (64, 64, 3), 25_557_032),
    "resnet101": (resnet.ResNet101(), (64, 64, 3), 44_549_160),
    "resnet152": (resnet.ResNet152(), (64, 64, 3), 60_192_808),
    "cifar_resnet20": (resnet.CifarResNet(20), (32, 32, 3), 269_722),
    "cifar_resnet56": (resnet.CifarResNet(56), (32, 32, 3), 853_018),
    "cifar_resnet110": (resnet.CifarResNet(110), (32, 32, 3), 1_727_962),
    "cifar_resnet20_v2": (resnet.CifarResNet(20, preactivation=True), (32, 32, 3), 269_722),
    "airbench": (airbench.Airbench(), (32, 32, 3), 1_971_352),
}
SMALL = ["mlp", "lenet5", "small_cnn"]
LARGER = ["cifar_resnet20", "cifar_resnet20_v2", "airbench"]  # compiled for seconds
SMALL += [pytest.param(name, marks=pytest.mark.slow) for name in LARGER]


def shapes(model, shape):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *shape)))


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    model, shape, parameters = MODELS[name]
    variables = shapes(model, shape)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == parameters
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("dtype", [None, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, dtype, promoting):
    """(B, classes) in the compute dtype; parameters stay float32."""
    model, shape, _ = MODELS[name]
    model = model.clone(dtype=dtype)
    variables = shapes(model, shape)
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((3, *shape)))
    assert logits.shape == (3, model.classes) and logits.dtype == (dtype or jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name):
    model, shape, _ = MODELS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)), jnp.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rest = {k: v for k, v in variables.items() if k != "params"}
    if "whitening" in rest:  # zero until the first batch, and nothing before it would learn
        with jax.numpy_rank_promotion("allow"):
            rest["whitening"] = {"kernel": airbench.whitening(x)}

    @jax.jit
    def gradients(params):
        def loss(params):
            logits, _ = model.apply(
                {"params": params, **rest}, x, train=True, mutable=list(rest),
                rngs={"dropout": jax.random.key(1)},
            )  # fmt: skip
            return (logits * jnp.arange(40.0).reshape(4, 10)).sum()

        return jax.grad(loss)(params)

    for path, g in jax.tree_util.tree_leaves_with_path(gradients(variables["params"])):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("depth", [0, 2, 19, 21])
def test_a_depth_that_is_none(depth):
    with pytest.raises(dlx.BadInput, match=f"depth is {depth}: it must be 6 n"):
        resnet.CifarResNet(depth)


def test_option_a_takes_every_second_pixel_and_fills_with_zeros():
    x = jnp.arange(2 * 4 * 6 * 2, dtype=jnp.float32).reshape(2, 4, 6, 2)
    y = resnet.widen(x, 4, 2)
    assert y.shape == (2, 2, 3, 4)
    np.testing.assert_array_equal(y[..., 1:3], x[:, ::2, ::2])
    assert not y[..., 0].any() and not y[..., 3].any()


@pytest.mark.parametrize("H, W", [(1, 2), (3, 5), (7, 7), (10, 9)])
def test_adaptive_mean(H, W):
    """Field by field, from the definition."""
    x = np.random.default_rng(0).normal(size=(2, H, W, 3)).astype(np.float32)
    wanted = np.zeros((2, 7, 7, 3))
    for i in range(7):
        for j in range(7):
            rows = slice(int(np.floor(i * H / 7)), int(np.ceil((i + 1) * H / 7)))
            columns = slice(int(np.floor(j * W / 7)), int(np.ceil((j + 1) * W / 7)))
            wanted[:, i, j] = x[:, rows, columns].mean((1, 2))
    np.testing.assert_allclose(cnn.adaptive_mean(jnp.asarray(x), 7), wanted, atol=1e-6)


def test_whitening(x64):
    """Responses over all patches: squares of mean 1, products of mean 0, and their negatives."""
    random = np.random.default_rng(0)
    x = random.normal(size=(5, 8, 9, 3)).cumsum(1).cumsum(2)  # neighbours are alike, as in images
    with jax.numpy_rank_promotion("allow"):
        filters = np.asarray(airbench.whitening(jnp.asarray(x), eps=1e-12))
    assert filters.shape == (2, 2, 3, 24)
    patches = [x[n, i : i + 2, j : j + 2] for n in range(5) for i in range(7) for j in range(8)]
    responses = np.stack(patches).reshape(-1, 12) @ filters.reshape(12, 24)
    first, second = responses[:, :12], responses[:, 12:]
    np.testing.assert_allclose(first.T @ first / len(patches), np.eye(12), atol=1e-8)
    np.testing.assert_array_equal(second, -first)


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (3, 3, 4, 4), (1, 1, 5, 7), (3, 3, 6, 4)])
def test_identity_init(shape):
    """The input comes out again, in as many outputs as there are."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6, shape[2])), jnp.float32)
    kernel = airbench.identity_init(jax.random.key(0), shape)
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    both = min(shape[2:])
    np.testing.assert_array_equal(y[..., :both], x[..., :both])
    rest = kernel[..., both:]
    assert rest.size == 0 or 0 < np.abs(rest).max() <= (np.prod(shape[:3])) ** -0.5


def test_a_parameter_of_no_known_layer():
    with pytest.raises(ValueError, match=r"weight of shape \(2, 2, 2\)"):
        torch.convert("weight", np.zeros((2, 2, 2)))


@pytest.mark.parametrize(
    ("call", "message"),
    [(lambda: cnn.VGG11().init(KEY, np.zeros((1, 28, 28, 3))), r"images are \(1, 28, 28, 3\)"),
     (lambda: cnn.LeNet5().init(KEY, np.zeros((1, 8, 8, 1))), "H and W at least 12"),
     (lambda: cnn.LeNet5().init(KEY, np.zeros((1, 28, 28))), r"give \(B, H, W, C\)"),
     (lambda: cnn.SmallCNN((8, 16), (True,)).init(KEY, np.zeros((1, 8, 8, 1))), "have 2, 1 and 2"),
     (lambda: resnet.from_torch({"model.conv1.weight": np.zeros((8, 3, 3, 3))}), "model.conv1"),
     (lambda: resnet.from_torch({}), "no arrays"), (lambda: cnn.vgg_from_torch({}, (1,)), "no arr"),
     (lambda: cnn.vgg_from_torch({"features.99.bias": np.zeros(8)}, (1,)), "features.99.bias")],
)  # fmt: skip
def test_what_a_model_cannot_take(call, message):
    with pytest.raises(dlx.BadInput, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_weights_of_half_precision_become_parameters_of_single():
    found = resnet.from_torch({"conv1.weight": np.ones((8, 3, 3, 3), np.float16)})
    assert found["params"]["conv1"]["kernel"].dtype == np.float32


def test_safetensors_load(tmp_path):
    """The file that torchvision's weights come in, to the model's own parameters."""
    rng, state = np.random.default_rng(0), {}
    model = resnet.CifarResNet(8)
    variables = jax.eval_shape(model.init, KEY, np.zeros((1, 32, 32, 3), np.float32))
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        _, *place, last = (p.key for p in path)
        name = ".".join(place).replace("norm", "bn").replace("head", "fc")
        name = re.sub(r"(layer\d)_(\d+)", r"\1.\2", name)
        value = np.abs(rng.normal(size=leaf.shape)).astype(np.float32)  # a variance is positive
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim]
        state[f"{name}.{names.get(last, last)}"] = np.ascontiguousarray(value.transpose(order))
    safetensors.numpy.save_file(state, tmp_path / "resnet.safetensors")
    loaded = resnet.from_torch(safetensors.numpy.load_file(tmp_path / "resnet.safetensors"))
    assert jax.tree.structure(loaded) == jax.tree.structure(variables)
    x = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    assert np.isfinite(model.apply(loaded, x)).all()
    kernel = state["layer2.0.conv1.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(loaded["params"]["layer2_0"]["conv1"]["kernel"], kernel)
