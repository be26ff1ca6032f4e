"""VAE and DCGAN against PyTorch's networks of the benchmark in float64, every parameter and
statistic perturbed: losses, statistics and all gradients. Needs torch (the extra `parity`)."""

import jax
import numpy as np
import pytest

from dlx.models import gan, vae

torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")

from experiments.benchmarks import weights  # noqa: E402
from experiments.benchmarks.cases import gan as gan_case  # noqa: E402
from experiments.benchmarks.cases import vae as vae_case  # noqa: E402
from experiments.benchmarks.worker import flat  # noqa: E402

OPTIONS = {"xla_backend_optimization_level": 0}  # LLVM's would take most of the time


def variables_of(module, *args):
    """Of random numbers; variances are positive."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    random = np.random.default_rng(0)

    def fill(path, s):
        x = random.normal(size=s.shape)
        x = x / np.sqrt(np.prod(s.shape[:-1])) if len(s.shape) > 1 else 1 + 0.3 * x
        return np.abs(x) + 0.1 if path[-1].key == "var" else x

    return jax.tree_util.tree_map_with_path(fill, shapes)


def tensor(x):
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy() if x.ndim == 4 else x)


def close(found, wanted, least=0.0):
    """To 1e-8 of an array's largest value, or of `least`."""
    found, wanted = np.asarray(found), np.asarray(wanted.detach())
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-8 * max(np.abs(wanted).max(), least)


def same_gradients(case, row, ours, theirs, statistics):
    """Ours are carried over as parameters are, into a copy of theirs."""
    copy = case.theirs(row, lambda network: network).module.double()
    weights.load(copy, flat({"params": jax.tree.map(np.array, ours)} | statistics))
    copy, theirs = dict(copy.named_parameters()), dict(theirs.named_parameters())
    assert copy.keys() == theirs.keys()
    least = 1e-3 * max(float(p.grad.abs().max()) for p in theirs.values())
    for name, parameter in copy.items():
        close(parameter.detach(), theirs[name].grad, least)
        assert float(theirs[name].grad.abs().max()) > 0


def test_conv_vae(x64, promoting):
    random = np.random.default_rng(1)
    batch = {"image": random.random((3, 28, 28, 1)), "noise": random.normal(size=(3, 32))}
    model = vae.convolutional()
    params = variables_of(model, batch["image"], batch["noise"])["params"]
    theirs = vae_case.theirs("conv-vae", lambda network: network).module.double()
    weights.load(theirs, flat({"params": params}))
    value = jax.value_and_grad(lambda p, b: vae.loss(model)(p, {}, b, None)[0])
    loss, gradients = jax.jit(value, compiler_options=OPTIONS)(params, batch)
    wanted = theirs(tensor(batch["image"]), tensor(batch["noise"]))
    wanted.backward()
    close(loss, wanted)
    same_gradients(vae_case, "conv-vae", gradients, theirs, {})


