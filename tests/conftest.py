"""Tests are strict: 8 devices, no silent promotion of dtype or rank, warnings are errors."""

import os
from pathlib import Path

# Before jax is imported. Tests that start a process of their own inherit all but the devices.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dlx" / "jax-tests"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"
# Nearly all the time is XLA's: without LLVM's optimisation its programs are there in half of it.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def mesh():
    """One device: what most tests train on."""
    from dlx import sharding

    return sharding.make_mesh("data=1", jax.devices()[:1])


@pytest.fixture(autouse=True)
def cached():
    """A switch of the compilation cache, which the command line uses too; on after each test."""

    def switch(on):
        jax.config.update("jax_enable_compilation_cache", on)
        compilation_cache.reset_cache()

    yield switch
    if not jax.config.jax_enable_compilation_cache:
        switch(True)


@pytest.fixture
def x64():
    """float64 for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def promoting():
    """The promotion that flax and optax need within themselves; ours stays strict elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def constants(monkeypatch):
    """monkeypatch for what functions read while they are traced: such traces do not outlive it."""
    jax.clear_caches()
    yield monkeypatch
    jax.clear_caches()
