# SPDX-License-Identifier: Apache-2.0
"""The record of what RoomService changed, for tests to inspect. Sandbox."""

from __future__ import annotations

from attrs import frozen
from google.protobuf.message import Message
from livekit.protocol.models import ParticipantPermission


@frozen
class Change:
    """A request that RoomService carried out.

    :ivar before: the participant's permission before an update; ``after`` is the one after it.
    """

    method: str
    alias: str
    identity: str
    request: Message
    before: ParticipantPermission | None = None
    after: ParticipantPermission | None = None
