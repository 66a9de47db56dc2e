# SPDX-License-Identifier: Apache-2.0
"""A user's membership of a Matrix room."""

from __future__ import annotations

from enum import Enum


class Membership(Enum):
    """The ``membership`` of an ``m.room.member`` event; ABSENT if the homeserver knows no such event."""

    JOIN = "join"
    INVITE = "invite"
    KNOCK = "knock"
    LEAVE = "leave"
    BAN = "ban"
    ABSENT = "absent"
