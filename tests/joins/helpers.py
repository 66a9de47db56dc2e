# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of joins: what was answered, what upstream was asked, and a second homeserver."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from lotusguard.clients.http import Answer
from lotusguard.rules.tokens import read_unverified
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.sandbox.synapse.homeserver import FakeSynapse

FULL = {"errcode": "M_FORBIDDEN", "error": "This voice channel is full."}
NOT_A_MEMBER = {"errcode": "M_FORBIDDEN", "error": "You are not a member of this room."}
NOT_STARTED = {"errcode": "M_FORBIDDEN", "error": "This call has not been started yet."}
HOMESERVER_NOT_ALLOWED = {
    "errcode": "M_FORBIDDEN",
    "error": "Calls here are not open to users of your homeserver.",
}
EVE = "@eve:other.local"


def content(answer: Answer) -> Any:
    return json.loads(answer.body)


def claims_of(answer: Answer) -> dict[str, Any]:
    """The claims of the token in an answer."""
    claims = read_unverified(content(answer)["jwt"])
    assert claims is not None
    return claims


def ask(sandbox: Sandbox, user: str, room_id: str, **how: Any) -> Deferred[Answer]:
    """Ask for a token without waiting for the answer."""
    return Deferred.fromCoroutine(sandbox.ask_token(user, room_id, **how))


def bodies(sandbox: Sandbox) -> list[dict[str, Any]]:
    """The token requests that upstream has received, oldest first."""
    return [json.loads(asked.body) for asked in sandbox.upstream.seen if asked.path in ("/sfu/get", "/get_token")]


def calls_of(sandbox: Sandbox, method: str) -> int:
    """How often LiveKit was asked for something."""
    return sum(asked.path.endswith("/" + method) for asked in sandbox.livekit.seen)


@asynccontextmanager
async def other_homeserver(sandbox: Sandbox, *users: str) -> AsyncIterator[FakeSynapse]:
    """A homeserver ``other.local`` that upstream knows and the guard does not. :param users: localparts."""
    other = FakeSynapse(reactor, server_name="other.local")
    await other.start()
    try:
        for user in users or ("eve",):
            other.add_user(user)
        sandbox.upstream.homeservers["other.local"] = other.url
        yield other
    finally:
        await other.stop()
