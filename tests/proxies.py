# SPDX-License-Identifier: Apache-2.0
"""Runs the snippets of ``deploy/proxy`` in real reverse proxies on loopback. Tests."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

SNIPPETS = Path(__file__).parent.parent / "deploy" / "proxy"


@frozen
class Place:
    """Where a proxy runs.

    :ivar folder: for its configuration and its files.
    :ivar guard: host and port of the guard.
    :ivar certificate: PEM files of certificate and key; ``None``: it speaks plain HTTP.
    """

    folder: Path
    port: int
    guard: str
    certificate: tuple[Path, Path] | None = None

    @property
    def url(self) -> str:
        """The address that clients use."""
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self.port}/livekit/jwt"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def nginx(name: str, place: Place) -> list[str]:
    """Configure an nginx with the snippet, with its addresses replaced. :return: its arguments."""
    folder = place.folder
    snippet = (SNIPPETS / name).read_text(encoding="utf-8")
    snippet, replaced = re.subn(r"(127\.0\.0\.1|192\.0\.2\.10):8070", place.guard, snippet)
    assert replaced == 1
    snippet = re.sub(r"^.*\[::\]:443.*\n", "", snippet, flags=re.M)
    if place.certificate is None:
        snippet = re.sub(r"^\s*ssl_certificate.*\n", "", snippet, flags=re.M)
        snippet = snippet.replace("443 ssl http2", f"127.0.0.1:{place.port}")
    else:
        certificate, key = place.certificate
        snippet = re.sub(r"ssl_certificate .*;", f"ssl_certificate {certificate};", snippet)
        snippet = re.sub(r"ssl_certificate_key .*;", f"ssl_certificate_key {key};", snippet)
        snippet = snippet.replace("443 ssl http2", f"127.0.0.1:{place.port} ssl http2")
    if "server {" not in snippet:
        snippet = f"server {{ listen 127.0.0.1:{place.port};\n{snippet} }}"
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr warn;\n"
        f"events {{ }}\nhttp {{ access_log off; {temporary} {snippet} }}\n",
        encoding="utf-8",
    )
    return ["-p", str(folder), "-e", "stderr", "-c", f"{folder}/nginx.conf"]


def caddy(name: str, place: Place) -> list[str]:
    """Configure a Caddy with the snippet, with its addresses replaced. :return: its arguments."""
    snippet = (SNIPPETS / name).read_text(encoding="utf-8")
    snippet = snippet.replace("127.0.0.1:8070", place.guard)
    scheme = "http" if place.certificate is None else "https"
    tls = "" if place.certificate is None else "\n\ttls {} {}".format(*place.certificate)
    site = f"{scheme}://127.0.0.1:{place.port} {{{tls}"
    snippet = re.sub(r"^matrix-rtc\.example\.org \{", site, snippet, flags=re.M)
    config = place.folder / "Caddyfile"
    config.write_text("{\n\tadmin off\n\tauto_https off\n}\n" + snippet, encoding="utf-8")
    return ["run", "--config", str(config), "--adapter", "caddyfile"]


PROXIES: dict[str, Callable[[str, Place], list[str]]] = {
    "nginx.conf": nginx,
    "nginx-proxy-manager.conf": nginx,
    "Caddyfile": caddy,
}
"""What each snippet is for."""


def program_for(snippet: str) -> str | None:
    """The installed proxy that a snippet is for."""
    return shutil.which(PROXIES[snippet].__name__, path=os.environ["PATH"] + ":/usr/sbin")


def begun(program: str, snippet: str, place: Place) -> subprocess.Popen[bytes]:
    """The running proxy; its output is in ``output``."""
    command = [program, *PROXIES[snippet](snippet, place)]
    with (place.folder / "output").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env={"HOME": str(place.folder)})


def is_listening(place: Place) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", place.port)) == 0
