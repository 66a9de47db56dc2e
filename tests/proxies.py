# SPDX-License-Identifier: Apache-2.0
"""Runs the snippets of ``deploy/proxy`` in real reverse proxies on loopback. Tests.

The variables ``NGINX``, ``CADDY`` and ``TRAEFIK`` name other programs than those on ``PATH``.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
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


def traefik(name: str, place: Place) -> list[str]:
    """Configure a Traefik with the labels of the snippet, with its addresses replaced. :return: its arguments."""
    dynamic = traefik_settings(name, [f"http://{place.guard}"])
    for router in dynamic["http"]["routers"].values():
        router["rule"] = router["rule"].replace("matrix-rtc.example.org", "127.0.0.1")
        del router["tls"]
        if place.certificate is not None:
            router["tls"] = {}
    if place.certificate is not None:
        certificate, key = place.certificate
        own = {"certFile": str(certificate), "keyFile": str(key)}
        dynamic["tls"] = {"stores": {"default": {"defaultCertificate": own}}}
    return traefik_arguments(place.folder, place.port, dynamic)


def traefik_settings(name: str, guards: list[str]) -> dict[str, Any]:
    """What Traefik makes of the labels of a snippet, as a file of its file provider."""
    labels = yaml.safe_load((SNIPPETS / name).read_text(encoding="utf-8"))["services"]["lotusguard"]["labels"]
    assert labels.pop("traefik.enable") == "true"
    settings: dict[str, Any] = {}
    for label, value in labels.items():
        *path, last = label.split(".")[1:]
        at = settings
        for word in path:
            at = at.setdefault(word, {})
        at[last] = value.split(",") if last == "middlewares" else value
    for service in settings["http"]["services"].values():
        del service["loadbalancer"]["server"]
        service["loadbalancer"]["servers"] = [{"url": guard} for guard in guards]
    return settings


def traefik_arguments(folder: Path, port: int, dynamic: dict[str, Any]) -> list[str]:
    """Write these settings. :return: arguments of a Traefik that has them, and else its own defaults."""
    (folder / "traefik.yaml").write_text(yaml.safe_dump(dynamic), encoding="utf-8")
    return [
        f"--entryPoints.websecure.address=127.0.0.1:{port}", f"--providers.file.filename={folder}/traefik.yaml",
        "--global.checkNewVersion=false", "--global.sendAnonymousUsage=false",
    ]  # fmt: skip


PROXIES: dict[str, Callable[[str, Place], list[str]]] = {
    "nginx.conf": nginx,
    "nginx-proxy-manager.conf": nginx,
    "Caddyfile": caddy,
    "traefik.yaml": traefik,
}
"""The program that each snippet configures."""


def installed(name: str) -> str | None:
    """The path of a proxy: the value of the variable of this name in upper case, or what is on ``PATH``."""
    return os.environ.get(name.upper()) or shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")


def program_for(snippet: str) -> str | None:
    """The path of the proxy that a snippet is for."""
    return installed(PROXIES[snippet].__name__)


def begun(program: str, snippet: str, place: Place) -> subprocess.Popen[bytes]:
    """Start the proxy. It writes its output to the file ``output``."""
    command = [program, *PROXIES[snippet](snippet, place)]
    with (place.folder / "output").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env={"HOME": str(place.folder)})


def is_listening(place: Place) -> bool:
    with socket.socket() as knock:
        return knock.connect_ex(("127.0.0.1", place.port)) == 0
