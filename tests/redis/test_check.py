# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` and ``/readyz`` say in one line what is wrong with Redis, and what to do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.protocol import Factory, Protocol

from lotusguard.check.redis import RedisCheck
from lotusguard.check.report import Finding, Findings, Report
from lotusguard.clients.redis import faults, link
from tests.conftest import StartSandbox, until

from .conftest import OwnServer
from .guards import reactor
from .server import start_server
from .slow import slow_proxy


async def checked(url: str) -> dict[str, Finding]:
    report = Report()
    await RedisCheck(url, Findings(report, "redis"), reactor, 5.0).run()
    return {finding.asked: finding for finding in report.findings}


def states(found: dict[str, Finding]) -> set[str]:
    return {finding.state for finding in found.values()}


@pytest_twisted.ensureDeferred
async def test_a_server_that_can_be_used_is_fine(own_server: OwnServer) -> None:
    found = await checked(own_server.url)
    assert states(found) == {"fine"}
    assert set(found) == {"reachable", "scripts", "round trip", "maxmemory-policy", "messages"}


@pytest_twisted.ensureDeferred
async def test_nobody_listens() -> None:
    found = await checked("redis://127.0.0.1:1")
    assert found["reachable"].state == "wrong"
    assert "GUARD_REDIS_URL" in found["reachable"].remedy


@pytest_twisted.ensureDeferred
async def test_a_port_of_another_program_is_named_by_check_and_readyz(start_sandbox: StartSandbox) -> None:
    sandbox = await start_sandbox()
    url = sandbox.livekit.url.replace("http://", "redis://")
    found = await checked(url)
    assert found["reachable"].reason == "no connection: not_redis"
    assert found["reachable"].remedy == faults.ADVICE["not_redis"]
    await sandbox.guard.stopService()
    await sandbox.start_guard(guard_redis_url=url)
    await until_readyz_says(sandbox, faults.ADVICE["not_redis"])


@asynccontextmanager
async def speaks_first(greeting: bytes) -> AsyncIterator[str]:
    """A program that greets each caller. :return: its URL as if it were Redis."""

    class Other(Protocol):
        def connectionMade(self) -> None:
            assert self.transport is not None
            self.transport.write(greeting)

    port = reactor.listenTCP(0, Factory.forProtocol(Other), interface="127.0.0.1")
    yield f"redis://127.0.0.1:{port.getHost().port}"
    await port.stopListening()


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x15\x03\x01\x00\x02\x02\x46"])
@pytest_twisted.ensureDeferred
async def test_a_program_that_speaks_first_or_wants_tls_is_not_redis(greeting: bytes) -> None:
    async with speaks_first(greeting) as url:
        found = await checked(url)
    assert found["reachable"].reason == "no connection: not_redis"


@pytest_twisted.ensureDeferred
async def test_a_server_in_protected_mode_refuses_other_machines() -> None:
    async with speaks_first(b"-DENIED Running in protected mode because protected mode is enabled.\r\n") as url:
        found = await checked(url)
    assert found["reachable"].reason == "no connection: protected_mode"
    assert "protected-mode no" in found["reachable"].remedy


@pytest_twisted.ensureDeferred
async def test_a_wrong_password(own_server: OwnServer) -> None:
    own_server.client.config_set("requirepass", "right")
    found = await checked(f"redis://:wrong@127.0.0.1:{own_server.port}")
    assert "wrong_password" in found["reachable"].reason
    assert found["reachable"].remedy == faults.ADVICE["wrong_password"]


@pytest_twisted.ensureDeferred
async def test_a_replica(own_server: OwnServer) -> None:
    replica = start_server(config={"replicaof": f"127.0.0.1 {own_server.port}"})
    try:
        found = await checked(f"redis://127.0.0.1:{replica.port}")
    finally:
        replica.stop()
    assert "read_only" in found["reachable"].reason


@pytest_twisted.ensureDeferred
async def test_an_old_version(own_server: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "OLDEST_VERSION", (99, 0))
    assert "wrong_version" in (await checked(own_server.url))["reachable"].reason


@pytest_twisted.ensureDeferred
async def test_memory_that_is_full_and_a_policy_that_deletes_seats(own_server: OwnServer) -> None:
    own_server.client.config_set("maxmemory", "1mb")
    own_server.client.config_set("maxmemory-policy", "noeviction")
    found = await checked(own_server.url)
    assert "out_of_memory" in found["scripts"].reason
    own_server.client.config_set("maxmemory", "1gb")
    own_server.client.config_set("maxmemory-policy", "allkeys-lru")
    assert (await checked(own_server.url))["maxmemory-policy"].state == "warning"


@pytest.mark.parametrize(
    ("rules", "asked"), [("&lotusguard:* +@read +@pubsub", "scripts"), ("+@all -subscribe &*", "messages")]
)
@pytest_twisted.ensureDeferred
async def test_a_user_who_may_do_too_little(own_server: OwnServer, rules: str, asked: str) -> None:
    own_server.client.execute_command(
        "ACL", "SETUSER", "guard", "on", ">pw", "~lotusguard:*", "-@all", "+info", "+ping", "+time", *rules.split()
    )
    found = await checked(f"redis://guard:pw@127.0.0.1:{own_server.port}")
    assert found[asked].state == "wrong"
    assert found[asked].remedy == faults.ADVICE["no_permission"]


@pytest_twisted.ensureDeferred
async def test_a_slow_server(own_server: OwnServer) -> None:
    async with slow_proxy(own_server.port, 0.3) as proxy:
        assert (await checked(proxy.url))["round trip"].state == "warning"


async def readyz(sandbox: Any) -> str:
    return str(json.loads((await sandbox.operator("GET", "/readyz")).body)["reasons"])


@pytest_twisted.ensureDeferred
async def test_readyz_says_what_to_do(start_sandbox: StartSandbox, own_server: OwnServer) -> None:
    own_server.client.config_set("requirepass", "right")
    sandbox = await start_sandbox(guard_redis_url=f"redis://:wrong@127.0.0.1:{own_server.port}")
    await until_readyz_says(sandbox, faults.ADVICE["wrong_password"])


async def until_readyz_says(sandbox: Any, advice: str) -> None:
    asked = 0
    while advice not in await readyz(sandbox):
        asked += 1
        assert asked < 200
        await until(lambda: True)
