# SPDX-License-Identifier: Apache-2.0
"""Fixtures for a Valkey that a test may stop, and for the one that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from secrets import token_hex
from typing import Any

import pytest

from .server import age, shared_server, start_server


@pytest.fixture
def url() -> str:
    """The server that tests share. Each test uses rooms of its own."""
    return f"redis://127.0.0.1:{shared_server().port}"


class OwnServer:
    """A server of a test's own, which guards seem to have used before. It keeps nothing when it is stopped."""

    def __init__(self) -> None:
        self._server = start_server(save="")
        age(self._server)
        self.port: int = self._server.port
        self.running = True

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def client(self) -> Any:
        return self._server.client()

    def stop(self) -> None:
        if self.running:
            self._server.stop()
        self.running = False

    def start_again(self) -> None:
        self._server = start_server(port=self.port, save="")
        self.running = True


@pytest.fixture
def own_server() -> Iterator[OwnServer]:
    server = OwnServer()
    yield server
    server.stop()


@pytest.fixture
def room() -> str:
    return f"!{token_hex(4)}:sandbox.local"