def test_dcgan(x64, promoting):
    """Both losses, with the same networks; the statistics that each step leaves."""
    random = np.random.default_rng(1)
    batch = {
        "image": np.tanh(random.normal(size=(3, 28, 28, 1))),
        "noise": random.normal(size=(3, 100)),
    }
    G, D = gan.Generator(), gan.Discriminator()
    g, d = variables_of(G, batch["noise"]), variables_of(D, batch["image"])

    @lambda f: jax.jit(f, compiler_options=OPTIONS)
    def ours(g, d, batch):
        statistics = [{"batch_stats": x["batch_stats"]} for x in (d, g)]
        fake, generate = gan.generate(G, statistics[1], g["params"], batch["noise"])

        def d_loss(params):
            both = {"image": batch["image"], "fake": fake}
            return gan.discriminator_loss(D)(params, statistics[0], both, None)

        def g_loss(params):
            consts = {"generate": generate, "judge": d}
            return gan.generator_loss(D)(params, statistics[1], batch, None, **consts)

        return (
            jax.value_and_grad(d_loss, has_aux=True)(d["params"]),
            jax.value_and_grad(g_loss, has_aux=True)(g["params"]),
        )

    ((d_loss, (d_stats, _)), d_grads), ((g_loss, (g_stats, _)), g_grads) = ours(g, d, batch)

    both = {c: {"generator": g[c], "discriminator": d[c]} for c in ("params", "batch_stats")}
    theirs = gan_case.theirs("dcgan", lambda network: network).module.double()
    weights.load(theirs, flat(both))
    generator, discriminator = theirs["generator"], theirs["discriminator"]
    fake = generator(tensor(batch["noise"]))
    real_logits = discriminator(tensor(batch["image"]))
    logits = discriminator(fake)
    # The losses as the paper has them, by the probabilities.
    p_real, p_fake = torch.sigmoid(real_logits), torch.sigmoid(logits)
    wanted = -(torch.log(p_real).mean() + torch.log(1 - p_fake).mean())
    wanted_g = -torch.log(p_fake).mean()
    close(d_loss, wanted)
    close(g_loss, wanted_g)
    d_parameters, g_parameters = list(discriminator.parameters()), list(generator.parameters())
    found = torch.autograd.grad(wanted, d_parameters, retain_graph=True)
    for parameter, gradient in zip(d_parameters, found, strict=True):
        parameter.grad = gradient
    for parameter, gradient in zip(
        g_parameters, torch.autograd.grad(wanted_g, g_parameters), strict=True
    ):
        parameter.grad = gradient
    same_gradients(
        gan_case, "dcgan", {"generator": g_grads, "discriminator": d_grads}, theirs,
        {"batch_stats": both["batch_stats"]},
    )  # fmt: skip

    # Running variances: PyTorch's are of n - 1 degrees of freedom. n: 3 images of 7 x 7, 14 x 14.
    for stats, old, layer, n, passes in (
        (g_stats, g, "norm0", 147, 1), (g_stats, g, "norm1", 588, 1), (d_stats, d, "norm2", 147, 2)
    ):  # fmt: skip
        part = getattr(generator if layer != "norm2" else discriminator, layer)
        found, before = stats["batch_stats"][layer], old["batch_stats"][layer]
        close(found["mean"], part.running_mean)
        kept = 0.9**passes * before["var"]
        close(kept + (found["var"] - kept) * n / (n - 1), part.running_var)


def test_dense_vae(x64, promoting):
    """784-200-200-50, and the bound of three samples by PyTorch's own distributions."""
    random = np.random.default_rng(1)
    x, noise = random.random((2, 28, 28, 1)), random.normal(size=(2, 3, 50))
    model = vae.dense()
    params = variables_of(model, x, noise[:, 0])["params"]
    value = jax.value_and_grad(lambda p, b: vae.loss(model, 3)(p, {}, b, None)[0])
    loss, gradients = jax.jit(value, compiler_options=OPTIONS)(params, {"image": x, "noise": noise})

    leaves = jax.tree.map(lambda a: torch.from_numpy(a).requires_grad_(), params)

    def network(part, h):
        for name in ("dense1", "dense2", "head"):
            h = h @ leaves[part][name]["kernel"] + leaves[part][name]["bias"]
            h = h if name == "head" else torch.tanh(h)
        return h

    N, distribution = torch.distributions.Normal, torch.distributions.Bernoulli
    flat_x = torch.from_numpy(x.reshape(2, 784))
    mean, log_variance = network("encoder", flat_x).chunk(2, 1)
    q = N(mean, log_variance.exp().sqrt())
    z = (q.loc + q.scale * torch.from_numpy(noise.swapaxes(0, 1))).unbind(0)
    ln_w = [
        distribution(logits=network("decoder", z), validate_args=False).log_prob(flat_x).sum(1)
        + N(0.0, 1.0).log_prob(z).sum(1)
        - q.log_prob(z).sum(1)
        for z in z
    ]
    wanted = -(torch.logsumexp(torch.stack(ln_w), 0) - np.log(3)).mean()
    wanted.backward()
    close(loss, wanted)
    for found, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(leaves), strict=True):
        close(found, leaf.grad)
