# SPDX-License-Identifier: Apache-2.0
"""What the stand-in authorizer remembers of what it did, for tests to look at. Sandbox."""

from __future__ import annotations

from dataclasses import dataclass, field

REMEMBERED = 10_000
"""How much of each record is kept."""


@dataclass(frozen=True)
class Issued:
    """A token that was given out. ``route`` is the name in ``ROUTES``."""

    route: str
    room: str
    slot: str
    alias: str
    identity: str
    user: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class Job:
    """A delayed-leave job: when nobody connects in time, the user's leave event is sent."""

    server_name: str
    delay_id: str
    delay_timeout: int
    alias: str
    identity: str


@dataclass(frozen=True)
class WebhookSeen:
    """A webhook as it arrived; ``verified`` is what the real service makes of it."""

    headers: tuple[tuple[str, str], ...]
    body: bytes
    verified: bool
