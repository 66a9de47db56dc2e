# SPDX-License-Identifier: Apache-2.0
"""The proxy snippets for several guards, in real proxies where they are installed: one of the guards goes away."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from attrs import frozen
from twisted.internet import reactor as default_reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.task import deferLater
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site

from lotusguard.clients.http import ConnectionPool, FixedAgent, fetch
from tests.proxies import SNIPPETS, free_port, installed, traefik_arguments, traefik_settings

reactor: Any = default_reactor
ASKED = 30


class Guard(Resource):
    """Answers POST requests with their body, and counts them.

    :ivar drops: read each request, and close the connection without an answer.
    """

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.drops = False
        site = Site(self)
        site.noisy = False
        self.listening = reactor.listenTCP(0, site, interface="127.0.0.1")
        self.port: int = self.listening.getHost().port

    def render_POST(self, request: Any) -> bytes | int:
        self.asked += 1
        if self.drops:
            request.transport.abortConnection()
            return NOT_DONE_YET
        request.setHeader(b"Connection", b"close")
        return bytes(request.content.read())


def nginx(folder: Path, port: int, ports: list[int]) -> list[str]:
    text = (SNIPPETS / "nginx.conf").read_text()
    text = re.sub(r"^    server 127.0.0.1:8070;\n", "", text, flags=re.M)
    text, replaced = re.subn(
        r"#(server 127.0.0.1:)1807([12])", lambda found: f"server 127.0.0.1:{ports[int(found[2]) - 1]}", text
    )
    assert replaced == 2
    text = re.sub(r"^.*\[::\]:443.*\n|^\s*ssl_certificate.*\n", "", text, flags=re.M)
    text = text.replace("443 ssl http2", f"127.0.0.1:{port}")
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr warn;\n"
        f"events {{ }}\nhttp {{ access_log off; {temporary} {text} }}\n"
    )
    return ["-p", str(folder), "-e", "stderr", "-c", f"{folder}/nginx.conf"]


def sends_again(program: str) -> bool:
    """Whether a proxy sends a request with a body to another guard if it could not be sent to the first one.

    Caddy does since 2.11.2.
    """
    if not program.endswith("caddy"):
        return True
    told = subprocess.run([program, "build-info"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"caddyserver/caddy/v2\s+v(\d+)\.(\d+)\.(\d+)", told)
    return found is not None and tuple(map(int, found.groups())) >= (2, 11, 2)


def caddy(folder: Path, port: int, ports: list[int]) -> list[str]:
    text = (SNIPPETS.parent / "docker" / "Caddyfile.several").read_text()
    text = text[text.index("\nmatrix-rtc.{$DOMAIN} {") :].replace("matrix-rtc.{$DOMAIN}", f"http://127.0.0.1:{port}")
    text = text.replace("lotusguard:8070 lotusguard-2:8070", " ".join(f"127.0.0.1:{port}" for port in ports))
    (folder / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https off\n}\n" + text)
    return ["run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


def traefik(folder: Path, port: int, ports: list[int]) -> list[str]:
    settings = traefik_settings("traefik.yaml", [f"http://127.0.0.1:{port}" for port in ports])
    for router in settings["http"]["routers"].values():
        router["rule"] = router["rule"].replace("matrix-rtc.example.org", "127.0.0.1")
        del router["tls"]
    (option,) = re.findall(r"# (--serversTransport\S+)", (SNIPPETS / "traefik.yaml").read_text())
    return [*traefik_arguments(folder, port, settings), option]


CONFIGURE = {"nginx": nginx, "caddy": caddy, "traefik": traefik}


@frozen
class Proxy:
    """A running proxy before two guards."""

    program: str
    port: int
    guards: tuple[Guard, Guard]


@pytest.fixture(params=CONFIGURE)
def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Proxy]:
    name: str = request.param
    program = installed(name)
    if program is None:
        pytest.skip(f"there is no {name}")
    guards, port = (Guard(), Guard()), free_port()
    command = [program, *CONFIGURE[name](tmp_path, port, [guard.port for guard in guards])]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={"HOME": str(tmp_path)})
    yield Proxy(program, port, guards)
    process.send_signal(signal.SIGTERM)
    process.wait(20)


class Client:
    """Asks the proxy."""

    def __init__(self, port: int) -> None:
        self.pool = ConnectionPool(reactor)
        self._agent = FixedAgent(reactor, f"http://127.0.0.1:{port}", self.pool, 30)

    async def ask(self) -> int:
        return (await self.answer(b"{}"))[0]

    async def answer(self, body: bytes) -> tuple[int, bytes]:
        answer = await fetch(self._agent, b"POST", b"/livekit/jwt/sfu/get", Headers(), body, limit=1 << 16)
        return answer.code, answer.body

    async def answered(self) -> None:
        """Wait until the proxy runs. Traefik listens before it knows its routes."""
        for _ in range(1200):
            try:
                if await self.ask() == 200:
                    return
            except Exception:
                pass
            await deferLater(reactor, 0.05)
        raise AssertionError("the proxy does not answer")


@pytest_twisted.ensureDeferred
async def test_clients_do_not_notice_that_a_guard_is_gone(proxy: Proxy) -> None:
    if not sends_again(proxy.program):
        pytest.skip("this Caddy loses the body of a request that it could not send")
    client = Client(proxy.port)
    await client.answered()
    codes = Counter([await client.ask() for _ in range(ASKED)])
    assert codes == {200: ASKED}
    assert all(guard.asked for guard in proxy.guards)
    gone, left = proxy.guards
    await gone.listening.stopListening()
    before = left.asked
    codes = Counter([await client.ask() for _ in range(ASKED)])
    assert codes == {200: ASKED}
    assert left.asked == before + ASKED, "a request was sent twice"
    await left.listening.stopListening()
    await client.pool.close()


@pytest_twisted.ensureDeferred
async def test_each_client_gets_the_answer_to_its_own_request_while_a_guard_is_gone(proxy: Proxy) -> None:
    if not sends_again(proxy.program):
        pytest.skip("this Caddy loses the body of a request that it could not send")
    client = Client(proxy.port)
    await client.answered()
    gone, left = proxy.guards
    await gone.listening.stopListening()
    for first in range(100, 500, 40):
        bodies = [b'{"user": %d}' % number for number in range(first, first + 40)]
        answers = await gatherResults([Deferred.fromCoroutine(client.answer(body)) for body in bodies])
        assert answers == [(200, body) for body in bodies]
    await left.listening.stopListening()
    await client.pool.close()


@pytest_twisted.ensureDeferred
async def test_clients_wait_a_moment_for_a_guard_whose_machine_does_not_answer(proxy: Proxy) -> None:
    if not sends_again(proxy.program):
        pytest.skip("this Caddy loses the body of a request that it could not send")
    client = Client(proxy.port)
    await client.answered()
    lost, left = proxy.guards
    await lost.listening.stopListening()
    with no_connections(lost.port):
        codes = Counter([await client.ask() for _ in range(4)])
    assert codes == {200: 4}
    await left.listening.stopListening()
    await client.pool.close()


@contextmanager
def no_connections(port: int) -> Iterator[None]:
    """Answer no attempt to connect to a port, neither yes nor no."""
    with socket.socket() as full, socket.socket() as first:
        full.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        full.bind(("127.0.0.1", port))
        full.listen(0)
        first.connect(("127.0.0.1", port))
        yield


@pytest_twisted.ensureDeferred
async def test_a_request_that_a_guard_received_is_not_sent_to_another_one(proxy: Proxy) -> None:
    client = Client(proxy.port)
    await client.answered()
    before = sum(guard.asked for guard in proxy.guards)
    for guard in proxy.guards:
        guard.drops = True
    assert await client.ask() == 502
    assert sum(guard.asked for guard in proxy.guards) == before + 1
    for guard in proxy.guards:
        await guard.listening.stopListening()
    await client.pool.close()
