# SPDX-License-Identifier: Apache-2.0
"""The proxy snippets for several guards, in real proxies where they are installed: a guard is taken away in mid-run."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as default_reactor
from twisted.internet.task import deferLater
from twisted.web.resource import Resource
from twisted.web.server import Site

from lotusguard.clients.http import BytesBody, FixedAgent, collected, connection_pool
from tests.proxies import SNIPPETS, free_port

reactor: Any = default_reactor
ASKED = 30


class Guard(Resource):
    """Answers POST requests, and counts them."""

    isLeaf = True

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        site = Site(self)
        site.noisy = False
        self.listening = reactor.listenTCP(0, site, interface="127.0.0.1")
        self.port: int = self.listening.getHost().port

    def render_POST(self, request: Any) -> bytes:
        self.asked += 1
        request.setHeader(b"Connection", b"close")
        return b"{}"


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


def caddy(folder: Path, port: int, ports: list[int]) -> list[str]:
    text = (SNIPPETS.parent / "docker" / "Caddyfile.several").read_text()
    text = text[text.index("\nmatrix-rtc.{$DOMAIN} {") :].replace("matrix-rtc.{$DOMAIN}", f"http://127.0.0.1:{port}")
    text = text.replace("lotusguard:8070 lotusguard-2:8070", " ".join(f"127.0.0.1:{port}" for port in ports))
    (folder / "Caddyfile").write_text("{\n\tadmin off\n\tauto_https off\n}\n" + text)
    return ["run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@pytest.fixture(params=[nginx, caddy], ids=["nginx", "caddy"])
def proxy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[int, list[Guard]]]:
    """A proxy before two guards."""
    program = shutil.which(request.param.__name__, path="/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip(f"there is no {request.param.__name__}")
    guards, port = [Guard(), Guard()], free_port()
    command = [program, *request.param(tmp_path, port, [guard.port for guard in guards])]
    with (tmp_path / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={"HOME": str(tmp_path)})
    yield port, guards
    process.send_signal(signal.SIGTERM)
    process.wait(20)


@pytest_twisted.ensureDeferred
async def test_clients_do_not_notice_that_a_guard_is_gone(proxy: tuple[int, list[Guard]]) -> None:
    port, guards = proxy
    pool = connection_pool(reactor)
    agent = FixedAgent(reactor, f"http://127.0.0.1:{port}", pool, 30)

    async def ask() -> int:
        response = await agent.request(b"POST", b"/livekit/jwt/sfu/get", None, BytesBody(b"{}"))
        await collected(response, 1 << 16)
        return int(response.code)

    for _ in range(1200):
        try:
            await ask()
            break
        except Exception:
            await deferLater(reactor, 0.05)
    codes = Counter([await ask() for _ in range(ASKED)])
    assert codes == {200: ASKED}
    assert all(guard.asked for guard in guards)
    await guards[0].listening.stopListening()
    before = guards[1].asked
    codes = Counter([await ask() for _ in range(ASKED)])
    assert codes == {200: ASKED}
    assert guards[1].asked == before + ASKED, "a request was sent twice"
    await guards[1].listening.stopListening()
    await pool.closeCachedConnections()
