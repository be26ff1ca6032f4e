"""The memory of XLA's programs on a CPU, kept from call to call.

XLA asks malloc for a program's temporary values at every call, tens to hundreds of megabytes, and
frees them after it. glibc maps and unmaps blocks of that size each time, so that the system clears
every page anew at its first touch: a third of the time of a small GPT's step. Kept, they are
cleared once. Steps on 2 cores of an Intel Xeon at 2.5 GHz, float32, jax 0.12: a CNN of 28 x 28
images 59 -> 41 ms, a GPT of 4 layers of width 128 56 -> 38, of 6 of width 384 1,140 -> 990,
ResNet-18 1,870 -> 1,530; an LSTM and a VAE gain nothing. The price is memory: ResNet-18's peak
grows from 1.4 to 1.9 GB. The sides "dlx" and "untouched" of `python -m experiments.benchmarks` are
with and without.
"""

from __future__ import annotations

import ctypes
import os
import sys

# <malloc.h>; the values of glibc's MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_, ...
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX, ARENA_MAX = -1, -2, -4, -8


def keep() -> bool:
    """Tells glibc to keep what is freed, up to 2 GB or a quarter of the machine's memory, and to
    map no block for itself; whether it was told. `import dlx` calls it: threads that malloc knows
    already, as those of a JAX in use, are beyond its reach.

    There is one arena for all threads, though XLA then compiles 11 to 33 % longer and LeNet's step
    is slower: of several arenas all but the first map large blocks whatever they are told.

    Nothing happens elsewhere than on Linux with glibc, where DLX_KEEP_MEMORY is 0, or where one of
    glibc's own variables (MALLOC_ARENA_MAX and the like) says what to do.
    """
    said = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform != "linux" or said or os.environ.get("DLX_KEEP_MEMORY") == "0":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    wanted = {TRIM_THRESHOLD: min(2**31 - 1, quarter), TOP_PAD: 2**26, MMAP_MAX: 0, ARENA_MAX: 1}
    return all([libc.mallopt(name, value) for name, value in wanted.items()])
