"""Drawing tokens: what is cut, how often what is left is drawn, and that the state goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dlx
from dlx.models import rnn
from dlx.tasks import generate

P = np.array([0.05, 0.4, 0.1, 0.25, 0.2])


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, [0, 1, 2, 3, 4]), ({"top_k": 2}, [1, 3]), ({"top_k": 9}, [0, 1, 2, 3, 4]),
     ({"top_p": 0.3}, [1]), ({"top_p": 0.64}, [1, 3]), ({"top_p": 0.66}, [1, 3, 4]),
     ({"top_p": 1e-6}, [1]),
     # Of the two that are left 0.4 has 0.615.
     ({"top_k": 2, "top_p": 0.6}, [1]), ({"top_k": 2, "top_p": 0.62}, [1, 3])],
)  # fmt: skip
def test_what_is_cut(options, kept):
    logits = jnp.log(jnp.array([P, P[::-1]]))
    got = np.asarray(generate.cut(logits, **options))
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == kept
    assert sorted((4 - np.flatnonzero(np.isfinite(got[1]))).tolist()) == kept
    np.testing.assert_array_equal(got[0][kept], np.asarray(logits)[0][kept])


def test_of_equal_tokens_k_are_kept():
    assert (
        np.isfinite(np.asarray(generate.cut(jnp.zeros(6), top_k=3))).tolist()
        == [True] * 3 + [False] * 3
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_how_often(temperature):
    """As p^(1 / temperature) has it, among the three that are left."""
    keys = jax.random.split(jax.random.key(0), 20_000)
    draw = jax.jit(jax.vmap(lambda k: generate.draw(k, jnp.log(jnp.array(P)), temperature, 3)))
    got = np.bincount(np.asarray(draw(keys)), minlength=5) / 20_000
    want = P ** (1 / temperature) * [0, 1, 0, 1, 1]
    np.testing.assert_allclose(got, want / want.sum(), atol=0.015)


def test_temperature_zero_takes_the_most_probable():
    logits = jax.random.normal(jax.random.key(0), (50, 7))
    got = generate.draw(jax.random.key(1), logits, 0)
    np.testing.assert_array_equal(got, logits.argmax(-1))


V = 11


@pytest.fixture(scope="module")
def apply():
    model = rnn.LanguageModel(V, 8, 2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    variables = jax.tree.map(lambda p: 4 * p, variables)  # far from uniform
    return lambda tokens, state: model.apply(variables, tokens, state)


@pytest.mark.parametrize("steps", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_the_state_goes_on(apply, steps):
    """Greedy text is what reading the whole of it anew would give at each place."""
    prompt = np.array([[1, 2, 3], [7, 7, 0]], np.int32)
    got = generate.generate(apply, prompt, steps, jax.random.key(0), temperature=0)
    assert got.shape == (2, steps) and got.dtype == jnp.int32
    text = prompt
    for _ in range(steps):
        text = np.concatenate([text, np.asarray(apply(text, None)[0][:, -1:].argmax(-1))], 1)
    np.testing.assert_array_equal(got, text[:, 3:])


def test_a_longer_text_begins_as_a_shorter_one(apply):
    def run(steps, seed=0, **options):
        return np.asarray(
            generate.generate(
                apply, np.ones((2, 1), np.int32), steps, jax.random.key(seed), **options
            )
        )

    np.testing.assert_array_equal(run(20)[:, :9], run(9))
    assert (run(20) != run(20, 1)).any() and (run(20)[0] != run(20)[1]).any()
    np.testing.assert_array_equal(run(20, top_k=1), run(20, temperature=0.0))


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [([[1, V]], {}, f"token {V} of the prompt is beyond the vocabulary: give 0 to {V - 1}"),
     ([[-1]], {}, "token -1 of the prompt"), ([[]], {}, r"the prompt has shape \(1, 0\)"),
     ([1], {}, r"the prompt has shape \(1,\)"),
     ([[1]], {"temperature": -1.0}, "temperature is -1.0"), ([[1]], {"top_k": -1}, "top_k is -1"),
     ([[1]], {"top_p": 0.0}, "top_p is 0.0"), ([[1]], {"top_p": 1.5}, "top_p is 1.5")],
)  # fmt: skip
def test_what_cannot_be_drawn(apply, prompt, options, message):
    with pytest.raises(dlx.BadInput, match=message):
        generate.generate(apply, np.array(prompt, np.int32), 3, jax.random.key(0), **options)


def test_no_length(apply):
    with pytest.raises(dlx.BadInput, match="length is 0"):
        generate.generate(apply, np.ones((1, 1), np.int32), 0, jax.random.key(0))
