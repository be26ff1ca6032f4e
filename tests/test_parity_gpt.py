"""GPT against transformers' GPT-2 in float64, every parameter perturbed.

Needs torch and transformers, or skips.
"""

import os
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlx.models import gpt
from dlx.nn import losses

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install transformers"
)
# torchvision's compiled operators (unused here) may belong to another torch.
with mock.patch("torch.library.register_fake", lambda *a, **k: lambda f: f):
    from transformers import GPT2Config, GPT2LMHeadModel

V, T, L, H, W = 17, 9, 2, 3, 12


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied, x64, promoting):
    """Logits, loss and the gradient of every parameter."""
    random = np.random.default_rng(0)
    config = GPT2Config(
        vocab_size=V, n_positions=T, n_embd=W, n_layer=L, n_head=H, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).double().train()
    with torch.no_grad():
        for x in theirs.parameters():
            x.add_(0.2 * torch.from_numpy(random.normal(size=tuple(x.shape))))
    ours = gpt.GPT(V, T, L, H, W, dropout=0.0, tied=tied)
    text = random.integers(0, V, (3, T + 1))
    tokens, targets = text[:, :-1], text[:, 1:]

    def arrays(named):
        state = {k: v.detach().numpy() for k, v in named}
        return jax.tree.map(jnp.asarray, gpt.from_torch(state, tied=tied))

    variables = arrays(theirs.state_dict().items())
    shapes = jax.eval_shape(ours.init, jax.random.key(0), jnp.asarray(tokens))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)

    logits = theirs(torch.from_numpy(tokens)).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten()
    )
    loss.backward()
    wanted = arrays([(k, p.grad) for k, p in theirs.named_parameters()])["params"]

    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(targets)}
    step = jax.jit(jax.value_and_grad(losses.language(ours), has_aux=True))
    (value, _), found = step(variables["params"], {}, batch, jax.random.key(0))
    np.testing.assert_allclose(ours.apply(variables, batch["tokens"]), logits.detach(), atol=1e-8)
    assert abs(float(value) - loss.item()) <= 1e-8
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        assert np.abs(b).max() > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=1e-8, rtol=0, err_msg=jax.tree_util.keystr(path))


def test_what_is_no_parameter():
    """Old checkpoints hold the mask, and some have no "transformer." before their names."""
    state = {"h.0.attn.bias": np.ones((1, 1, T, T)), "h.0.attn.masked_bias": np.ones(()),
             "h.0.attn.c_attn.bias": np.ones(3 * W), "transformer.wpe.weight": np.ones((T, W)),
             "lm_head.weight": np.ones((V, W))}  # fmt: skip
    found = gpt.from_torch(state)["params"]
    assert list(found) == ["block0", "positions"]
    assert found["block0"] == {"attention": {"qkv": {"bias": state["h.0.attn.c_attn.bias"]}}}
