# SPDX-License-Identifier: Apache-2.0
"""What others can reach past the guard: lk-jwt-service's own port, its homeserver routes, LiveKit's RoomService."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import define

from lotusguard.check.asking import Asking, NoAnswer, Service, json_of
from lotusguard.check.report import Findings

LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""
PROXIED_ROUTE = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token"
"""A route that a homeserver proxies; it believes the user named in a header."""
PROTOBUF = {"Content-Type": "application/protobuf"}
ROOM_SERVICE = "/twirp/livekit.RoomService/ListRooms"


def listening_addresses(port: int, proc: Path = Path("/proc/net")) -> list[str] | None:
    """The addresses of this machine on which something listens on a TCP port; None if the kernel does not tell."""
    sockets = listening_sockets(port, proc)
    return None if sockets is None else sorted({address for address, _ in sockets})


def is_held_by_systemd(port: int, processes: Path = Path("/proc")) -> bool:
    """Whether systemd itself listens on a TCP port, for a socket unit. Only root can tell; for others it is False.

    In a container process 1 is another program, such as the guard.
    """
    inodes = {inode for _, inode in listening_sockets(port, processes / "net") or ()}
    try:
        if (processes / "1" / "comm").read_text(encoding="utf-8").strip() != "systemd":
            return False
        links = [str(descriptor.readlink()) for descriptor in (processes / "1" / "fd").iterdir()]
    except OSError:
        return False
    return any(link == f"socket:[{inode}]" for link in links for inode in inodes)


def listening_sockets(port: int, proc: Path = Path("/proc/net")) -> list[tuple[str, str]] | None:
    """The sockets that listen on a TCP port, as address and inode; None if the kernel does not tell."""
    found: list[tuple[str, str]] = []
    known = False
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / name).read_text(encoding="ascii").splitlines()[1:]
        except (OSError, UnicodeDecodeError):
            continue
        known = True
        for line in lines:
            fields = line.split()
            if len(fields) > 3 and fields[3] == LISTEN:
                address, _, number = fields[1].partition(":")
                if int(number, 16) == port:
                    found.append((_address(address), fields[9] if len(fields) > 9 else ""))
    return found if known else None


def _address(text: str) -> str:
    """An address as the kernel writes it: words of 32 bits, in hexadecimal and little-endian."""
    packed = b"".join(bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8))
    address = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


async def is_guard(service: Service) -> bool | None:
    """Whether a token route is a guard's; None if it is no token route at all, or does not tell.

    A guard refuses a room name of more than 255 bytes as unreadable. lk-jwt-service reads it, and then finds that the
    OpenID token is not valid. Neither does anything for such a request.

    :raises NoAnswer:
    """
    openid = {"access_token": "x", "token_type": "Bearer", "matrix_server_name": "lotusguard.invalid", "expires_in": 1}
    body = {"room": "!" + "x" * 300, "openid_token": openid, "device_id": "LOTUSGUARD_CHECK"}
    answer = await service.post_json("/sfu/get", body)
    errcode = json_of(answer).get("errcode")
    if answer.code == 400 and errcode == "M_NOT_JSON":
        return True
    return False if isinstance(errcode, str) and answer.code != 404 else None


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@define
class ExposureCheck:
    """Asks as a stranger would, without credentials. Asks nothing that changes anything."""

    _asking: Asking
    _say: Findings

    async def check_upstream(self, upstream: Service, here: bool) -> None:
        """Whether lk-jwt-service can be reached past the guard. :param here: whether it runs on this machine."""
        proxied = await self._serves_proxied_routes(upstream)
        parts = urlsplit(upstream.base)
        addresses = listening_addresses(parts.port or (443 if parts.scheme == "https" else 80)) if here else None
        open_ones = [address for address in addresses or () if not is_loopback(address)]
        if open_ones:
            self._say.warning(
                "lk-jwt-service",
                f"listens on {_addresses(open_ones)}: anybody who can connect there gets tokens past the guard",
                f"LIVEKIT_JWT_BIND=127.0.0.1:{parts.port}, or a firewall",
            )
        elif addresses:
            self._say.fine("lk-jwt-service", "listens on loopback only")
        if proxied and (open_ones or not (here or is_loopback(parts.hostname or ""))):
            self._say.warning(
                "homeserver routes",
                f"{upstream.base} answers {PROXIED_ROUTE}: it believes any user ID in a header",
                "let only the guard reach it; the homeserver asks the guard (GUARD_APPSERVICE_PORT)",
            )

    async def _serves_proxied_routes(self, upstream: Service) -> bool:
        try:
            answer = await upstream.post_json(PROXIED_ROUTE, {})
        except NoAnswer:
            return False
        return answer.code in (400, 401, 403)

    async def check_advertised(self, homeserver: Service, server_name: str) -> None:
        """Whether the address that clients are told leads to a guard, and not past it.

        Clients read it from ``.well-known/matrix/client``. Nothing is reported if that cannot be read from here.
        """
        for service in (homeserver, self._asking.service("server name", f"https://{server_name}")):
            try:
                urls = _advertised(json_of(await service.ask("GET", "/.well-known/matrix/client")))
            except NoAnswer:
                continue
            for url in urls:
                await self.check_public_address(url)
            if urls:
                return

    async def check_public_address(self, url: str) -> None:
        """Whether a guard answers at a ``livekit_service_url``."""
        try:
            guarded = await is_guard(self._asking.service("livekit_service_url", url))
        except NoAnswer as why:
            self._say.unknown("clients' way", f"{url} could not be asked from here: {why}", why.remedy)
            return
        if guarded:
            self._say.fine("clients' way", f"{url} leads to the guard")
        elif guarded is None:
            self._say.unknown(
                "clients' way", f"{url} answers, but neither as a guard nor as lk-jwt-service",
                "see where the reverse proxy sends it",
            )  # fmt: skip
        else:
            self._say.wrong(
                "clients' way", f"{url} leads to lk-jwt-service past the guard: nothing is enforced for these clients",
                "let the reverse proxy send it to the guard (deploy/proxy/)",
            )  # fmt: skip

    async def check_livekit(self, url: str) -> None:
        """Whether LiveKit's RoomService answers on the address that clients use.

        :param url: as lk-jwt-service tells it to clients, such as ``wss://livekit.example.org``.
        """
        base = _http_address(url)
        if base is None or is_loopback(urlsplit(base).hostname or ""):
            return
        try:
            answer = await self._asking.service("LIVEKIT_URL", base).ask("POST", ROOM_SERVICE, b"", PROTOBUF)
        except NoAnswer as why:
            self._say.unknown("LiveKit", f"could not ask {base}: {why}", why.remedy)
            return
        if answer.code == 401:  # RoomService wants a token; a proxy that does not pass it on answers 403 or 404
            self._say.warning(
                "LiveKit",
                f"its RoomService (/twirp) answers on {base}: a token with roomCreate deletes any room from anywhere",
                "let the proxy pass only /rtc to LiveKit",
            )
        else:
            self._say.fine("LiveKit", f"{base} does not pass its RoomService on")


def _advertised(well_known: dict[str, Any]) -> list[str]:
    """The addresses of call services in a ``.well-known/matrix/client``."""
    foci = well_known.get("org.matrix.msc4143.rtc_foci")
    urls = [focus.get("livekit_service_url") for focus in foci or () if isinstance(focus, dict)]
    found = [_http_address(url) for url in urls if isinstance(url, str)]
    return [url for url in found if url is not None]


def _http_address(url: str) -> str | None:
    """The address of a WebSocket or HTTP URL, with http or https."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return None
    scheme = {"ws": "http", "wss": "https", "http": "http", "https": "https"}.get(parts.scheme)
    if scheme is None or not parts.hostname or not url.isascii():
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{scheme}://{host}{port}{parts.path.rstrip('/')}"


def _addresses(found: list[str]) -> str:
    """IPv6 addresses in brackets; those that mean every address are explained."""
    return ", ".join(
        (f"[{address}]" if ":" in address else address) + (" (every address)" if address in ("::", "0.0.0.0") else "")
        for address in found
    )
