"""Five shapes of training that share nothing but the contract: the loop has a case for none.

python -m tests.shapes NAME --workdir DIR [--field value ...]
"""

import dataclasses
import itertools
import sys
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dlx
from dlx import metrics
from dlx.data import arrays, digits
from dlx.nn import losses


def short_run(**changes):
    """40 steps whose cadences rarely coincide, so that every order of events occurs."""
    run = dlx.Run(steps=40, log_every=4, eval_every=10, save_every=6, **changes)
    return dataclasses.field(default_factory=lambda: run)


def mlp(key, *sizes):
    """Parameters of a multilayer perceptron."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"w": jax.random.normal(k, (m, n)) / m**0.5, "b": jnp.zeros(n)}
        for k, (m, n) in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def linear(layer, x):
    y = x @ layer["w"]
    return y + jnp.broadcast_to(layer["b"], y.shape)


def apply_mlp(layers, x, activation):
    for layer in layers[:-1]:
        x = activation(linear(layer, x))
    return linear(layers[-1], x)


def adam(learning_rate, **options):
    """optax.adam, which promotes dtypes within itself: nothing else here may."""
    tx = optax.adam(learning_rate, **options)

    def update(gradient, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(gradient, state, params)

    return optax.GradientTransformation(tx.init, update)


def host_random(seed, step):
    """Random numbers for one batch: a pure function of (seed, step)."""
    return np.random.Generator(np.random.Philox(key=[seed, step]))


# ---- (a) Two networks that train each other ----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GAN:
    """A GAN on eight Gaussians on a ring."""

    hidden: int = 32  # units of both hidden layers
    batch_size: int = 64  # examples a step
    learning_rate: float = 2e-3  # of both networks
    run: dlx.Run = short_run()


def gan(config):
    """Two states and two optimizers; each step is given the other network as a constant."""
    tx, n = adam(config.learning_rate, b1=0.5), config.batch_size
    modes = np.exp(1j * np.pi / 4 * np.arange(8)).astype(np.complex64)
    modes = np.stack([modes.real, modes.imag], 1)  # (8, 2)

    def init(key, given):
        g, d = jax.random.split(key)
        return {
            "generator": dlx.train_state(g, {"params": mlp(g, 8, config.hidden, 32, 2)}, tx),
            "critic": dlx.train_state(d, {"params": mlp(d, 2, config.hidden, 32, 1)}, tx),
        }

    def sample(generator, key, n=n):
        return apply_mlp(generator, jax.random.normal(key, (n, 8)), nn.relu)

    def critic_loss(params, model_state, batch, key, generator):
        real, fake = (apply_mlp(params, x, nn.relu) for x in (batch["x"], sample(generator, key)))
        return (nn.softplus(-real) + nn.softplus(fake)).mean(), (model_state, {})

    def generator_loss(params, model_state, batch, key, critic):
        fake = apply_mlp(critic, sample(params, key), nn.relu)
        return nn.softplus(-fake).mean(), (model_state, {})

    train_critic, train_generator = (
        dlx.make_step(critic_loss, tx),
        dlx.make_step(generator_loss, tx),
    )

    def step(state, batch):
        critic, d = train_critic(state["critic"], batch, generator=state["generator"].params)
        generator, g = train_generator(state["generator"], batch, critic=critic.params)
        values = {"critic": d["loss"], "generator": g["loss"]}
        return {"critic": critic, "generator": generator}, values

    def data(first_step, rows):
        for t in itertools.count(first_step):
            random = host_random(config.run.seed, t)
            x = modes[random.integers(8, size=n)] + 0.05 * random.standard_normal((n, 2), "f4")
            yield {"x": x[rows(n)]}

    def validation(state):
        """How far samples are from the nearest mode, and how many modes have their share."""
        x = np.asarray(sample(state["generator"].params, jax.random.key(1), 512))
        distance = np.linalg.norm(x[:, None] - modes, axis=-1)  # (512, 8)
        share = np.bincount(distance.argmin(1)[distance.min(1) < 0.4], minlength=8) / 512
        return {"distance": np.median(distance.min(1)), "modes": (share > 0.02).sum()}

    return dlx.Experiment(init, step, data, evals={"validation": validation})


# ---- (b) The state is its own world ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """Actor-critic on CartPole."""

    worlds: int = 16  # played at the same time
    length: int = 16  # steps of each world in one training step
    learning_rate: float = 1e-2  # Adam's
    run: dlx.Run = short_run()


def cartpole(x, action):
    """The cart and pole of Barto, Sutton and Anderson, 1983: (n, 4) -> (n, 4), (n,) has it fallen.

    Cart 1 kg, pole 0.1 kg and half a metre to its centre, 10 N to either side, 20 ms.
    """
    _, speed, angle, spin = x.T
    force, sin, cos = jnp.where(action == 1, 10.0, -10.0), jnp.sin(angle), jnp.cos(angle)
    push = (force + 0.05 * spin**2 * sin) / 1.1
    twist = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    x = x + 0.02 * jnp.stack([speed, push - 0.05 * twist * cos / 1.1, spin, twist], 1)
    return x, (abs(x[:, 0]) > 2.4) | (abs(x[:, 2]) > np.deg2rad(12))


def policy_gradient(config):
    """Worlds live in the state, there is no data, and most steps have no return to report."""
    tx, n = adam(config.learning_rate), config.worlds

    def start(key):
        return jax.random.uniform(key, (n, 4), minval=-0.05, maxval=0.05)

    def init(key, given):
        a, b, c = jax.random.split(key, 3)
        params = {"actor": mlp(a, 4, 32, 2), "critic": mlp(b, 4, 32, 1)}
        world = {"x": start(c), "age": jnp.zeros(n)}
        return {"agent": dlx.train_state(key, {"params": params}, tx), "world": world}

    def play(params, world, key):
        move, again = jax.random.split(key)
        action = jax.random.categorical(move, apply_mlp(params["actor"], world["x"], nn.tanh))
        after, fell = cartpole(world["x"], action)
        age = world["age"] + 1
        done = fell | (age >= 200)
        seen = {"x": world["x"], "after": after, "action": action, "fell": fell, "done": done}
        x, kept = jnp.where(done[:, None], start(again), after), jnp.where(done, 0.0, age)
        return {"x": x, "age": kept}, seen | {"return": jnp.where(done, age, 0.0)}

    def loss_fn(params, model_state, seen, key):
        value = apply_mlp(params["critic"], seen["x"], nn.tanh)[..., 0]  # (length, n)
        next_value = apply_mlp(params["critic"], seen["after"], nn.tanh)[..., 0]

        def back(later, now):  # rewards to come, where they end as the critic expects them
            expected, fell, done = now
            target = 1 + 0.98 * jnp.where(fell, 0.0, jnp.where(done, expected, later))
            return target, target

        now = (next_value, seen["fell"], seen["done"])
        target = jax.lax.scan(back, next_value[-1], now, reverse=True)[1]
        advantage = jax.lax.stop_gradient(target) - value
        log_p = nn.log_softmax(apply_mlp(params["actor"], seen["x"], nn.tanh))
        log_p = jnp.take_along_axis(log_p, seen["action"][..., None], 2)[..., 0]
        policy = -(jax.lax.stop_gradient(advantage) * log_p).mean()
        return policy + 0.5 * (advantage**2).mean(), (model_state, {})

    learn = dlx.make_step(loss_fn, tx, clip_norm=5.0)

    def step(state, batch):
        agent = state["agent"]
        keys = jax.random.split(jax.random.fold_in(agent.key, agent.step), config.length)
        world, seen = jax.lax.scan(lambda w, k: play(agent.params, w, k), state["world"], keys)
        agent, values = learn(agent, seen)
        returns = (seen["return"].sum(), seen["done"].sum().astype(jnp.float32))
        return {"agent": agent, "world": world}, values | {"return": returns}

    return dlx.Experiment(init, step)


# ---- (c) Phases --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DBN:
    """A deep belief network of one layer on handwritten digits."""

    hidden: int = 64  # units of the restricted Boltzmann machine
    batch_size: int = 64  # examples a step
    pretrain_steps: int = 40  # of the first phase
    run: dlx.Run = short_run(best=("validation/accuracy", "max"))  # of the second


def dbn(config):
    """A Boltzmann machine, then a classifier whose first layer starts from it."""
    first = dataclasses.replace(config.run, steps=config.pretrain_steps, best=None)
    return {
        "pretrain": (first, lambda previous: machine(config)),
        "finetune": (config.run, lambda previous: classifier(config)),
    }


def rows_of_digits(name):
    part = digits.load()[name]
    return {"image": part["image"].reshape(-1, 64), "label": part["label"]}


def on_digits(config, init, loss_fn, tx, measure):
    """What both phases share: digits in, a validation and a test out."""
    validation, test = (
        metrics.evaluator(measure, lambda name=name: rows_of_digits(name), 64)
        for name in ("validation", "test")
    )
    data = arrays.batches(lambda: rows_of_digits("train"), config.batch_size, config.run.seed)
    return dlx.Experiment(
        init, dlx.make_step(loss_fn, tx), data, evals={"validation": validation}, test=test
    )


def machine(config):
    """Contrastive divergence (CD-1); its gradient is that of a difference of free energies."""
    tx = optax.sgd(0.1, momentum=0.5)

    def init(key, given):
        layer = mlp(key, 64, config.hidden)[0]
        params = {"w": 0.1 * layer["w"], "b": layer["b"], "visible": jnp.zeros((1, 64))}
        return dlx.train_state(key, {"params": params}, tx)

    def visible(p, h):
        return nn.sigmoid(h @ p["w"].T + p["visible"])

    def free_energy(p, v):
        return -(v * p["visible"]).sum(1) - nn.softplus(linear(p, v)).sum(1)

    def loss_fn(p, model_state, batch, key):
        v0 = batch["image"]
        h0 = jax.random.bernoulli(key, nn.sigmoid(linear(p, v0))).astype(v0.dtype)
        v1 = jax.lax.stop_gradient(visible(p, h0))
        loss = (free_energy(p, v0) - free_energy(p, v1)).mean()
        return loss, (model_state, {"reconstruction": ((v0 - v1) ** 2).mean()})

    def measure(state, batch):
        v, p = batch["image"], state.params
        return {"reconstruction": ((v - visible(p, nn.sigmoid(linear(p, v)))) ** 2).mean(1)}

    return on_digits(config, init, loss_fn, tx, measure)


def classifier(config):
    """Sigmoid units and a linear layer; the units are those of the machine before it."""
    tx = adam(1e-2)

    def init(key, given):
        layers = [{k: given.params[k] for k in ("w", "b")}, *mlp(key, config.hidden, 10)]
        return dlx.train_state(key, {"params": layers}, tx)

    def loss_fn(params, model_state, batch, key):
        logits, label = apply_mlp(params, batch["image"], nn.sigmoid), batch["label"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return loss, (model_state, {"accuracy": metrics.correct(logits, label).mean()})

    def measure(state, batch):
        logits = apply_mlp(state.params, batch["image"], nn.sigmoid)
        return {"accuracy": metrics.correct(logits, batch["label"])}

    return on_digits(config, init, loss_fn, tx, measure)


# ---- (d) An optimizer within an optimizer ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bilevel:
    """Architecture search: which activation has the teacher?"""

    batch_size: int = 64  # of either batch
    rate: float = 0.01  # of the weights, within the outer step and without
    run: dlx.Run = short_run(best=("validation/loss", "min"))


OPERATIONS = (nn.tanh, lambda x: x**2, lambda x: x, jnp.zeros_like)
SQUARE = 1  # which of them the teacher has


def bilevel(config):
    """Weights learn from one batch; their mixture of operations from another, one step ahead."""
    inner, outer, n = optax.sgd(config.rate), adam(0.05), config.batch_size

    def init(key, given):
        choice = jnp.zeros(len(OPERATIONS))
        return {
            "weights": dlx.train_state(key, {"params": mlp(key, 4, 16, 1)}, inner),
            "choice": dlx.train_state(key, {"params": choice}, outer),
        }

    def error(weights, choice, part):
        mix = list(zip(nn.softmax(choice), OPERATIONS, strict=True))
        out = apply_mlp(weights, part["x"], lambda x: sum(a * f(x) for a, f in mix))
        return ((out[:, 0] - part["y"]) ** 2).mean()

    def outer_loss(choice, model_state, batch, key, weights):
        gradient = jax.grad(error)(weights, choice, batch["train"])
        ahead = jax.tree.map(lambda w, g: w - config.rate * g, weights, gradient)
        return error(ahead, choice, batch["val"]), (model_state, {})

    def inner_loss(weights, model_state, batch, key, choice):
        return error(weights, choice, batch["train"]), (model_state, {})

    train_outer, train_inner = dlx.make_step(outer_loss, outer), dlx.make_step(inner_loss, inner)

    def step(state, batch):
        choice, o = train_outer(state["choice"], batch, weights=state["weights"].params)
        weights, i = train_inner(state["weights"], batch, choice=choice.params)
        return {"weights": weights, "choice": choice}, {"inner": i["loss"], "outer": o["loss"]}

    def draw(random):
        x = random.standard_normal((n, 4), "f4")
        teacher = np.array([[1, 0], [0.5, 0.5], [0, -1], [-0.5, 0.5]], "f4")
        return {"x": x, "y": ((x @ teacher) ** 2).sum(1)}

    def data(first_step, rows):
        for t in itertools.count(first_step):
            random = host_random(config.run.seed + 1, t)
            batch = {"train": draw(random), "val": draw(random)}
            yield jax.tree.map(lambda x: x[rows(n)], batch)

    def validation(state):
        weights, choice = state["weights"].params, state["choice"].params
        loss = error(weights, choice, draw(host_random(0, 0)))
        return {"loss": loss, "square": nn.softmax(choice)[SQUARE]}

    return dlx.Experiment(init, step, data, evals={"validation": validation})


# ---- (e) All that a classifier carries along ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Carried:
    """A small convolutional network on handwritten digits."""

    examples: int = 1257  # of the training part
    batch_size: int = 32  # examples a step
    run: dlx.Run = short_run(best=("validation/accuracy", "max"))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False)(x)  # (B, 4, 4, 8)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        x = nn.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return nn.Dense(10)(x)


def bn_dropout_ema(config):
    """Batch statistics, dropout and averaged parameters; validation chooses the result."""
    model, tx = Net(), optax.sgd(0.1, momentum=0.9)

    def init(key, given):
        variables = model.init(key, np.zeros((1, 8, 8, 1), np.float32))
        return dlx.train_state(key, variables, tx, ema=True)

    def measure(state, batch):
        logits = model.apply(state.variables, batch["image"])
        return {"accuracy": metrics.correct(logits, batch["label"])}

    def train():  # ordered by class: a stride takes from all ten
        part = digits.load()["train"]
        return {k: v[:: 1257 // config.examples][: config.examples] for k, v in part.items()}

    validation, test = (
        metrics.evaluator(measure, lambda name=name: digits.load()[name], 64)
        for name in ("validation", "test")
    )
    return dlx.Experiment(
        init,
        dlx.make_step(losses.classification(model), tx, ema=0.9),
        arrays.batches(train, config.batch_size, config.run.seed),
        evals={"validation": validation},
        test=test,
    )


# ---- The command line --------------------------------------------------------------------------


class Shape(NamedTuple):
    Config: Any
    build: Any


SHAPES = {
    "gan": Shape(GAN, gan),
    "policy_gradient": Shape(PolicyGradient, policy_gradient),
    "dbn": Shape(DBN, dbn),
    "bilevel": Shape(Bilevel, bilevel),
    "bn_dropout_ema": Shape(Carried, bn_dropout_ema),
}

if __name__ == "__main__":
    shape = SHAPES[sys.argv.pop(1)]
    dlx.main(shape.Config, shape.build, {"test": shape.Config()})


def slow_but(names, *quick):
    """Parameters of a test; all but these few are for the slow tests, for they compile long."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
