# SPDX-License-Identifier: Apache-2.0
"""Limits on what callers can make the guard hold: time, bytes, connections and memory."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import pytest_twisted
from klein import Klein
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport

from lotusguard.guard.calls import changes
from lotusguard.guard.rooms import remembered
from lotusguard.guard.seats import kept_rooms, memory, registry
from lotusguard.rules.requests import TOKEN_ROUTES
from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.web.bodies import RELAYED_FACTOR, SMALL, BodyPool, caller_of
from lotusguard.web.site import DISCARDED, RECEIVE_TIMEOUT, GuardSite
from tests.calls import ALICE, BOB, CAROL, counted, room_of
from tests.conftest import StartSandbox, until
from tests.raw_http import connect, exchange

HEAD = b"POST /sfu/get HTTP/1.1\r\nHost: x\r\n"


# -- time, on a clock that the tests advance ------------------------------------------------------------------------


class Wire:
    """A connection to a site, without a socket."""

    def __init__(self, max_body: int = 1000) -> None:
        self.clock = Clock()
        app = Klein()
        self.answers: list[Deferred[bytes]] = []

        @app.route("/never")
        def never(request: Any) -> Deferred[bytes]:
            self.answers.append(Deferred())
            return self.answers[-1]

        self.site = GuardSite(app, self.clock, max_body=max_body)
        self.transport = StringTransport()
        self.channel = self.site.buildProtocol(None)
        self.channel.makeConnection(self.transport)

    @property
    def hung_up(self) -> bool:
        return bool(self.transport.disconnecting)


@pytest.mark.parametrize("sent", [b"", b"GET /never", HEAD, HEAD + b"Content-Length: 500\r\n\r\n{", b"\r\n"])
def test_incomplete_request_times_out(sent: bytes) -> None:
    wire = Wire()
    wire.channel.dataReceived(sent)
    wire.clock.advance(RECEIVE_TIMEOUT - 1)
    assert not wire.hung_up
    wire.clock.advance(2)
    assert wire.hung_up


@pytest.mark.parametrize("start", [b"GET /never HTTP/1.1\r\nX-A: ", HEAD + b"Content-Length: 900\r\n\r\n"])
def test_arriving_bytes_do_not_extend_the_timeout(start: bytes) -> None:
    wire = Wire()
    wire.channel.dataReceived(start)
    for _ in range(RECEIVE_TIMEOUT - 1):
        wire.clock.advance(1)
        wire.channel.dataReceived(b"a")
        assert not wire.hung_up
    wire.clock.advance(2)
    assert wire.hung_up


def test_timeout_pauses_during_an_answer_and_restarts_for_the_next_request() -> None:
    wire = Wire()
    wire.channel.dataReceived(b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n")
    wire.clock.advance(RECEIVE_TIMEOUT * 10)
    assert not wire.hung_up
    wire.answers[0].callback(b"late")
    assert wire.transport.value().endswith(b"\r\n\r\n4\r\nlate\r\n0\r\n\r\n")
    wire.clock.advance(RECEIVE_TIMEOUT - 1)
    assert not wire.hung_up
    wire.clock.advance(2)
    assert wire.hung_up


# -- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest_twisted.ensureDeferred
async def test_body_over_the_limit_gets_413_and_is_not_forwarded(start_sandbox: StartSandbox, chunked: bool) -> None:
    sandbox = await start_sandbox(guard_max_body=2048, guard_reconcile_interval=3600)
    for path in (*TOKEN_ROUTES, "/sfu_webhook", "/other"):
        token = path in TOKEN_ROUTES
        body = b'{"room":"' + b"x" * 2048 * (1 if token else RELAYED_FACTOR) + b'"}'
        framing, sent = f"Content-Length: {len(body)}", body
        if chunked:
            framing, sent = "Transfer-Encoding: chunked", b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode()
        after = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        refused, next_one = await exchange(sandbox.url, head + sent + after)
        assert (path, refused.code, refused.json()["errcode"]) == (path, 413, "M_TOO_LARGE")
        assert (path, refused.all("access-control-allow-origin")) == (path, ["*"] if token else [])
        assert next_one.code == 200
    assert counted(sandbox, "bodies_rejected_total", reason="too_large") == len(TOKEN_ROUTES) + 2
    assert {asked.path for asked in sandbox.upstream.seen} == {"/healthz"}


@pytest_twisted.ensureDeferred
async def test_relayed_body_may_be_16_times_as_large_as_a_token_request(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_max_body=2048, guard_reconcile_interval=3600)
    for size, code in ((2048, 404), (2048 * 16, 404), (2048 * 16 + 1, 413), (500_000, 413)):
        assert (await sandbox.request("POST", sandbox.url + "/other", b"x" * size)).code == code
    assert len(sandbox.upstream.seen[-1].body) == 2048 * 16
    padding = b" " * (2048 - len(b'{"room":"!r:x"}'))
    for body, code in ((b'{"room":"!r:x"}' + padding, 400), (b'{"room":"!r:x"} ' + padding, 413)):
        assert (await sandbox.request("POST", sandbox.url + "/sfu/get", body)).code == code
    assert (await sandbox.request("PUT", sandbox.url + "/sfu/get", b"x" * 4096)).code == 405


def test_huge_body_is_not_kept_in_memory_and_its_connection_is_closed() -> None:
    wire = Wire(max_body=1000)
    wire.channel.dataReceived(HEAD + b"Content-Length: 999999999\r\n\r\n")
    piece = b"x" * 1024 * 1024
    for _ in range(DISCARDED // len(piece)):
        assert not wire.hung_up
        wire.channel.dataReceived(piece)
    wire.channel.dataReceived(piece)
    assert wire.hung_up
    assert wire.site.pool.held == 0


def post(size: int, *headers: bytes) -> bytes:
    """The head of a request whose body has this size."""
    return HEAD + b"".join(line + b"\r\n" for line in (*headers, b"Content-Length: %d" % size)) + b"\r\n"


@pytest_twisted.ensureDeferred
async def test_body_that_does_not_fit_the_pool_gets_503_and_is_not_forwarded(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_max_body=100_000, guard_reconcile_interval=3600)
    pool = sandbox.guard.public.site.pool
    pool.limit = pool.share = 200_000
    holding = [await connect(sandbox.url) for _ in range(2)]
    for caller in holding:
        caller.send(post(100_000) + b"x" * 99_999)
    await until(lambda: pool.held > 2 * (99_000 - SMALL))
    for path in (b"/sfu/get", b"/other"):
        payload = post(90_000, b"Connection: close").replace(b"/sfu/get", path) + b"{" * 90_000
        (answer,) = await exchange(sandbox.url, payload)
        assert (answer.code, answer.json()["errcode"]) == (503, "M_LIMIT_EXCEEDED")
        assert answer.all("access-control-allow-origin") == []
    assert counted(sandbox, "bodies_rejected_total", reason="no_room") == 2
    assert list(sandbox.upstream.seen) == []
    for caller in holding:
        caller.drop()
    await until(lambda: pool.held == 0)
    assert (await sandbox.request("POST", sandbox.url + "/other", b"x" * 90_000)).code == 404
    await until(lambda: pool.held == 0)


@pytest_twisted.ensureDeferred
async def test_small_bodies_are_accepted_while_the_pool_is_full(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_max_body=100_000, guard_reconcile_interval=3600)
    pool = sandbox.guard.public.site.pool
    assert pool.take("192.0.2.1", pool.share)
    pool.limit = pool.held
    assert (await sandbox.ask_token(ALICE, room_of(sandbox, 1))).code == 200
    for size, code in ((SMALL, 404), (SMALL + 1, 503)):
        assert (await sandbox.request("POST", sandbox.url + "/other", b"x" * size)).code == code


@pytest_twisted.ensureDeferred
async def test_one_caller_behind_the_reverse_proxy_gets_only_a_share_of_the_pool(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox(guard_max_body=100_000, guard_reconcile_interval=3600)
    pool = sandbox.guard.public.site.pool
    pool.share = 150_000
    greedy = b"X-Forwarded-For: 8.8.4.4, 8.8.8.8"
    holding = await connect(sandbox.url)
    holding.send(post(1_000_000, greedy) + b"x" * 150_000)
    await until(lambda: pool.held > 100_000)
    for header, code in ((greedy, 503), (b"X-Forwarded-For: 8.8.8.8, 8.8.4.4", 404)):
        payload = post(90_000, header, b"Connection: close").replace(b"/sfu/get", b"/other") + b"x" * 90_000
        (answer,) = await exchange(sandbox.url, payload)
        assert answer.code == code
    holding.drop()
    await until(lambda: pool.held == 0)


def test_pool_counts_bytes_in_total_and_per_caller() -> None:
    pool = BodyPool(largest=100, limit=300, share=200)
    assert pool.take("a", 150)
    assert not pool.take("a", 51)
    assert pool.take("b", 150)
    assert not pool.take("c", 1)
    pool.give_back("a", 150)
    assert pool.take("c", 150)
    assert pool.held == 300


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "caller"),
    [
        ("8.8.8.8", b"", "8.8.8.8"),
        ("8.8.8.8", b"9.9.9.9", "8.8.8.8"),  # its own word
        ("127.0.0.1", b"9.9.9.9", "9.9.9.9"),
        ("10.0.0.2", b"1.1.1.1, 9.9.9.9", "9.9.9.9"),
        ("::1", b"9.9.9.9", "9.9.9.9"),
        ("::ffff:127.0.0.1", b"9.9.9.9", "9.9.9.9"),
        (None, b"9.9.9.9", "9.9.9.9"),
        (None, b"", ""),
        ("127.0.0.1", b"unknown", "127.0.0.1"),
        ("2a00:1450:4001:82a::200e", b"", "2a00:1450:4001:82a::"),
        ("127.0.0.1", b"2a00:1450:4001:82a::1", "2a00:1450:4001:82a::"),
    ],
)
def test_caller_is_the_peer_or_the_address_named_by_the_reverse_proxy(
    peer: str | None, forwarded_for: bytes, caller: str
) -> None:
    assert caller_of(peer, forwarded_for) == caller


# -- floods --------------------------------------------------------------------------------------------------


@pytest_twisted.ensureDeferred
async def test_hundreds_of_silent_connections_do_not_block_callers(sandbox: Sandbox) -> None:
    room_id = room_of(sandbox, 1)
    silent = [await connect(sandbox.url) for _ in range(300)]
    for n, caller in enumerate(silent):
        caller.send([b"", b"POST /sfu/get HT", HEAD, HEAD + b"Content-Length: 500\r\n\r\n{"][n % 4])
    began = sandbox.reactor.seconds()
    assert (await sandbox.ask_token(ALICE, room_id)).code == 200
    assert (await sandbox.ask_token(BOB, room_id)).code == 403
    assert sandbox.reactor.seconds() - began < 15
    for caller in silent:
        assert caller.open
        caller.drop()
    await until(lambda: len(sandbox.guard.public.site.channels) <= 2)


def entries(metrics: str) -> dict[str, tuple[float, float]]:
    """The number of entries and the limit of each cache."""
    values: dict[tuple[str, str], float] = {
        (kind, cache): float(value)
        for kind, cache, value in re.findall(r'^lotusguard_cache_(\w+)\{cache="(\w+)"\} (\S+)$', metrics, re.MULTILINE)
    }
    return {cache: (values["entries", cache], values["limit", cache]) for kind, cache in values if kind == "limit"}


@pytest_twisted.ensureDeferred
async def test_flood_of_rooms_keeps_caches_bounded_and_seats_held(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        (kept_rooms, "ROOMS_KEPT"), (registry, "ALIASES_KEPT"), (registry, "IDENTITIES_KEPT"),
        (changes, "EVENTS_REMEMBERED"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 40)
    monkeypatch.setattr(remembered, "POLICIES_KEPT", 40 * remembered.ENTRY_SIZE)
    sandbox = await start_sandbox(guard_reconcile_interval=3600, guard_members_only="off")
    kept = room_of(sandbox, 1)
    await sandbox.enter(ALICE, kept)
    small = [sandbox.homeserver.create_room() for _ in range(60)]
    for room_id in small:
        sandbox.homeserver.set_state(room_id, "io.lotus.voice_limit", {"max_users": 2})
    unknown = [f"!nobody{n}:sandbox.local" for n in range(60)]
    for batch in range(0, 60, 10):
        asked = [
            sandbox.ask_token(CAROL, room_id, new=n % 2 == 0, device=f"D{n}")
            for n, room_id in enumerate(small[batch : batch + 10] + unknown[batch : batch + 10])
        ]
        answers = await gatherResults([Deferred.fromCoroutine(ask) for ask in asked])
        assert {answer.code for answer in answers} == {200}
        assert (await sandbox.ask_token(BOB, kept)).code == 403
        for number in range(10):
            event = json.dumps({"id": f"EV_{batch}_{number}", "event": "room_started", "room": {"name": "x"}}).encode()
            headers = {"Authorization": sandbox.livekit.webhooks.authorization(event)}
            await sandbox.request("POST", sandbox.url + "/sfu_webhook", event, headers)
    caches = entries((await sandbox.operator("GET", "/metrics")).body.decode())
    known, limit = caches["policies"]  # in bytes: the limit in entries holds for policies of the usual size
    assert 30 <= known <= limit == 40
    assert caches["aliases"] == (40, 40)
    assert [cache for cache, (has, may) in caches.items() if has > may] == []


@pytest_twisted.ensureDeferred
async def test_flood_of_slots_keeps_the_limit_enforced_and_memory_bounded(
    start_sandbox: StartSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client chooses the slot, and each slot is an SFU room of its own."""
    monkeypatch.setattr(registry, "ALIASES_KEPT", 8)
    monkeypatch.setattr(registry, "IDENTITIES_KEPT", 8)
    sandbox = await start_sandbox(guard_reconcile_interval=3600)
    room_id = room_of(sandbox, 1)
    await sandbox.enter(ALICE, room_id)
    slots = [f"slot{n}" for n in range(50)]
    codes = [(await sandbox.ask_token(ALICE, room_id, new=True, slot_id=slot)).code for slot in slots]
    further = memory.SLOTS_PER_ROOM - 1
    assert codes == [200] * further + [429] * (50 - further)
    assert (await sandbox.ask_token(BOB, room_id, new=True, slot_id=slots[0])).code == 403
    caches = entries((await sandbox.operator("GET", "/metrics")).body.decode())
    assert [cache for cache, (has, may) in caches.items() if has > may] == []
