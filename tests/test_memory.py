"""malloc keeps what XLA's programs free, and leaves people's own settings alone."""

import os
import platform
import subprocess
import sys

import pytest

from dlx import memory

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="what is set is glibc's own malloc"
)

FAULTS = """
import resource
{use}
import jax, jax.numpy as jnp

@jax.jit
def program(x):
    a, b = jax.lax.optimization_barrier((x + 1, 2 * x))
    return (a @ b[:, :1]).sum()

x = jnp.ones((4096, 4096))
for i in range(40):
    if i == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(x))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def faults(use, **environment):
    """Pages that the system clears in a call of a program with 134 MB of temporary values: of what
    is below 32 MB, malloc keeps some by itself."""
    ours = ("MALLOC_", "GLIBC_TUNABLES", "DLX_KEEP_MEMORY")
    around = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    command = [sys.executable, "-c", FAULTS.replace("{use}", use)]
    return int(subprocess.check_output(command, env=around | environment, text=True))


@glibc
@pytest.mark.parametrize("use", ["from dlx import nn", "import dlx; dlx.Run(steps=1)"])
def test_memory_is_kept(use):
    kept, untouched = faults(use), faults(use, DLX_KEEP_MEMORY="0")
    assert 4 * kept < untouched


@pytest.mark.parametrize(
    "name, value",
    [("DLX_KEEP_MEMORY", "0"), ("MALLOC_ARENA_MAX", "4"), ("GLIBC_TUNABLES", "glibc.rtld=1")],
)
def test_settings_of_ones_own(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert memory.keep() is False


def test_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.keep() is False
