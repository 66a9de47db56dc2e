# SPDX-License-Identifier: Apache-2.0
"""Runs the script that works on one room, and keeps the time of the server that runs it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
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
from lotusguard.guard.seats.redis.notes import ROOMS_NOTED, Listed, RoomNotes
from lotusguard.guard.seats.redis.scripts import STEP, room_keys

log = Logger()

Operation = Sequence[Any]
"""The name of an operation of ``step.lua``, and its arguments."""
ATTEMPTS = 3
STALE, CHANGED, DATA_LOST = "stale", "changed", "data_lost"
"""Reasons: another guard has seen a newer data set; a listing was taken for one that tells nothing new; the data set
was lost while the step was made."""


@frozen
class _Queued:
    """What the next step on a room begins with.

    :ivar listing: the number of the listing that it applies as a whole, if it does.
    :ivar otherwise: applies the whole listing if this one was taken for one that tells nothing new, and is not.
    """

    operation: Operation
    listing: int | None = None
    otherwise: Callable[[], Awaitable[None]] | None = None


@define(eq=False)
class RoomSteps:
    """One step on one room is one script: nothing comes between its operations.

    :param guarding_since: on the guard's clock; see `MemorySeatBook`.
    :ivar notes: what the last step on each room told.
    """

    _redis: RedisClient
    _clock: IReactorTime
    _guarding_since: float
    _rebuilding: Rebuilding
    clock: ServerClock = field(init=False, factory=ServerClock)
    notes: RoomNotes = field(init=False)
    _data_set: str = field(init=False, default="")
    _remembered_since: float = field(init=False)
    _first: OrderedDict[str, list[_Queued]] = field(init=False, factory=OrderedDict)

    def __attrs_post_init__(self) -> None:
        self._remembered_since = self._guarding_since
        self.notes = RoomNotes(self._clock)

    def forget_time(self) -> None:
        """The server may be another one, with another clock."""
        self.clock.reset()
        self.notes.forget_times()

    def forget(self) -> None:
        """The data set is another one. Calls may be older than what it remembers."""
        self.notes.forget()
        if self._data_set:
            self._remembered_since = self._clock.seconds()
        self._data_set = self._rebuilding.data_set

    def first(self, room_id: str, operation: Operation) -> None:
        """Do this at the beginning of the next step on a room. It saves a script of its own."""
        self._queue(room_id, _Queued(operation))

    async def run(self, room_id: str, *operations: Operation, certain: bool = False) -> list[Any]:
        """If the connection is lost, the step is made again: the answer may have been lost after the script ran. So the
        same operations must have the same results.

        :param certain: make the step only in a complete data set; fail with `DATA_LOST` if that was deleted before it.
        :return: the operations' results. :raises DependencyFailed: Redis gives no usable answer.
        """
        before = self._first.pop(room_id, [])
        while True:
            try:
                queued = [one.operation for one in before]
                results = await self._attempts(room_id, [*queued, *operations], certain)
                break
            except DependencyFailed as failed:
                if failed.reason != CHANGED:
                    raise
            before = await self._with_whole_listings(room_id, before)
        for one, result in zip(before, results, strict=False):
            if one.listing is not None:
                self.notes.note_settled(room_id, one.operation[1], one.listing, result or "")
        return results[len(queued) :]

    async def _with_whole_listings(self, room_id: str, queued: Sequence[_Queued]) -> list[_Queued]:
        for one in queued:
            if one.otherwise is not None:
                await one.otherwise()
        return [*(one for one in queued if one.otherwise is None), *self._first.pop(room_id, [])]

    async def _attempts(self, room_id: str, operations: list[Operation], certain: bool) -> list[Any]:
        confirmed = False
        for left in reversed(range(ATTEMPTS)):
            try:
                return await when_less_busy(self._clock, partial(self._once, room_id, operations, certain, confirmed))
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
        raise AssertionError("not reached")

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
        answer = await self._redis.run_loaded(STEP, room_keys(room_id), json.dumps(request))
        if question is not None and not await self._rebuilding.still(data_set, question):
            raise DependencyFailed("redis", DATA_LOST)
        return self._read(room_id, answer, sent)

    def _read(self, room_id: str, answer: Any, sent: float) -> list[Any]:
        try:
            told = json.loads(answer)
            if told in ([STALE], [CHANGED]):
                raise DependencyFailed("redis", told[0])
            now, times, aliases, version, news, results = told
            self.clock.learn(float(now), sent, self._clock.seconds())
            since = {alias: float(at) for alias, at in dict(times).items()}
            listed = Listed(since, tuple(aliases), self._clock.seconds(), str(version), str(news))
            self.notes.note(room_id, listed)
            return list(results)
        except (TypeError, ValueError):
            raise DependencyFailed("redis", "invalid_response") from None

    def apply_listing(self, room_id: str, alias: str, since: float, operation: Operation) -> None:
        """Do this at the beginning of the next step on a room, or soon. It saves a join a script and a round trip.

        :param since: when the listing of this SFU room began, on the server's clock.
        """
        self._queue_listing(room_id, alias, since, _Queued(operation, self.notes.applying(room_id, alias)))

    def listed_again(
        self, room_id: str, alias: str, since: float, operation: Operation, otherwise: Callable[[], Awaitable[None]]
    ) -> None:
        """The same for a listing that tells nothing new, as far as this guard knows.

        :param otherwise: applies the whole listing. It is called if something has changed.
        """

        async def apply() -> None:
            self.notes.not_settled(room_id, alias)
            await otherwise()

        self._queue_listing(room_id, alias, since, _Queued(operation, otherwise=apply))

    def _queue_listing(self, room_id: str, alias: str, since: float, queued: _Queued) -> None:
        self._queue(room_id, queued)
        self.notes.listing(room_id, alias, since)
        self._clock.callLater(0, self._flush, room_id)

    def _queue(self, room_id: str, queued: _Queued) -> None:
        self._first.setdefault(room_id, []).append(queued)
        while len(self._first) > ROOMS_NOTED:
            self._first.popitem(last=False)

    def ask_soon(self, room_id: str) -> None:
        """Ask in the background what is listed in a room, unless a step is made anyway."""
        if room_id not in self._first:
            self.first(room_id, ("nothing",))
            self._clock.callLater(0, self._flush, room_id)

    def _flush(self, room_id: str) -> None:
        if room_id in self._first:
            run_in_background(self.run(room_id, ("nothing",)), _report)

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
