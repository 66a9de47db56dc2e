# SPDX-License-Identifier: Apache-2.0
"""SFU rooms that LiveKit has lost. It keeps rooms in memory: after a crash it knows none, and where it creates none by
itself (``auto_create: false``), clients that try to reconnect are refused for ever. Element Call asks for no new token,
which would create the room."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from attrs import define, field
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.livekit import LiveKitClient

log = Logger()

AT_ONCE = 8
GIVEN_UP_AFTER = 60.0
"""Seconds for which clients try to reconnect, about."""
EMPTY_TIMEOUT = 60
"""Seconds after which LiveKit closes the room if nobody comes back."""


@define(eq=False)
class LostRooms:
    """Creates rooms again whose participants are trying to reconnect.

    A room is also missing if somebody deleted it and another guard was told. So rooms are created only if LiveKit was
    away a short while ago.

    :param acts: whether anything may be changed in LiveKit.
    """

    _livekit: LiveKitClient
    _clock: IReactorTime
    _acts: Callable[[], bool]
    _lost: dict[str, float] = field(factory=dict, init=False)
    _away_at: float | None = field(default=None, init=False)
    _worker: KeyedWorker[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._worker = KeyedWorker(self._create, AT_ONCE, _failed)

    @property
    def worker(self) -> KeyedWorker[str]:
        """Creates the rooms."""
        return self._worker

    def was_away(self) -> None:
        """LiveKit does not answer, or answers again after that."""
        self._away_at = self._clock.seconds()

    def create_again(self, lost: Iterable[str], listed: Iterable[str]) -> None:
        """Create what was lost, now or a short while ago. It is done in the background.

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
        if self._away_at is not None and now - self._away_at <= GIVEN_UP_AFTER and self._acts():
            for alias in self._lost:
                self._worker.run(alias, urgent=False)

    def stop(self) -> None:
        """Create nothing more."""
        self._worker.stop()

    async def _create(self, alias: str) -> None:
        if alias not in self._lost:
            return  # it exists by now
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


def _failed(alias: str, failure: Failure) -> None:
    log.failure("{alias} could not be created again", failure, alias=alias)
