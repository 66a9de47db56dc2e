# SPDX-License-Identifier: Apache-2.0
"""Runs the script that works on one room, and keeps the time of the server that runs it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from attrs import define, field, frozen
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import NO_SCRIPT, RedisClient, when_less_busy
from lotusguard.clients.waiting import run_in_background
from lotusguard.guard.seats.redis.clock import ServerClock
from lotusguard.guard.seats.redis.epoch import Rebuilding
from lotusguard.guard.seats.redis.scripts import STEP, room_key

log = Logger()

Operation = Sequence[Any]
"""The name of an operation of ``step.lua``, and its arguments."""
ROOMS_NOTED = 20_000
FULL_NOTED = 2_000
FULL_FOR = 1.0
"""Seconds for which the questions that follow a refusal are answered by what the refusing step found."""
ATTEMPTS = 3
STALE, DATA_LOST = "stale", "data_lost"
"""Reasons: another guard has seen a newer data set; the data set was lost while the step was made."""


@frozen
class Listed:
    """What is known about a room's SFU rooms.

    :ivar since: when they were listed, on the server's clock.
    :ivar aliases: those in which somebody holds a seat.
    :ivar told: when Redis said so, on the guard's clock.
    """

    since: dict[str, float]
    aliases: tuple[str, ...]
    told: float


@frozen
class Full:
    """What the last step found in a room that was full; all that is asked before somebody is refused.

    :ivar at: on the guard's clock.
    :ivar required_since: see `SeatBook.listing_required_since`; on the server's clock.
    :ivar owners: who owns a seat. :ivar occupants: see `SeatBook.occupants`.
    :ivar strangers: identities in the call of which no Matrix user is known.
    """

    at: float
    required_since: float | None
    owners: frozenset[str]
    occupants: frozenset[str]
    strangers: frozenset[str]


@define(eq=False)
class RoomSteps:
    """One step on one room is one script: nothing comes between its operations.

    :param guarding_since: on the guard's clock; see `MemorySeatBook`.
    """

    _redis: RedisClient
    _clock: IReactorTime
    _guarding_since: float
    _rebuilding: Rebuilding
    clock: ServerClock = field(init=False, factory=ServerClock)
    _data_set: str = field(init=False, default="")
    _remembered_since: float = field(init=False)
    _listed: OrderedDict[str, Listed] = field(init=False, factory=OrderedDict)
    _full: OrderedDict[str, Full] = field(init=False, factory=OrderedDict)
    _first: OrderedDict[str, list[Operation]] = field(init=False, factory=OrderedDict)

    def __attrs_post_init__(self) -> None:
        self._remembered_since = self._guarding_since

    def forget_time(self) -> None:
        """The server may be another one, with another clock."""
        self.clock.reset()
        self._listed.clear()

    def forget(self) -> None:
        """The data set is another one. Calls may be older than what it remembers."""
        self._listed.clear()
        self._full.clear()
        if self._data_set:
            self._remembered_since = self._clock.seconds()
        self._data_set = self._rebuilding.data_set

    def first(self, room_id: str, operation: Operation) -> None:
        """Do this at the beginning of the next step on a room. It saves a script of its own."""
        self._first.setdefault(room_id, []).append(operation)
        while len(self._first) > ROOMS_NOTED:
            self._first.popitem(last=False)

    async def run(self, room_id: str, *operations: Operation, certain: bool = False) -> list[Any]:
        """If the connection is lost, the step is made again: the answer may have been lost after the script ran. So the
        same operations must have the same results.

        :param certain: make the step only in a complete data set; fail with `DATA_LOST` if that was deleted before it.
        :return: the operations' results. :raises DependencyFailed: Redis gives no usable answer.
        """
        before, confirmed = self._first.pop(room_id, []), False
        for left in reversed(range(ATTEMPTS)):
            try:
                results = await when_less_busy(
                    self._clock, partial(self._once, room_id, [*before, *operations], certain, confirmed)
                )
                break
            except DependencyFailed as failed:
                if not left:
                    raise
                if failed.reason == "connection_lost":
                    await self._redis.connected_again()
                elif failed.reason == NO_SCRIPT:
                    await self._redis.load(STEP)
                elif failed.reason == STALE:
                    await self._rebuilding.look_again()
                    confirmed = True
                else:
                    raise
        return results[len(before) :]

    async def _once(self, room_id: str, operations: list[Operation], certain: bool, confirmed: bool) -> list[Any]:
        if certain:  # made again, it may meet another data set, which is not complete yet
            await self._rebuilding.wait()
        data_set = await self._rebuilding.named()
        await self.know_time()
        request = {
            "epoch": data_set,
            "confirmed": confirmed,
            "complete": self._rebuilding.complete,
            "guarding_since": self.clock.to_server(self._guarding_since),
            "remembered_since": self.clock.to_server(self._remembered_since),
            "room_id": room_id,
            "operations": operations,
        }
        sent = self._clock.seconds()
        question = self._rebuilding.ask_generation() if certain else None  # it is sent after the step
        answer = await self._redis.run_loaded(STEP, (room_key(room_id),), json.dumps(request))
        if question is not None and not await self._rebuilding.still(data_set, question):
            raise DependencyFailed("redis", DATA_LOST)
        return self._read(room_id, answer, sent)

    def _read(self, room_id: str, answer: Any, sent: float) -> list[Any]:
        try:
            told = json.loads(answer)
            if told == [STALE]:
                raise DependencyFailed("redis", STALE)
            now, listed, aliases, results = told
            self._full.pop(room_id, None)
            self.clock.learn(float(now), sent, self._clock.seconds())
            since = {alias: float(at) for alias, at in dict(listed).items()}
            self._note(room_id, Listed(since, tuple(aliases), self._clock.seconds()))
            return list(results)
        except (TypeError, ValueError):
            raise DependencyFailed("redis", "invalid_response") from None

    def listed(self, room_id: str) -> Listed | None:
        """What the last step on a room told. Listings may have been applied since."""
        return self._listed.get(room_id)

    def apply_listing(self, room_id: str, alias: str, since: float, operation: Operation) -> None:
        """Do this at the beginning of the next step on a room, or soon. It saves a join a script and a round trip.

        :param since: when the listing of this SFU room began, on the server's clock.
        """
        self.first(room_id, operation)
        known = self._listed.get(room_id) or Listed({}, (), 0.0)
        aliases = known.aliases if alias in known.aliases else (*known.aliases, alias)
        self._note(room_id, Listed({**known.since, alias: since}, aliases, known.told))
        self._clock.callLater(0, self._flush, room_id)

    def ask_soon(self, room_id: str) -> None:
        """Ask in the background what is listed in a room, unless a step is made anyway."""
        if room_id not in self._first:
            self.first(room_id, ("nothing",))
            self._clock.callLater(0, self._flush, room_id)

    def _flush(self, room_id: str) -> None:
        if room_id in self._first:
            run_in_background(self.run(room_id, ("nothing",)), _report)

    def _note(self, room_id: str, listed: Listed) -> None:
        self._listed[room_id] = listed
        self._listed.move_to_end(room_id)
        while len(self._listed) > ROOMS_NOTED:
            self._listed.popitem(last=False)

    def note_full(self, room_id: str, told: Sequence[Any]) -> None:
        """:param told: what the operation ``take`` tells about a room that is full."""
        required, seated, unseated, owners, strangers = told
        self._full[room_id] = Full(
            self._clock.seconds(), float(required) if required else None, frozenset((*seated, *owners)),
            frozenset((*seated, *unseated)), frozenset(strangers),
        )  # fmt: skip
        self._full.move_to_end(room_id)
        while len(self._full) > FULL_NOTED:
            self._full.popitem(last=False)

    def full(self, room_id: str) -> Full | None:
        """What the last step on a room told if it found the room full a moment ago."""
        full = self._full.get(room_id)
        return full if full is not None and self._clock.seconds() - full.at <= FULL_FOR else None

    async def know_time(self) -> None:
        """See to it that times can be converted. :raises DependencyFailed: Redis gives no usable answer."""
        if self.clock.known:
            return
        sent = self._clock.seconds()
        seconds, microseconds = await self._redis.call("TIME")
        self.clock.learn(int(seconds) + int(microseconds) / 1e6, sent, self._clock.seconds())


def _report(failure: Failure) -> None:
    if not failure.check(DependencyFailed):  # else the next listing tells the same
        log.failure("a listing could not be applied", failure)
