# SPDX-License-Identifier: Apache-2.0
"""How many bytes of request bodies are in memory at once, in all and for each caller."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

from attrs import Factory, define, field

SMALL = 16 * 1024
"""Bytes of each body that are not counted, so that a small body always fits; the number of connections bounds them."""
POOL = 64 * 1024 * 1024
"""Bytes that all bodies may hold together, unless eight of the greatest length need more."""
SHARES = 8
"""One caller gets at most an eighth of the pool."""
RELAYED_FACTOR = 16
"""How many times longer than a token request any other request may be."""


@define
class BodyPool:
    """Counts the bytes that bodies hold beyond their first `SMALL`.

    :param largest: bytes that one body may have.
    :ivar limit: bytes that all bodies may hold together.
    :ivar share: bytes that the bodies of one caller may hold together.
    """

    largest: int
    limit: int = field()
    share: int = field()
    held: int = 0
    _by_caller: dict[str, int] = Factory(dict)

    @limit.default
    def _whole(self) -> int:
        return max(POOL, self.largest * SHARES)

    @share.default
    def _part(self) -> int:
        return self.limit // SHARES

    def take(self, caller: str, size: int) -> bool:
        """Take bytes if there is room for them, for all and for this caller."""
        of_caller = self._by_caller.get(caller, 0) + size
        if self.held + size > self.limit or of_caller > self.share:
            return False
        self.held += size
        self._by_caller[caller] = of_caller
        return True

    def give_back(self, caller: str, size: int) -> None:
        """Return bytes that were taken."""
        self.held -= size
        left = self._by_caller.get(caller, 0) - size
        if left > 0:
            self._by_caller[caller] = left
        else:
            self._by_caller.pop(caller, None)


def caller_of(peer: str | None, forwarded_for: bytes) -> str:
    """Whose share of the pool a request takes from.

    A loopback or private peer is taken for the reverse proxy: the last entry of ``X-Forwarded-For``, which it wrote,
    names the caller. From any other peer the header proves nothing. Addresses of one IPv6 /64 are one caller.

    :param peer: the address at the other end of the connection; ``None`` for a Unix socket.
    :param forwarded_for: the last value of the request's ``X-Forwarded-For``, or nothing.
    """
    address = _address(peer or "")
    if address is None or address.is_private:
        last = forwarded_for.rpartition(b",")[2].strip().decode("latin-1")
        address = _address(last) or address
    if isinstance(address, IPv6Address):
        return str(IPv6Address(int(address) >> 64 << 64))
    return str(address or "")


def _address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
