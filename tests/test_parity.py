"""Models against torchvision in float64, every parameter and statistic perturbed.

Needs torch and torchvision (the extra `parity`), or skips.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx.models import cnn, resnet

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
try:
    # Its compiled operators (of detection, unused here) may belong to another torch.
    with mock.patch("torch.library.register_fake", lambda *a, **k: lambda f: f):
        import torchvision
except ImportError:
    pytest.skip("torchvision is not installed", allow_module_level=True)

CASES = {
    "resnet18": (resnet.ResNet18, resnet.from_torch, (4, 65, 49)),
    "resnet50": (resnet.ResNet50, resnet.from_torch, (4, 49, 65)),
    "vgg11_bn": (cnn.VGG11, lambda s: cnn.vgg_from_torch(s, (1, 1, 2, 2, 2)), (3, 97, 65)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(our model, its variables, the converter, torchvision's model, an input)."""
    ours, convert, (B, H, W) = CASES[request.param]
    theirs = getattr(torchvision.models, request.param)().double()
    random = np.random.default_rng(0)
    with torch.no_grad():
        for x in [*theirs.parameters(), *theirs.buffers()]:
            if x.dtype == torch.float64:
                noise = torch.from_numpy(random.normal(size=tuple(x.shape)))
                x.copy_(x * (1 + 0.1 * noise) if x.ndim > 1 else x + 0.1 * noise.abs())
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    image = random.normal(size=(B, H, W, 3))
    jax.config.update("jax_enable_x64", True)
    yield ours(), convert, theirs, image
    jax.config.update("jax_enable_x64", False)


def arrays(convert, named):
    return jax.tree.map(jnp.asarray, convert({k: v.detach().numpy() for k, v in named}))


def close(found, wanted):
    """To 1e-8 of an array's largest value, or of a thousandth of all arrays' largest: the gradient
    of a bias before a normalisation is nothing but rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    least = 1e-3 * max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    for path, b in jax.tree_util.tree_leaves_with_path(wanted):
        a = found
        for key in path:
            a = a[key.key]
        error = np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), least)
        assert error <= 1e-8, (jax.tree_util.keystr(path), error)


def test_evaluation(case, promoting):
    ours, convert, theirs, image = case
    variables = arrays(convert, theirs.state_dict().items())
    expected = jax.eval_shape(ours.init, jax.random.key(0), jnp.asarray(image))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    theirs.eval()
    with torch.no_grad():
        logits = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
    close(np.asarray(jax.jit(ours.apply)(variables, image)), logits)


def test_training(case, promoting):
    """One step in training mode: logits, statistics, gradients."""
    ours, convert, theirs, image = case
    if type(ours) is cnn.VGG:
        ours = ours.clone(dropout=0.0)
    variables = arrays(convert, theirs.state_dict().items())
    weights = np.random.default_rng(1).normal(size=(len(image), 1000))

    @jax.jit
    def gradients(params):
        def loss(params):
            logits, new = ours.apply(
                variables | {"params": params}, image, train=True, mutable=["batch_stats"]
            )
            return (logits * weights).sum(), (logits, new["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    found, (logits, statistics) = gradients(variables["params"])
    sizes = {}  # values that a channel's statistics are made of
    hooks = [
        module.register_forward_hook(
            lambda m, x, y, name=name: sizes.__setitem__(name, x[0].numel() // x[0].shape[1])
        )
        for name, module in theirs.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
    ]
    before = {k: v.clone() for k, v in theirs.state_dict().items()}
    theirs.train().zero_grad()
    out = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    (out * torch.from_numpy(weights)).sum().backward()
    for hook in hooks:
        hook.remove()
    after = theirs.state_dict()
    close(np.asarray(logits), out.detach().numpy())
    close(found, arrays(convert, [(k, p.grad) for k, p in theirs.named_parameters()])["params"])
    biased = {}  # torch keeps the variance of n - 1 degrees of freedom, flax that of n
    for name, n in sizes.items():
        for part in ("running_mean", "running_var"):
            old, new = before[f"{name}.{part}"], after[f"{name}.{part}"]
            share = (n - 1) / n if part == "running_var" else 1.0
            biased[f"{name}.{part}"] = 0.9 * old + (new - 0.9 * old) * share
    close(statistics, arrays(convert, biased.items())["batch_stats"])
    theirs.load_state_dict(before)
