# SPDX-License-Identifier: Apache-2.0
"""x"""
import gc, resource, time
from typing import Any
def use_monotonic_time(reactor: Any) -> None:
    reactor.seconds = time.monotonic
def tune_garbage_collector() -> None:
    gc.collect(); gc.freeze(); gc.set_threshold(20_000, 50, 50)
def raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
