# SPDX-License-Identifier: Apache-2.0
"""What a client sees of a request that is held: silence, then an early head and white space, then the answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from lotusguard.clients.http import Answer
from lotusguard.guard.joins.patience import Patience
from lotusguard.guard.lobby import LobbyStopped
from lotusguard.metrics import Metrics
from lotusguard.rules.refusals import JoinRefused, Refusal
from lotusguard.web.handlers import RequestHandler
from lotusguard.web.held import PROXIED_SILENCE, PUBLIC_SILENCE
from lotusguard.web.public import PublicApi

TOKEN = Answer(200, [(b"Content-Type", b"application/json")], b'{"jwt": "x"}\n')


@define
class Lobbied:
    """An admission in which everybody waits."""

    outcome: Deferred[Answer] = field(factory=Deferred)
    patience: list[Patience] = field(factory=list)

    async def join(self, request: Any, request_id: str, forward: Any, patience: Patience) -> Answer:
        self.patience.append(patience)
        patience.begin()
        return await self.outcome


class Connection(StringTransport):
    """A client's connection, in memory."""

    aborted = False

    def abortConnection(self) -> None:
        self.aborted = True
        self.loseConnection()


def held(
    clock: Clock, silence: float = PUBLIC_SILENCE, path: str = "/sfu/get", *headers: str
) -> tuple[Lobbied, Connection]:
    """A request that waits, and its connection."""
    lobbied = Lobbied()
    handler = RequestHandler(lobbied, None, clock, Metrics(), idle=15, silence=silence)  # type: ignore[arg-type]
    site = PublicApi(handler, None).site(clock, max_body=65536)  # type: ignore[arg-type]
    site.startFactory()
    channel, connection = site.buildProtocol(None), Connection()
    channel.makeConnection(connection)
    body = json.dumps({"room": "!room:example.org", "device_id": "A"})
    lines = [f"POST {path} HTTP/1.1", "Host: guard", f"Content-Length: {len(body)}", *headers, "", body]
    channel.dataReceived("\r\n".join(lines).encode())
    return lobbied, connection


def head_and_chunks(sent: bytes) -> tuple[bytes, bytes]:
    """The head of an answer, and its body put together from its chunks."""
    head, _, rest = sent.partition(b"\r\n\r\n")
    body = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return head, body


@pytest.mark.parametrize("silence", [PUBLIC_SILENCE, PROXIED_SILENCE])
def test_nothing_is_sent_before_the_silence_ends(silence: float) -> None:
    clock = Clock()
    _, connection = held(clock, silence)
    clock.advance(silence - 0.1)
    assert connection.value() == b""
    clock.advance(0.1)
    head, body = head_and_chunks(connection.value())
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Access-Control-Allow-Origin: *" in head
    assert b"Content-Type: application/json" in head
    assert body == b" "


def test_a_quick_refusal_is_a_real_403() -> None:
    lobbied, connection = held(Clock())
    lobbied.outcome.errback(JoinRefused(Refusal.NOT_ADMITTED))
    assert connection.value().startswith(b"HTTP/1.1 403 ")


def test_after_the_early_head_there_is_white_space_and_then_the_token() -> None:
    clock = Clock()
    lobbied, connection = held(clock)
    clock.advance(PUBLIC_SILENCE)
    clock.pump([10.0] * 3)
    lobbied.outcome.callback(TOKEN)
    _, body = head_and_chunks(connection.value())
    assert body == b"    " + TOKEN.body
    assert json.loads(body) == {"jwt": "x"}
    sent = len(connection.value())
    clock.advance(30.0)
    assert len(connection.value()) == sent


def test_after_the_early_head_a_refusal_is_the_error_as_the_body() -> None:
    clock = Clock()
    lobbied, connection = held(clock)
    clock.advance(PUBLIC_SILENCE)
    lobbied.outcome.errback(JoinRefused(Refusal.NOBODY_ADMITTED))
    head, body = head_and_chunks(connection.value())
    assert head.startswith(b"HTTP/1.1 200 ")
    assert json.loads(body) == {"errcode": "M_FORBIDDEN", "error": "Nobody admitted you in time."}
    assert not connection.aborted


def test_a_stopping_guard_drops_a_silent_request_without_an_answer() -> None:
    lobbied, connection = held(Clock())
    assert lobbied.patience[0].is_silent()
    lobbied.outcome.errback(LobbyStopped())
    assert connection.aborted
    assert connection.value() == b""


def test_a_request_past_the_early_head_is_not_silent() -> None:
    clock = Clock()
    lobbied, _ = held(clock)
    clock.advance(PUBLIC_SILENCE)
    assert not lobbied.patience[0].is_silent()


@pytest.mark.parametrize(
    ("path", "headers", "polls"),
    [
        ("/sfu/get", ["Prefer: respond-async"], True),
        ("/sfu/get", ["Prefer: wait=10, Respond-Async;x=1"], True),
        ("/get_token?lobby=poll", [], True),
        ("/get_token?a=b&lobby=poll", [], True),
        ("/sfu/get?lobby=polling", ["Prefer: return=minimal"], False),
        ("/sfu/get", [], False),
    ],
)
def test_clients_say_in_a_header_or_the_query_that_they_poll(path: str, headers: list[str], polls: bool) -> None:
    lobbied, _ = held(Clock(), PUBLIC_SILENCE, path, *headers)
    assert lobbied.patience[0].polls is polls
