# SPDX-License-Identifier: Apache-2.0
"""What the stand-in for lk-jwt-service records, for tests to inspect. Sandbox."""

from __future__ import annotations

from attrs import field, frozen

REMEMBERED = 10_000
"""How many entries each record keeps."""


@frozen
class Issued:
    """A token that was issued.

    :ivar route: the route's name in ``ROUTES``.
    :ivar sfu_url: the address of the SFU that the token is for, as clients are told it.
    """

    route: str
    room: str
    slot: str
    alias: str
    identity: str
    user: str
    token: str = field(repr=False)
    sfu_url: str = ""


@frozen
class Job:
    """A delegated delayed leave: if nobody connects in time, the user's leave event is sent."""

    server_name: str
    delay_id: str
    delay_timeout: int
    alias: str
    identity: str


@frozen
class WebhookSeen:
    """A webhook as it arrived. ``verified``: whether the real service would accept its signature."""

    headers: tuple[tuple[str, str], ...]
    body: bytes
    verified: bool


@frozen
class OtherSfu:
    """An SFU other than the guard's, which callers may choose. Its tokens are signed with its own secret.

    :ivar url: its address as clients are told it, and as they name it in ``url``.
    :ivar server_name: the homeserver it belongs to, if callers may name that instead.
    """

    url: str
    key: str
    secret: str = field(repr=False)
    server_name: str = ""
