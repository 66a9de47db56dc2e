# SPDX-License-Identifier: Apache-2.0
"""Listens to ``/sync`` for as long as the guard runs, and passes on what it says."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any

from attrs import define, field
from twisted.application.internet import backoffPolicy
from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.synapse import MatrixClient
from lotusguard.clients.synapse.matrix import FIRST_SYNC, POLL, SYNC_GRACE, TokenUnknown, sync_filter
from lotusguard.clients.synapse.sync_answer import SyncAnswer
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.rooms.residence.account import GuardAccount, Invites
from lotusguard.guard.rooms.residence.events import RoomEvents
from lotusguard.guard.rooms.residence.invites import InviteHandler
from lotusguard.guard.rooms.residence.residence import Residence, SyncStatus
from lotusguard.guard.rooms.residence.room import STATE_TYPES, TIMELINE_TYPES

log = Logger()

FILTER = sync_filter(TIMELINE_TYPES, STATE_TYPES)
FIRST_FILTER = sync_filter((), STATE_TYPES, most_events=1)
"""For a full sync: nothing that was said earlier is answered."""
SAVE_INTERVAL = 2.0
"""Seconds between two writes of what the answers changed. A restart continues from the last one."""
_BACKOFF = backoffPolicy(initialDelay=0.5, maxDelay=30.0, factor=1.7)


@define(eq=False, slots=False)
class SyncService(Service):
    """One ``/sync`` after another. A failed one is tried again later and later, with jitter.

    Where ``GUARD_INVITES`` is off, it asks whose account it is and never syncs.

    :param in_turns: of several guards one listens: only between `listen` and `pause`.
    :ivar ready: whether it may listen: the account is known, and accepts invitations.
    """

    _client: MatrixClient
    _account: GuardAccount
    _residence: Residence
    _events: RoomEvents
    _invites: InviteHandler
    _clock: IReactorTime
    _pause: Callable[[int], float] = _BACKOFF
    _in_turns: bool = field(default=False, kw_only=True)
    ready: bool = field(default=False, init=False)
    _running: Deferred[None] | None = field(default=None, init=False)
    _saved_at: float = field(default=0.0, init=False)

    def startService(self) -> None:
        super().startService()
        self._start(self._run())

    @property
    def hears(self) -> bool:
        """Whether what happens in the rooms reaches us now."""
        return self._residence.alive

    def listen(self) -> None:
        """Begin to listen, from where the stored rows say."""
        self._residence.load()
        self._residence.belong_to(self._account.user_id)
        self._start(self._listen())

    async def pause(self) -> None:
        """Stop listening, and write what is known."""
        if self._running is not None:
            self._running.cancel()
        with suppress(DependencyFailed):  # another guard listens already
            await self._residence.save()

    def follow(self, changed: Mapping[str, str | None], *, heard: bool) -> None:
        """Another guard listens. :param changed: rows that it stored. :param heard: whether it hears the rooms."""
        self._residence.follow(changed, heard=heard)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._running = Deferred.fromCoroutine(work)
        self._running.addErrback(_log_unless_cancelled)

    def stopService(self) -> Deferred[None]:
        """Stop listening, and write what is known."""
        super().stopService()
        if self._running is not None:
            self._running.cancel()
        self._invites.stop()
        self._events.stop()
        return Deferred.fromCoroutine(self._residence.save() if not self._in_turns else self.pause())

    async def _run(self) -> None:
        self._residence.load()
        await self._learn_account()
        self._residence.belong_to(self._account.user_id)
        if self._account.invites is Invites.OFF:
            self._residence.turn_off(self._account.why_off)
            log.info("invitations are not accepted: {reason}", reason=self._account.why_off, event_name="invites_off")
            return
        self.ready = True
        if not self._in_turns:
            await self._listen()

    async def _listen(self) -> None:
        for room_id in self._residence.room_ids():
            self._events.read_members(room_id)
        self._invites.resume()
        failures = 0
        while True:
            try:
                await self._sync()
                failures = 0
            except DependencyFailed as failed:
                self._failed(failed.reason)
                if isinstance(failed, TokenUnknown):
                    self._residence.since = ""
            except TimeoutError:
                self._failed("timeout")
            except CancelledError:
                raise
            except Exception:
                self._failed("internal_error")
                log.failure("an answer to /sync could not be applied")
            if not self._residence.alive:
                failures += 1
                await deferLater(self._clock, self._pause(failures))

    async def _learn_account(self) -> None:
        failures = 0
        while True:
            try:
                return await self._account.learn()
            except DependencyFailed as failed:
                self._failed(failed.reason)
                failures += 1
                await deferLater(self._clock, self._pause(failures))

    async def _sync(self) -> None:
        """One answer. While all is well, an answer that is late shows that the connection hangs."""
        residence = self._residence
        full = not residence.since
        wait = residence.alive and not full  # else the first answer has to come at once: nothing is heard before
        seconds = POLL + SYNC_GRACE if wait else FIRST_SYNC
        asking = self._client.sync(self._account.user_id, residence.since, FIRST_FILTER if full else FILTER, wait=wait)
        answer = await Deadline.after(self._clock, seconds).wait(Deferred.fromCoroutine(asking))
        await self._apply(answer, full=full)

    async def _apply(self, answer: SyncAnswer, *, full: bool) -> None:
        was = self._residence.status
        known = set(self._residence.room_ids())
        changes, gone = self._residence.apply(answer)
        if was is not SyncStatus.ALIVE:
            log.info("changes in {count} rooms arrive at once", count=len(self._residence), event_name="sync_alive")
        for room_id in gone:
            self._events.left(room_id)
        for room_id, change in changes.items():
            self._events.changed(room_id, change, answer.joined[room_id], full=full, new=room_id not in known)
        for room_id, inviter in answer.invited.items():
            self._invites.invited(room_id, inviter)
        said = [(room_id, answer.joined[room_id]) for room_id in changes if room_id in known and not full]
        commands = any(self._events.holds_commands(news) for _, news in said)  # after a crash, none is done twice
        moved = self._in_turns and (gone or known != set(self._residence.room_ids()))  # the others have to know
        if full or commands or moved or self._clock.seconds() - self._saved_at >= SAVE_INTERVAL:
            await self._save()
        for room_id, news in said:
            self._events.said(room_id, news)

    async def _save(self) -> None:
        self._saved_at = self._clock.seconds()
        await self._residence.save()

    def _failed(self, reason: str) -> None:
        if self._residence.status is not SyncStatus.FAILING or self._residence.reason != reason:
            log.warn("changes in rooms do not arrive: {reason}", reason=reason, event_name="sync_failing")
        self._residence.failing(reason)


def _log_unless_cancelled(failure: Failure) -> None:
    if not failure.check(CancelledError):
        log.failure("listening to /sync stopped", failure)
