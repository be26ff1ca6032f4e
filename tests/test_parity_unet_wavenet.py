"""U-Net and WaveNet against small versions in PyTorch: float64, every parameter perturbed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx.models import unet, wavenet

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
F = torch.nn.functional


def close(found, wanted):
    scale = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        error = np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-3 * scale)
        assert error <= 1e-8, (jax.tree_util.keystr(path), error)


def perturb(module):
    random = np.random.default_rng(0)
    with torch.no_grad():
        for x in [*module.parameters(), *module.buffers()]:
            if x.dtype == torch.float64:
                noise = torch.from_numpy(random.normal(size=tuple(x.shape)))
                x.copy_(x + 0.2 * (noise if x.ndim > 1 else noise.abs()))
    return module


def tree(module, value):
    """value of each parameter, in the layout and under the names of flax."""
    out = {}
    for name, part in module.named_modules():
        for kind, p in part.named_parameters(recurse=False):
            x, leaf = value(p).numpy(), kind
            if isinstance(part, torch.nn.ConvTranspose2d) and kind == "weight":
                x, leaf = x.transpose(2, 3, 0, 1)[::-1, ::-1], "kernel"
            elif isinstance(part, (torch.nn.Conv2d, torch.nn.Conv1d)) and kind == "weight":
                x, leaf = np.moveaxis(x, (0, 1), (-1, -2)), "kernel"
                x = x[0] if getattr(part, "dense", False) else x
            elif isinstance(part, torch.nn.BatchNorm2d) and kind == "weight":
                leaf = "scale"
            elif isinstance(part, torch.nn.Embedding):
                leaf = "embedding"
            elif isinstance(part, torch.nn.Linear) and kind == "weight":
                x, leaf = x.T, "kernel"
            place = out
            for key in name.split("."):
                place = place.setdefault(key, {})
            place[leaf] = x
    return out


class Block(torch.nn.Module):
    def __init__(self, a, b, pad, norm):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(a, b, 3, padding=pad, bias=not norm)
        self.conv2 = torch.nn.Conv2d(b, b, 3, padding=pad, bias=not norm)
        self.norm1, self.norm2 = (torch.nn.BatchNorm2d(b) for _ in "12") if norm else (None, None)

    def forward(self, x):
        for conv, norm in (self.conv1, self.norm1), (self.conv2, self.norm2):
            x = conv(x)
            x = F.relu(norm(x) if norm else x)
        return x


class UNet(torch.nn.Module):
    """Figure 1 of the paper, level by level."""

    def __init__(self, channels, features, depth, classes, pad=0, norm=False):
        super().__init__()
        self.depth, widths = depth, [channels, *(features * 2**i for i in range(depth + 1))]
        for i in range(depth):
            setattr(self, f"down{i}", Block(widths[i], widths[i + 1], pad, norm))
            up = torch.nn.ConvTranspose2d(widths[i + 2], widths[i + 1], 2, 2)
            setattr(self, f"upconv{i}", up)
            setattr(self, f"up{i}", Block(widths[i + 2], widths[i + 1], pad, norm))
        self.bottom = Block(widths[depth], widths[depth + 1], pad, norm)
        self.head = torch.nn.Conv2d(features, classes, 1)

    def forward(self, x):
        skips = []
        for i in range(self.depth):
            skips.append(getattr(self, f"down{i}")(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)
        for i in reversed(range(self.depth)):
            x = getattr(self, f"upconv{i}")(x)
            cut = (skips[i].shape[2] - x.shape[2]) // 2, (skips[i].shape[3] - x.shape[3]) // 2
            skip = F.pad(skips[i], (-cut[1], -cut[1], -cut[0], -cut[0]))
            x = getattr(self, f"up{i}")(torch.cat([skip, x], 1))
        return self.head(x)


@pytest.mark.parametrize("padded", [False, True])
def test_unet(padded, x64, promoting):
    """The paper's network and the padded one with batch normalisation in training mode: logits, the
    weighted loss and all gradients."""
    size = (16, 24) if padded else (76, 68)
    theirs = perturb(UNet(3, 4, 2, 3, int(padded), padded).double())
    ours = (unet.PaddedUNet if padded else unet.UNet)(4, 2, 3, dropout=0.0)
    random = np.random.default_rng(1)
    image = random.normal(size=(2, *size, 3))
    label, weight = random.integers(0, 3, (2, *size)), random.uniform(1, 9, (2, *size))
    variables = jax.eval_shape(ours.init, jax.random.key(0), jnp.asarray(image))
    params = jax.tree.map(jnp.asarray, tree(theirs, torch.Tensor.detach))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    stats = {k: v for k, v in variables.items() if k != "params"}
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape), stats)
    batch = {"image": image, "label": label, "weight": weight}
    grad = jax.jit(jax.value_and_grad(unet.segmentation(ours), has_aux=True))
    (loss, _), found = grad(params, stats, batch, jax.random.key(0))
    kinds = list(stats)
    logits = jax.jit(lambda p: ours.apply({"params": p, **stats}, image, train=True, mutable=kinds))
    out = theirs(torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
    a, b = ((n - m) // 2 for n, m in zip(size, out.shape[2:], strict=True))
    inner = np.s_[:, a : size[0] - a, b : size[1] - b]
    each = F.cross_entropy(out, torch.from_numpy(label[inner].copy()), reduction="none")
    (each * torch.from_numpy(weight[inner].copy())).mean().backward()
    close(np.asarray(logits(params)[0]), out.detach().numpy().transpose(0, 2, 3, 1))
    wanted = (each.detach().numpy() * weight[inner]).mean()
    np.testing.assert_allclose(loss, wanted, rtol=1e-10)
    close(found, tree(theirs, lambda p: p.grad))


class Conv1x1(torch.nn.Conv1d):
    dense = True

    def __init__(self, a, b):
        super().__init__(a, b, 1)


class Layer(torch.nn.Module):
    def __init__(self, C, S, k, d, last):
        super().__init__()
        self.left, self.gates = (k - 1) * d, torch.nn.Conv1d(C, 2 * C, k, dilation=d)
        self.condition = torch.nn.Linear(2, 2 * C, bias=False)
        self.residual, self.skip = None if last else Conv1x1(C, C), Conv1x1(C, S)

    def forward(self, x, condition):
        y = self.gates(F.pad(x, (self.left, 0))) + self.condition(condition)[:, :, None]
        filter, gate = y.chunk(2, 1)
        z = torch.tanh(filter) * torch.sigmoid(gate)
        return x + self.residual(z) if self.residual else x, self.skip(z)


class WaveNet(torch.nn.Module):
    """The first convolution really is one, of width 2 over one-hot samples."""

    def __init__(self, C, S, dilations, k, Q):
        super().__init__()
        self.C, self.Q, self.causal = C, Q, torch.nn.Embedding(Q, 2 * C)
        self.layers = len(dilations)
        for i, d in enumerate(dilations, 1):
            setattr(self, f"layer{i}", Layer(C, S, k, d, i == len(dilations)))
        self.head1, self.head2 = Conv1x1(S, S), Conv1x1(S, Q)

    def forward(self, sample, condition):
        x = F.one_hot(sample, self.Q).transpose(1, 2).double()
        kernel = torch.stack(self.causal.weight.T.split(self.C), 2)  # (C, Q, 2)
        x, total = F.conv1d(F.pad(x, (1, 0)), kernel), 0
        for i in range(self.layers):
            x, skip = getattr(self, f"layer{i + 1}")(x, condition)
            total = total + skip
        return self.head2(F.relu(self.head1(F.relu(total))))


@pytest.mark.parametrize("width", [2, 3])
def test_wavenet(width, x64, promoting):
    """Logits, likelihood and all gradients, with global conditioning."""
    shape = {"dilations": (1, 2, 4, 1, 2), "values": 16}
    theirs = perturb(WaveNet(6, 5, shape["dilations"], width, 16).double())
    ours = wavenet.WaveNet(channels=6, skip=5, width=width, **shape)
    random = np.random.default_rng(1)
    sample, condition = random.integers(0, 16, (3, 31)), random.normal(size=(3, 2))
    params = jax.tree.map(jnp.asarray, tree(theirs, torch.Tensor.detach))
    expected = jax.eval_shape(ours.init, jax.random.key(0), sample, jnp.asarray(condition))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected["params"])
    batch = {"sample": sample, "condition": condition}
    grad = jax.jit(jax.value_and_grad(wavenet.likelihood(ours), has_aux=True))
    (loss, _), found = grad(params, {}, batch, jax.random.key(0))
    logits = jax.jit(ours.apply)({"params": params}, sample[:, :-1], condition)
    out = theirs(torch.from_numpy(sample[:, :-1]), torch.from_numpy(condition))
    wanted = F.cross_entropy(out, torch.from_numpy(sample[:, 1:].copy()))
    wanted.backward()
    close(np.asarray(logits), out.detach().numpy().transpose(0, 2, 1))
    np.testing.assert_allclose(loss, wanted.item(), rtol=1e-12)
    close(found, tree(theirs, lambda p: p.grad))
