# SPDX-License-Identifier: Apache-2.0
"""Asking a room's moderators about people in its lobby: one notice each, which they answer by reaction.

Of several guards, the one whose account listens in the rooms sends the notices and hears the reactions. The name of a
notice's transaction comes from its lobby entry: a guard that takes over may send it again, and the homeserver knows it.
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.waiting import Deadline, FairSemaphore, run_in_background
from lotusguard.guard.lobby.entries import Lobby
from lotusguard.guard.lobby.reactions import ADMIT, DECISIONS, DENY, Reactions
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.voice import RoomVoice
from lotusguard.rules.lobby import LobbyEntry, LobbyEvent, LobbyState
from lotusguard.rules.lobby_book import Change

log = Logger()

BUSY = frozenset(("rate_limited", "queue_full", "status_429"))
"""Why a notice is not sent for now; people wait on, as long as they may."""
TRIED_FOR = 20.0
"""Seconds for which a notice that fails is sent again every second, before people enter whom nobody could admit."""
NOTICE_EVERY = 60.0
"""Seconds between two notices about the same person in the same room. A notice about somebody who stopped waiting stays
for as long, in case they ask again."""
SENT_AT_ONCE = 4
REDACTION_ATTEMPTS = 7
"""Attempts to redact a notice. The next one follows the first after 2 s, the second after 4 s, and so on: they take two
minutes in all."""
NOTICES_REMEMBERED = 20_000
TURN_TIMEOUT = 5.0
"""Seconds that a notice may wait for its turn. Then it is tried again."""

_Key = tuple[str, str]


@define(eq=False)
class _Notice:
    """:ivar event_id: "" while it is being sent. :ivar redactions: attempts to redact it."""

    room_id: str
    user: str
    sent: float
    event_id: str = ""
    redactions: int = 0


@define(eq=False)
class LobbyNotices:
    """Sends and redacts notices, and has moderators' reactions to them decide.

    :param operators_can_decide: whether people can be admitted without notices too.
    """

    _lobby: Lobby
    _policies: Policies
    _voice: RoomVoice
    _clock: IReactorTime
    _send_timeout: float
    _operators_can_decide: bool
    _notices: dict[_Key, _Notice] = field(factory=dict, init=False)
    _last: LRUCache[_Key, float] = field(factory=lambda: LRUCache(NOTICES_REMEMBERED), init=False)
    _failing: LRUCache[_Key, float] = field(factory=lambda: LRUCache(NOTICES_REMEMBERED), init=False)
    _to_redact: LRUCache[str, tuple[float, _Notice]] = field(factory=lambda: LRUCache(NOTICES_REMEMBERED), init=False)
    _turns: FairSemaphore = field(factory=lambda: FairSemaphore(SENT_AT_ONCE), init=False)
    _reactions: Reactions = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._reactions = Reactions(self._lobby, self._policies, self._clock)

    def start(self) -> None:
        """Take over the notices of an earlier run, and listen."""
        for room_id, entry in self._lobby.noticed():
            self._take_over(room_id, entry)
        self._lobby.listeners.append(self._changed)
        self._voice.on_reaction(self._reactions.hear)

    def pass_time(self) -> None:
        """Send what may be sent by now, and redact what is out of date: to be called every second."""
        for room_id, entry in self._lobby.without_notice():
            self._want(room_id, entry)
        now = self._clock.seconds()
        for again_at, notice in list(self._to_redact.values()):
            if now >= again_at:
                del self._to_redact[notice.event_id]
                self._in_background(self._redacted(notice), notice)
        for notice in list(self._notices.values()):
            state = self._lobby.state_of(notice.room_id, notice.user)
            if not notice.event_id or state is LobbyState.WAITING:
                continue
            if state is not None or now - notice.sent >= NOTICE_EVERY:
                self._redact(notice)
            if now - notice.sent >= 2 * NOTICE_EVERY:  # another guard has redacted it
                self._forget(notice)

    def _changed(self, change: Change) -> None:
        room_id, entry = change.room_id, change.entry
        notice = self._notices.get((room_id, entry.user))
        if change.event is LobbyEvent.ASK:
            self._failing.pop((room_id, entry.user), None)
        if change.after is LobbyState.WAITING and entry.notice:
            self._take_over(room_id, entry)
        elif change.after is LobbyState.WAITING:
            self._want(room_id, entry)
        elif change.after is not None and notice is not None and notice.event_id:
            if change.event is None and not entry.notice:  # another guard has redacted it
                self._forget(notice)
            else:
                self._redact(notice)

    def _take_over(self, room_id: str, entry: LobbyEntry) -> None:
        """Another guard, or an earlier run, has sent the notice."""
        known = self._notices.get((room_id, entry.user))
        if known is not None and (known.event_id == entry.notice or not known.event_id):
            return
        if known is not None:
            self._forget(known)
        now, key = self._clock.seconds(), (room_id, entry.user)
        self._notices[key] = _Notice(*key, now, entry.notice)
        self._last[key] = now
        self._reactions.know(entry.notice, *key)

    # -- sending -----------------------------------------------------------------------------------------

    def _want(self, room_id: str, entry: LobbyEntry) -> None:
        """Send a notice about an entry, unless there is one or the last one is too recent."""
        key, now = (room_id, entry.user), self._clock.seconds()
        notice = self._notices.get(key)
        if notice is not None:
            if notice.event_id and entry.notice != notice.event_id and self._voice.can_speak(room_id):
                self._in_background(self._lobby.set_notice(room_id, entry, notice.event_id), notice)
            return
        last = self._last.get(key)
        if (last is not None and now - last < NOTICE_EVERY) or not self._voice.can_speak(room_id):
            return
        self._last[key] = now
        notice = self._notices[key] = _Notice(room_id, entry.user, now)
        self._in_background(self._send(notice, entry), notice)

    async def _send(self, notice: _Notice, entry: LobbyEntry) -> None:
        key = (notice.room_id, notice.user)
        try:
            notice.event_id = event_id = await self._turns.run(notice.room_id, lambda: self._say(notice, entry.id))
        except CancelledError:  # it waited too long for its turn: tried again
            self._last.pop(key, None)
            raise
        except (DependencyFailed, TimeoutError) as failed:
            await self._failed(notice, getattr(failed, "reason", "timeout"))
            return
        except Exception:
            log.failure("asking {room_id} about {user} failed", room_id=notice.room_id, user=notice.user)
            await self._failed(notice, "unexpected")
            return
        finally:
            if not notice.event_id:  # nothing is being sent any more
                self._notices.pop(key, None)
        self._failing.pop(key, None)
        self._reactions.know(event_id, *key)
        state = self._lobby.state_of(*key)
        if state is not LobbyState.WAITING:
            if state is not None:
                self._redact(notice)
            return
        await self._lobby.set_notice(notice.room_id, entry, event_id)
        for number, emoji in enumerate(DECISIONS):
            name = f"lobby-{entry.id}-{number}"
            reacting = Deferred.fromCoroutine(self._voice.react(notice.room_id, event_id, emoji, name))
            await Deadline.after(self._clock, self._send_timeout).wait(reacting)

    def _say(self, notice: _Notice, entry_id: str) -> Deferred[str]:
        """Its time runs from its turn on: a flood must not open the lobby."""
        saying = self._voice.notice(notice.room_id, self._text(notice), f"lobby-{entry_id}")
        return Deadline.after(self._clock, self._send_timeout).wait(Deferred.fromCoroutine(saying))

    def _text(self, notice: _Notice) -> str:
        text = f"{notice.user} asks to join the call: {ADMIT} admit, {DENY} deny"
        lobby = self._policies.last_known(notice.room_id).lobby
        return f"{text}\n{lobby.message}" if lobby is not None and lobby.message else text

    async def _failed(self, notice: _Notice, reason: str) -> None:
        """The notice is sent again with the next second, for as long as that may help."""
        key, now = (notice.room_id, notice.user), self._clock.seconds()
        began = self._failing.setdefault(key, now)
        tried_enough = reason not in BUSY and now - began >= TRIED_FOR  # a flood must not open the lobby
        if began == now or tried_enough:
            log.warn(
                "could not ask {room_id} about {user}: {reason}",
                room_id=notice.room_id, user=notice.user, reason=reason, event_name="lobby_notice_failed",
            )  # fmt: skip
        if not tried_enough:
            self._last.pop(key, None)
            return
        self._failing.pop(key, None)
        if not self._operators_can_decide:  # nobody knows that they wait
            await self._lobby.decide(*key, admit=True, by="nobody can be asked, so the guard")

    def _redact(self, notice: _Notice) -> None:
        known = self._notices.get((notice.room_id, notice.user)) is notice
        if known and self._voice.can_speak(notice.room_id):  # else another guard does, or this one once it can
            self._forget(notice)
            self._in_background(self._redacted(notice), notice)

    def _forget(self, notice: _Notice) -> None:
        self._notices.pop((notice.room_id, notice.user), None)
        self._reactions.forget(notice.event_id)

    async def _redacted(self, notice: _Notice) -> None:
        notice.redactions += 1
        redacting = Deferred.fromCoroutine(self._voice.redact(notice.room_id, notice.event_id))
        try:
            await Deadline.after(self._clock, self._send_timeout).wait(redacting)
        except Exception:
            if notice.redactions < REDACTION_ATTEMPTS:
                again_at = self._clock.seconds() + 2.0**notice.redactions
                self._to_redact[notice.event_id] = (again_at, notice)
            raise
        await self._lobby.forget_notice(notice.room_id, notice.user, notice.event_id)

    def _in_background(self, work: Coroutine[Any, Any, None], notice: _Notice) -> None:
        bounded = Deadline.after(self._clock, 2 * self._send_timeout + TURN_TIMEOUT)

        def failed(failure: Failure) -> None:
            if failure.check(DependencyFailed, TimeoutError):
                reason = getattr(failure.value, "reason", "timeout")
                log.info(
                    "a notice or its redaction about {user} in {room_id} failed: {reason}",
                    user=notice.user, room_id=notice.room_id, reason=reason, event_name="lobby_notice_incomplete",
                )  # fmt: skip
            else:
                log.failure("asking {room_id} about {user} failed", failure, room_id=notice.room_id, user=notice.user)

        async def in_time() -> None:
            await bounded.wait(Deferred.fromCoroutine(work))

        run_in_background(in_time(), failed)
