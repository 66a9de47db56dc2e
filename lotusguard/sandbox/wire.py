# SPDX-License-Identifier: Apache-2.0
"""Requests and answers of the stand-ins, as they are sent. Sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lotusguard.clients.http import BodyTooLarge, collected

ANSWER_READ = 1024 * 1024
"""The longest answer, in bytes, that a stand-in reads."""


async def answer_of(response: Any) -> bytes:
    """The body of an answer to a stand-in. :raises ValueError: it is too large; the connection is dropped."""
    try:
        return await collected(response, ANSWER_READ)
    except BodyTooLarge:
        raise ValueError("too_large") from None


@dataclass(frozen=True)
class Asked:
    """A request as a stand-in received it."""

    method: str
    target: bytes
    """The request target with the query string, undecoded."""
    headers: tuple[tuple[str, str], ...]
    body: bytes = field(repr=False)

    @property
    def path(self) -> str:
        """The path, still percent-encoded; also of a target in absolute form."""
        target = self.target.decode("latin-1")
        if not target.startswith("/") and "://" in target:
            target = "/" + target.partition("://")[2].partition("/")[2]
        return target.partition("?")[0]

    @property
    def query(self) -> str:
        """The query string, undecoded."""
        return self.target.decode("latin-1").partition("?")[2]

    def header(self, name: str) -> str | None:
        """The first header of that name, in any case."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)

    def json(self) -> Any:
        """The body, parsed as JSON. :raises ValueError: it is not JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """A complete answer."""

    status: int = 200
    body: bytes = b""
    headers: Sequence[tuple[str, str]] = ()

    def header(self, name: str) -> str | None:
        """The first header of that name, in any case."""
        wanted = name.lower()
        return next((value for key, value in self.headers if key.lower() == wanted), None)


class Refusal(Exception):
    """Raised in a stand-in to answer with ``reply``."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply
