# SPDX-License-Identifier: Apache-2.0
"""What others can reach past the guard: lk-jwt-service's own port, its homeserver routes, LiveKit's RoomService."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

from attrs import define

from lotusguard.check.asking import Asking, NoAnswer, Service
from lotusguard.check.report import Findings

LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""
PROXIED_ROUTE = "/_matrix/client/unstable/io.element.msc4195/rtc/livekit/get_token"
"""A route that a homeserver proxies; it believes the user named in a header."""
PROTOBUF = {"Content-Type": "application/protobuf"}
ROOM_SERVICE = "/twirp/livekit.RoomService/ListRooms"


def listening_addresses(port: int, proc: Path = Path("/proc/net")) -> list[str] | None:
    """The addresses of this machine on which something listens on a TCP port; None if the kernel does not tell."""
    found: list[str] = []
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
                    found.append(_address(address))
    return sorted(set(found)) if known else None


def _address(text: str) -> str:
    """An address as the kernel writes it: words of 32 bits, in hexadecimal and little-endian."""
    packed = b"".join(bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8))
    address = IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


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
                f"listens on {', '.join(open_ones)}: whoever reaches that address gets tokens past the guard",
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
