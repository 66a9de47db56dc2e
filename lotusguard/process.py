# SPDX-License-Identifier: Apache-2.0
"""Settings of the process itself: its clock, its garbage collector, its memory, its limit of open files."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from typing import Any

_malloc_trim: Any = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it


def use_monotonic_time(reactor: Any) -> None:
    """Let the reactor's timers follow the monotonic clock.

    Twisted takes ``reactor.seconds()`` from the wall clock. A step of the wall clock would then delay every timer by
    as much. This is called before anything is scheduled, because times of the two clocks cannot be compared.

    :raises RuntimeError: something is scheduled already.
    """
    if reactor.seconds is time.monotonic:
        return
    if reactor.getDelayedCalls():
        raise RuntimeError("the reactor's clock cannot be changed once something is scheduled")
    reactor.seconds = time.monotonic


def tune_garbage_collector() -> None:
    """Exclude the objects that exist now, which are permanent, and collect less often: a join makes hundreds of
    objects, and reference counting frees nearly all of them.

    There is no collection before: it would make the start 6 % longer and free 0.1 MB, because collections during the
    import have freed the rest.
    """
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


async def return_free_memory() -> None:
    """Give back to the system what the C library keeps of freed memory; call it every few seconds.

    glibc keeps all that lies below anything that is still used: 136 MB, and for good, after eight answers of 16 MB that
    came at the same time. This takes 0.02 ms if there is nothing to give back, and 8 ms for 100 MB.
    """
    if _malloc_trim is not None:
        _malloc_trim(0)


def raise_file_limit() -> None:
    """Allow as many open files as the system permits: a join that is held takes two descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
