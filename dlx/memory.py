"""The memory of XLA's programs on a CPU, kept from call to call.

XLA asks malloc for a program's temporary values at every call, tens to hundreds of megabytes, and
frees them after it. glibc maps and unmaps blocks of that size each time, so that the system clears
every page anew at its first touch: a third of the time of a small GPT's step. Kept, they are
cleared once. It takes two settings, for glibc keeps such blocks in the first of its arenas alone,
the main thread's, and JAX runs programs in threads of its own: `keep` and `at_once`.

By experiments/benchmarks/record.json, the side "dlx" beside "untouched", which is without: 1.33
times as fast for a CNN of 28 x 28 images, 1.28 and 1.16 for two GPTs, 1.25 for WaveNet, 1.22 for a
translator of GRUs, 1.19 for a U-Net, 1.17 and 1.16 for ResNet-18 and 50, 1.12 for a DCGAN, with at
most 11 % more at the peak of memory (the CNN 16 %); 0.98 to 1.08 for LeNet, an MLP, an RBM, a
VAE, an LSTM and a GRU.

A call that returns when its step has ended hides nothing of what Python does before the next: an
MLP's step takes 8.1 ms, and 7.5 without `at_once` (2 cores of an AMD EPYC). A GPT would keep its 45
MB without it too, for other arenas of glibc's hold blocks of up to 64 MB; but larger ones they map
anew at every call, whatever the settings: a U-Net of 250 MB takes 1.26 times as long.

With one arena for all threads in place of `at_once` steps were as fast, but XLA compiled up to a
third longer, and ResNet-18's peak was 3.0 GB, not 1.4.
"""

from __future__ import annotations

import ctypes
import os
import sys

# <malloc.h>; the values of glibc's MALLOC_TRIM_THRESHOLD_, MALLOC_TOP_PAD_ and MALLOC_MMAP_MAX_
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4


def keep() -> bool:
    """Tells glibc to keep what is freed, up to 2 GB or a quarter of the machine's memory, and to
    map no block for itself; whether it was told. `import dlx` calls it.

    Nothing happens elsewhere than on Linux with glibc, where DLX_KEEP_MEMORY is 0, or where one of
    glibc's own variables (MALLOC_ARENA_MAX and the like) says what to do.
    """
    if not _wanted():
        return False
    libc = ctypes.CDLL(None)
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    settings = {TRIM_THRESHOLD: min(2**31 - 1, quarter), TOP_PAD: 2**26, MMAP_MAX: 0}
    return all([libc.mallopt(name, value) for name, value in settings.items()])


def at_once() -> None:
    """Tells JAX to run the programs of one CPU device in the thread that calls them, where `keep`
    keeps memory. It takes effect before JAX has started its devices; `dlx.nn` and the names of
    `dlx` call it when they are first used.

    A call then returns when the program has ended. Of several devices, and of a GPU or TPU, it
    returns before, as ever. What a loop of your own does on a CPU between two calls no longer
    happens meanwhile: `dlx.fit` reads its batches in a thread.
    """
    if _wanted():
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)


def _wanted() -> bool:
    said = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if sys.platform != "linux" or said or os.environ.get("DLX_KEEP_MEMORY") == "0":
        return False
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
