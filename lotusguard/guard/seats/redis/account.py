# SPDX-License-Identifier: Apache-2.0
"""Which guard listens in the rooms of the guard's account, and what the others know of these rooms."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol

from attrs import define, field
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from lotusguard.clients.failures import DependencyFailed
from lotusguard.clients.redis.client import RedisClient, Script
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.seats.redis.scripts import PREFIX, lua

log = Logger()

LEASE_SECONDS = 8.0
"""Seconds after which another guard listens, if this one has not renewed its lease."""
TURN_INTERVAL = 1.0
FINISH = 5.0
"""Seconds that commands may take which a guard is answering when it hands over."""
KEPT = 30 * 86_400
"""Seconds after which Redis forgets the rooms if no guard runs."""
NOT_OURS = "0"
"""The token where another guard has the lease."""
_KEYS = [f"{PREFIX}{{account}}:{name}" for name in ("lease", "fence", "rows", "order", "version")]
TURN = Script(f"local KEPT = {KEPT}\n" + lua("turn"))


class Listens(Protocol):
    """What listens in the rooms (`SyncService`)."""

    @property
    def ready(self) -> bool:
        """Whether it wants to listen: the account is known, and accepts invitations."""

    @property
    def hears(self) -> bool:
        """Whether what happens in the rooms reaches it now."""

    def listen(self) -> None:
        """Begin to listen, from where the stored rows say."""

    async def pause(self) -> None:
        """Stop listening, and write the rows."""

    def follow(self, changed: Mapping[str, str | None], *, heard: bool) -> None:
        """Another guard listens. :param changed: rows that it wrote. :param heard: whether it hears the rooms."""


class Turn(Enum):
    """What this guard does."""

    FOLLOWS = "follows"
    HOLDS = "holds"
    """It has the lease, and listens."""
    ALONE = "alone"
    """It listens because Redis has given no answer for as long as a lease lasts."""
    ENDING = "ending"
    """It stops: it hands over."""
    ENDED = "ended"


_STOPS = (Turn.ENDING, Turn.ENDED)


@define(eq=False)
class AccountTurns:
    """Lets one guard at a time listen. Its rows (a `ResidenceStore`) are written under a fencing token.

    :ivar listener: what listens; ``None`` where the guard has no account.
    :ivar idle: waits until what was heard is done.
    """

    _redis: RedisClient
    _guard: str
    _clock: IReactorTime
    listener: Listens | None = field(default=None, init=False)
    idle: Callable[[], Awaitable[object]] | None = field(default=None, init=False)
    turn: Turn = field(default=Turn.FOLLOWS, init=False)
    _token: str = field(default=NOT_OURS, init=False)
    _known: int = field(default=0, init=False)
    _rows: dict[str, str] = field(factory=dict, init=False)
    _answered_at: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._answered_at = self._clock.seconds()

    async def take_turns(self) -> None:
        """Get or renew the lease, or learn what its holder wrote. To be called every `TURN_INTERVAL`."""
        listener = self.listener
        if listener is None or not listener.ready or self.turn in _STOPS:
            return
        try:
            token, hears, version, changed = await self._ask(LEASE_SECONDS, hears=listener.hears)
        except DependencyFailed:
            if self.turn is Turn.FOLLOWS and self._clock.seconds() - self._answered_at >= LEASE_SECONDS:
                self._begin(Turn.ALONE, "Redis gives no answer")
            return
        if self.turn in _STOPS:
            return
        self._answered_at, lost = self._clock.seconds(), version < self._known
        if self.turn is Turn.HOLDS and token == self._token:
            if lost:
                await self._write(self._rows)
            return
        if self.turn is Turn.HOLDS or (self.turn is Turn.ALONE and token == NOT_OURS):
            await self._end(listener)
        self._token, self._known = token, version
        rows = {name: text or None for name, text in changed}
        if self.turn is Turn.ALONE:
            self.turn = Turn.HOLDS
            return
        self._take_over(rows)
        if token == NOT_OURS:
            listener.follow(rows, heard=hears)
        else:
            self._begin(Turn.HOLDS, "it is this guard's turn")
            if lost:  # Redis does not know what its rooms were
                await self._write(self._rows)

    async def hand_over(self) -> None:
        """This guard stops: another one listens at once."""
        turn, self.turn = self.turn, Turn.ENDING
        if self.listener is None or turn not in (Turn.HOLDS, Turn.ALONE):
            return
        if self.idle is not None:
            with suppress(TimeoutError):
                await Deadline.after(self._clock, FINISH).wait(Deferred.fromCoroutine(_done(self.idle())))
        await self._end(self.listener)
        self.turn = Turn.ENDED
        with suppress(DependencyFailed):
            await self._ask(0, hears=False)

    # -- ResidenceStore ------------------------------------------------------------------------------------

    def residence(self) -> dict[str, str]:
        """The rows, as far as this guard has heard."""
        return dict(self._rows)

    def put_residence(self, rows: Mapping[str, str | None]) -> Deferred[bool]:
        """Write rows. Fails with `DependencyFailed` if another guard listens by now."""
        return Deferred.fromCoroutine(self._put(rows))

    async def _put(self, rows: Mapping[str, str | None]) -> bool:
        self._take_over(rows)
        try:
            return await self._write(rows)
        except DependencyFailed:
            if self.turn is Turn.HOLDS and self._redis.available:  # what was heard is not acted on
                raise
            return False

    # -- how it is done ------------------------------------------------------------------------------------

    def _begin(self, turn: Turn, reason: str) -> None:
        assert self.listener is not None
        self.turn = turn
        log.info("this guard listens in the rooms: {reason}", reason=reason, event_name="turn_begun")
        self.listener.listen()

    async def _end(self, listener: Listens) -> None:
        """Listen no more. What is known is written if this is still this guard's turn."""
        self.turn = self.turn if self.turn in _STOPS else Turn.FOLLOWS
        log.info("this guard no longer listens in the rooms", event_name="turn_ended")
        await listener.pause()
        listener.follow({}, heard=True)

    def _take_over(self, rows: Mapping[str, str | None]) -> None:
        for name, text in rows.items():
            if text is None:
                self._rows.pop(name, None)
            else:
                self._rows[name] = text

    async def _write(self, rows: Mapping[str, str | None]) -> bool:
        """:raises DependencyFailed: Redis gives no answer, or another guard listens by now."""
        request = {"guard": self._guard, "token": self._token, "rows": dict(rows)}
        version = int(await self._redis.run(TURN, _KEYS, json.dumps(request)))
        if version < 0:
            raise DependencyFailed("redis", "not_our_turn")
        self._known = version
        return True

    async def _ask(self, seconds: float, *, hears: bool) -> tuple[str, bool, int, list[tuple[str, Any]]]:
        request = {"guard": self._guard, "milliseconds": int(seconds * 1000), "hears": hears, "known": self._known}
        try:
            token, heard, version, changed = json.loads(await self._redis.run(TURN, _KEYS, json.dumps(request)))
            return str(token), bool(heard), int(version), [(name, text) for name, text in changed]
        except (TypeError, ValueError):
            raise DependencyFailed("redis", "invalid_response") from None


async def _done(work: Awaitable[object]) -> None:
    await work
