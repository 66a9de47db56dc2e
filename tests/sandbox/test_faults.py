# SPDX-License-Identifier: Apache-2.0
"""Faults of the stand-ins, over real sockets, and that stopped stand-ins leave nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
import treq
from twisted.internet import reactor as twisted_reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock, deferLater
from twisted.web.client import Agent, ResponseFailed
from twisted.web.iweb import IResponse

from lotusguard.sandbox.faults import Fault, mistyped
from lotusguard.sandbox.synapse.homeserver import FakeSynapse
from lotusguard.sandbox.wire import Reply
from tests.conftest import until

reactor: Any = twisted_reactor

VERSIONS = "/_matrix/client/versions"


@asynccontextmanager
async def homeserver(clock: Any = None) -> AsyncIterator[FakeSynapse]:
    standin = FakeSynapse(reactor, clock=clock)
    await standin.start()
    try:
        yield standin
    finally:
        await standin.stop()
        assert not standin.in_flight


async def get(url: str) -> tuple[IResponse, bytes]:
    response = await Agent(reactor).request(b"GET", url.encode())
    return response, await treq.content(response)


async def pause(seconds: float = 0.05) -> None:
    await deferLater(reactor, seconds)


@pytest_twisted.ensureDeferred
async def test_a_stand_in_without_faults_answers_and_records_requests() -> None:
    async with homeserver() as synapse:
        response, body = await get(synapse.url + VERSIONS + "?a=%2F")
        assert (response.code, body[:12]) == (200, b'{"versions":')
        assert synapse.asked["versions"] == 1
        assert synapse.seen[0].target == VERSIONS.encode() + b"?a=%2F"


@pytest_twisted.ensureDeferred
async def test_status_invalid_response_and_redirect_replace_the_answer() -> None:
    async with homeserver() as synapse:
        for fault, code in (
            (Fault.status(503), 503),
            (Fault.invalid_response(), 200),
            (Fault.redirect("http://127.0.0.1:1/"), 302),
        ):
            synapse.fault = fault
            response, body = await get(synapse.url + VERSIONS)
            assert response.code == code
            assert b"versions" not in body


@pytest_twisted.ensureDeferred
async def test_a_fault_may_be_limited_to_a_route_and_a_number_of_requests() -> None:
    async with homeserver() as synapse:
        synapse.faults["versions"] = Fault.status(500, times=2)
        codes = [(await get(synapse.url + VERSIONS))[0].code for _ in range(3)]
        assert codes == [500, 500, 200]
        synapse.faults["whoami"] = Fault.status(500)
        assert (await get(synapse.url + VERSIONS))[0].code == 200


@pytest_twisted.ensureDeferred
async def test_a_hanging_request_ends_when_the_caller_disconnects() -> None:
    async with homeserver() as synapse:
        synapse.fault = Fault.hang()
        waiting = Deferred.fromCoroutine(get(synapse.url + VERSIONS))
        await pause()
        assert len(synapse.in_flight) == 1
        waiting.cancel()
        with pytest.raises((CancelledError, ResponseFailed)):
            await waiting
        await pause()
        assert not synapse.in_flight


@pytest_twisted.ensureDeferred
async def test_delay_follows_the_clock_of_the_stand_in() -> None:
    clock = Clock()
    async with homeserver(clock) as synapse:
        synapse.fault = Fault.delay(30)
        waiting = Deferred.fromCoroutine(get(synapse.url + VERSIONS))
        await pause()
        assert not waiting.called
        clock.advance(30)
        response, _ = await waiting
        assert response.code == 200


@pytest.mark.parametrize("fault", [Fault.close(), Fault.truncated(), Fault.late_close()])
@pytest_twisted.ensureDeferred
async def test_broken_answers_are_errors_for_the_caller(fault: Fault) -> None:
    async with homeserver() as synapse:
        synapse.fault = fault
        with pytest.raises(ResponseFailed):
            await get(synapse.url + VERSIONS)


class _Reader(Protocol):
    """Reads the first chunk and pauses until resumed."""

    got = 0

    def dataReceived(self, data: bytes) -> None:
        if not self.got:
            self.hold(True)
        self.got += len(data)

    def hold(self, hold: bool) -> None:
        transport: Any = self.transport
        (transport.pauseProducing if hold else transport.resumeProducing)()


@pytest_twisted.ensureDeferred
async def test_a_too_large_answer_is_sent_as_fast_as_it_is_read_until_the_caller_disconnects() -> None:
    async with homeserver() as synapse:
        synapse.fault = Fault.too_large()
        reader = _Reader()
        response = await Agent(reactor).request(b"GET", (synapse.url + VERSIONS).encode())
        response.deliverBody(reader)
        await pause()
        # Only what fits into the sockets' buffers comes while nobody reads.
        held = reader.got
        await pause()
        assert reader.got == held < 10_000_000
        reader.hold(False)
        await until(lambda: reader.got > held + 10_000_000)
        reader.transport.loseConnection()  # type: ignore[union-attr]
        await pause()
        assert not synapse.in_flight


@pytest_twisted.ensureDeferred
async def test_drip_sends_one_byte_at_a_time() -> None:
    clock = Clock()
    async with homeserver(clock) as synapse:
        synapse.fault = Fault.drip(1)
        response = await Agent(reactor).request(b"GET", (synapse.url + VERSIONS).encode())
        body = Deferred.fromCoroutine(_whole(response))
        await pause()
        assert not body.called
        for _ in range(int(response.length)):
            clock.advance(1)
        assert (await body).startswith(b'{"versions"')


async def _whole(response: IResponse) -> bytes:
    return await treq.content(response)


def test_wrong_types_keep_the_format() -> None:
    reply = Reply(200, b'{"state":[{"a":1}],"n":3,"s":"x","d":{"k":true}}', [("Content-Type", "application/json")])
    assert mistyped(reply).body == b'{"state": {"0": [[1]]}, "n": [3], "s": 7, "d": ["true"]}'


@pytest_twisted.ensureDeferred
async def test_after_stop_listening_connections_are_refused_until_it_listens_again() -> None:
    async with homeserver() as synapse:
        await get(synapse.url + VERSIONS)
        await synapse.stop_listening()
        with pytest.raises(ConnectionRefusedError):
            await get(synapse.url + VERSIONS)
        before = synapse.url
        await synapse.listen()
        assert synapse.url == before
        assert (await get(before + VERSIONS))[0].code == 200
