# SPDX-License-Identifier: Apache-2.0
"""SFU rooms that LiveKit has lost. It keeps rooms in memory: after a crash it knows none, and where it creates none by
itself (``auto_create: false``), clients that try to reconnect are refused for ever. Element Call asks for no new token,
which would create the room."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.livekit import LiveKitClient
from lotusguard.clients.waiting import gather_in_turns

log = Logger()

AT_ONCE = 8
GIVEN_UP_AFTER = 60.0
"""Seconds for which clients try to reconnect, about."""
EMPTY_TIMEOUT = 60
"""Seconds after which LiveKit closes the room if nobody comes back."""


@define(eq=False)
class LostRooms:
    """Creates rooms again whose participants are trying to reconnect.

    :param acts: not in a dry run.
    """

    _livekit: LiveKitClient
    _clock: IReactorTime
    _acts: bool
    _lost: dict[str, float] = field(factory=dict, init=False)

    async def create_again(self, lost: Iterable[str], listed: Iterable[str]) -> None:
        """Create what was lost, now or a short while ago.

        :param lost: aliases of rooms that had participants, and that LiveKit does not list any more although it never
            said that they are finished.
        :param listed: those that LiveKit lists.
        """
        now = self._clock.seconds()
        for alias in lost:
            self._lost.setdefault(alias, now)
        for alias, since in list(self._lost.items()):
            if now - since > GIVEN_UP_AFTER:
                del self._lost[alias]
        for alias in listed:
            self._lost.pop(alias, None)
        if self._acts:
            await gather_in_turns(AT_ONCE, self._create, list(self._lost))

    async def _create(self, alias: str) -> None:
        try:
            await self._livekit.create_room(alias, EMPTY_TIMEOUT)
        except DependencyFailed as failed:  # tried again in the next round
            log.warn(
                "LiveKit has lost {alias}, and it could not be created again: {reason}",
                alias=alias, reason=failed.reason, event_name="lost_room_not_created",
            )  # fmt: skip
            return
        self._lost.pop(alias, None)
        log.warn(
            "LiveKit has lost {alias}: created again, so that its participants can reconnect",
            alias=alias, event_name="lost_room_created",
        )  # fmt: skip
