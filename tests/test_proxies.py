# SPDX-License-Identifier: Apache-2.0
"""The snippets in ``deploy/proxy``, run in real reverse proxies where they are installed, in front of the guard."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from lotusguard.sandbox.demo.sandbox import Sandbox
from lotusguard.web.bodies import RELAYED_FACTOR
from tests.calls import ALICE, BOB, room_of
from tests.proxies import PROXIES, Place, begun, free_port, is_listening, program_for

Start = Callable[[str, Sandbox], Awaitable[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the proxy that a snippet is for. :return: the address that clients would use."""
    running: list[subprocess.Popen[bytes]] = []

    async def started(name: str, sandbox: Sandbox) -> str:
        program = program_for(name)
        if program is None:
            pytest.skip(f"there is no {PROXIES[name].__name__}")
        place = Place(tmp_path, free_port(), sandbox.url.removeprefix("http://"))
        running.append(begun(program, name, place))
        for _ in range(1200):
            # Traefik listens before it knows its routes.
            if is_listening(place) and (await sandbox.request("GET", f"{place.url}/healthz")).code == 200:
                return place.url
            await deferLater(reactor, 0.05)
        raise AssertionError((tmp_path / "output").read_text())

    yield started
    for process in running:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.mark.parametrize("snippet", PROXIES)
@pytest_twisted.ensureDeferred
async def test_joins_are_decided_behind_a_proxy(sandbox: Sandbox, start: Start, snippet: str) -> None:
    address = await start(snippet, sandbox)
    room_id = room_of(sandbox, 1)

    async def ask(user: str) -> tuple[int, dict[str, str], Sequence[str] | None]:
        body = {"room": room_id, "device_id": "PHONE", "openid_token": sandbox.homeserver.openid_token(user)}
        answer = await sandbox.request(
            "POST", f"{address}/sfu/get", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return answer.code, json.loads(answer.body), answer.headers.getRawHeaders("access-control-allow-origin")

    code, given, allowed = await ask(ALICE)
    assert (code, allowed) == (200, ["*"])
    sandbox.livekit.connect(given["jwt"])
    code, given, allowed = await ask(BOB)
    assert (code, given["error"], allowed) == (403, "This voice channel is full.", ["*"])
    asked = next(asked for asked in sandbox.upstream.seen if asked.path == "/sfu/get")
    assert asked.header("X-Forwarded-For") == "127.0.0.1, 127.0.0.1"


@pytest.mark.parametrize("snippet", PROXIES)
@pytest_twisted.ensureDeferred
async def test_webhooks_are_not_reachable_through_a_proxy(sandbox: Sandbox, start: Start, snippet: str) -> None:
    address = await start(snippet, sandbox)
    spellings = (
        "sfu_webhook",
        "sfu%5Fwebhook",
        "%73fu_webhook?x=1",
        "/sfu_webhook",
        "x/../sfu_webhook",
        "./sfu_webhook/",
    )
    for spelling in spellings:
        answer = await sandbox.request("POST", f"{address}/{spelling}", b"{}")
        assert answer.code == 404, spelling
    assert sandbox.upstream.asked["sfu_webhook"] == 0
    forged = sandbox.guard.metrics.webhooks.labels("forged")._value.get()
    assert forged == 0, "it reached the guard"
    assert (await sandbox.request("GET", f"{address}/healthz")).code == 200


@pytest.mark.parametrize("snippet", PROXIES)
@pytest_twisted.ensureDeferred
async def test_proxies_refuse_what_the_guard_would_refuse_and_nothing_smaller(
    sandbox: Sandbox, start: Start, snippet: str
) -> None:
    address = await start(snippet, sandbox)
    limit = sandbox.settings.guard_max_body * RELAYED_FACTOR
    answer = await sandbox.request("POST", f"{address}/other", b"x" * limit)
    assert answer.code == 404, "lk-jwt-service's own answer"
    answer = await sandbox.request("POST", f"{address}/other", b"x" * (limit + 1))
    assert answer.code == 413
