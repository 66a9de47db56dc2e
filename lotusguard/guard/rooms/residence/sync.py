# SPDX-License-Identifier: Apache-2.0
"""Listens to ``/sync`` for as long as the guard runs, and passes on what it says."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from secrets import token_hex
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
from lotusguard.clients.synapse.matrix import FIRST_SYNC, MOST_EVENTS, POLL, SINCE_UNKNOWN, SYNC_GRACE, sync_filter
from lotusguard.clients.synapse.sync_answer import SyncAnswer
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.rooms.residence.account import GuardAccount, Invites
from lotusguard.guard.rooms.residence.events import RoomEvents
from lotusguard.guard.rooms.residence.invites import InviteHandler
from lotusguard.guard.rooms.residence.residence import Residence, SyncStatus
from lotusguard.guard.rooms.residence.room import STATE_TYPES, TIMELINE_TYPES
from lotusguard.guard.rooms.residence.voice import RateLimit

log = Logger()

TOO_LARGE = "too_large"

TIMELINES = (MOST_EVENTS, 5, 1)
"""Events of a room in one answer. If an answer is too large, the next number is used: what is missing is a gap."""
FILTERS = tuple(sync_filter(TIMELINE_TYPES, STATE_TYPES, most_events=most) for most in TIMELINES)
ROOMS_A_PART = 20
"""Rooms in one answer, if a full sync is too large or too slow. Whatever their state is, the answer is not too large
then."""
BURST, RATE, PAUSE = 50, 20.0, 0.1
"""Answers that are asked for at once, and per second in the long run; the pause in seconds if there are more."""
STUCK = 1.0
"""Seconds until the next sync after an answer that came at once and does not continue."""
PATIENCE = 10
"""Failures of the homeserver in a row after which our place in its stream is given up: it may be what it fails at."""
SAVE_INTERVAL = 2.0
"""Seconds between two writes of what the answers changed. A restart continues from the last one."""
_BACKOFF = backoffPolicy(initialDelay=0.5, maxDelay=5.0, factor=1.7)


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
    _size: int = field(default=0, init=False)
    _in_parts: bool = field(default=False, init=False)
    _pace: RateLimit = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._pace = RateLimit(self._clock, BURST, RATE)

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
            self._events.member_lists.read(room_id)
        self._invites.resume()
        failures = 0
        while True:
            try:
                await self._sync()
                failures = 0
            except DependencyFailed as failed:
                self._failed(failed.reason)
                self._recover(failed.reason, failures + 1)
            except TimeoutError:
                self._failed("timeout")
                self._in_parts = self._in_parts or not self._residence.since  # a full answer would be as slow again
            except CancelledError:
                raise
            except Exception:
                self._failed("internal_error")
                log.failure("an answer to /sync could not be applied")
            if not self._residence.alive:
                failures += 1
                await deferLater(self._clock, self._pause(failures))

    def _recover(self, reason: str, failures: int) -> None:
        """Ask for something else next time, if the same answer would fail again."""
        full = not self._residence.since
        if reason == TOO_LARGE and full:
            self._in_parts = True
        elif reason == TOO_LARGE and self._size + 1 < len(TIMELINES):
            self._size += 1
        elif reason in (TOO_LARGE, SINCE_UNKNOWN) or (failures % PATIENCE == 0 and _is_its_own(reason)):
            self._residence.since = ""

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
        """One answer, or all that a full sync takes."""
        await self._account.verify_token()
        since = self._residence.since
        if not since:
            await (self._sync_in_parts() if self._in_parts else self._sync_fully())
            self._in_parts = False
            return
        waited, began = self._residence.alive, self._clock.seconds()
        await self._hear(await self._ask(since, FILTERS[self._size], wait=waited))
        self._size = 0
        if waited and self._residence.since == since and self._clock.seconds() - began < STUCK:
            await deferLater(self._clock, STUCK)
        elif not self._pace.take():
            await deferLater(self._clock, PAUSE)

    async def _ask(self, since: str, room_filter: str, *, wait: bool = False) -> SyncAnswer:
        """:param wait: for news, while all is well; then a late answer shows that the connection hangs. Otherwise the
        answer has to come at once: nothing is heard before it.
        """
        seconds = POLL + SYNC_GRACE if wait else FIRST_SYNC
        asking = self._client.sync(self._account.user_id, since, room_filter, wait=wait)
        return await Deadline.after(self._clock, seconds).wait(Deferred.fromCoroutine(asking))

    async def _sync_fully(self) -> None:
        answer = await self._ask("", _full_filter())
        self._apply(answer, answer.since, all_rooms=answer.joined.keys())
        await self._save()

    async def _sync_in_parts(self) -> None:
        """A full sync, some rooms at a time. It continues from the first answer; the others may be newer."""
        room_ids = sorted(await self._client.joined_rooms())
        parts = [room_ids[start : start + ROOMS_A_PART] for start in range(0, len(room_ids), ROOMS_A_PART)] or [[]]
        first = ""
        for number, part in enumerate(parts, 1):
            answer = await self._ask("", _full_filter(part))
            first = first or answer.since
            self._apply(answer, first if number == len(parts) else "", all_rooms=room_ids)
        await self._save()

    async def _hear(self, answer: SyncAnswer) -> None:
        """Take over what is new, and hear what people said in rooms that were known before."""
        known = set(self._residence.room_ids())
        changed = self._apply(answer, answer.since)
        said = [(room_id, answer.joined[room_id]) for room_id in changed if room_id in known]
        commands = any(self._events.holds_commands(news) for _, news in said)  # after a crash, none is done twice
        moved = self._in_turns and known != set(self._residence.room_ids())  # the other guards have to know
        if commands or moved or self._clock.seconds() - self._saved_at >= SAVE_INTERVAL:
            await self._save()
        for room_id, news in said:
            self._events.said(room_id, news)

    def _apply(self, answer: SyncAnswer, since: str, all_rooms: Collection[str] | None = None) -> Collection[str]:
        """Take over an answer.

        :param since: where to continue; ``""`` after an answer that is only a part.
        :param all_rooms: the rooms that the account is in, if this is a full sync.
        :return: the rooms with news.
        """
        full = all_rooms is not None
        was_alive, known = self._residence.alive, set(self._residence.room_ids())
        changes, gone = self._residence.apply(answer, all_rooms)
        if since:
            self._residence.continue_from(since)
            if not was_alive:
                log.info("changes in {count} rooms arrive at once", count=len(self._residence), event_name="sync_alive")
                self._events.member_lists.read_missing()
        for room_id in gone:
            self._events.left(room_id)
        for room_id, change in changes.items():
            self._events.changed(room_id, change, answer.joined[room_id], full=full, new=room_id not in known)
        if all_rooms is not None:
            self._invites.heard_all(all_rooms)
        for room_id, inviter in answer.invited.items():
            self._invites.invited(room_id, inviter)
        return changes.keys()

    async def _save(self) -> None:
        self._saved_at = self._clock.seconds()
        await self._residence.save()

    def _failed(self, reason: str) -> None:
        if self._residence.status is not SyncStatus.FAILING or self._residence.reason != reason:
            log.warn("changes in rooms do not arrive: {reason}", reason=reason, event_name="sync_failing")
        self._residence.failing(reason)


def _full_filter(rooms: Collection[str] | None = None) -> str:
    """A filter for a full sync: nothing that was said earlier is answered."""
    return sync_filter((), STATE_TYPES, most_events=1, rooms=rooms, nonce=token_hex(8))


def _is_its_own(reason: str) -> bool:
    """Whether a failure is the homeserver's own: it was reached, and did not give a usable answer."""
    return reason.startswith("status_5") or reason == "invalid_response"


def _log_unless_cancelled(failure: Failure) -> None:
    if not failure.check(CancelledError):
        log.failure("listening to /sync stopped", failure)
