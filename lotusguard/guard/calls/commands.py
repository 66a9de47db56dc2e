# SPDX-License-Identifier: Apache-2.0
"""Commands that moderators write into rooms the guard is in (``!call …``). Each is answered by one notice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.synapse import MatrixClient
from lotusguard.clients.synapse.sync_answer import RoomEvent
from lotusguard.clients.waiting import Deadline
from lotusguard.guard.calls.moderation import Moderation, ModerationAction, OnlyDecided
from lotusguard.guard.calls.status import USERS_NAMED, CallStatus, one_line
from lotusguard.guard.rooms.residence.account import GuardAccount
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.guard.rooms.residence.voice import RateLimit
from lotusguard.guard.rooms.voice import RoomVoice
from lotusguard.metrics import Metrics
from lotusguard.rules.commands import USAGE, Authority, Command, NotACommand, Verb, read_command
from lotusguard.rules.state import VOICE_LIMIT

log = Logger()

ROOM_BURST, ROOM_RATE = 10, 0.2
"""Commands of a room's moderators that are answered at once, and per second in the long run. More are dropped."""
OTHERS_BURST, OTHERS_RATE = 3, 0.05
"""The same for everybody else in the room, who are told that they may not: they must not silence the moderators."""
ROOMS_AT_ONCE = 8
TIMEOUT = 30.0
"""Seconds that a command may take."""

_ACTIONS: Mapping[Verb, tuple[ModerationAction, str, str]] = {
    # verb: (what is done, the answer if it was, the answer if it was not)
    Verb.REMOVE: (
        ModerationAction.REMOVE,
        "{user} was removed from the call. For 10 minutes, or until admitted, they cannot join it.",
        "{user} is not in the call.",
    ),
    Verb.MUTE: (ModerationAction.MUTE, "{user} was muted. They can unmute themselves.", "{user} is not in the call."),
    Verb.ADMIT: (ModerationAction.ADMIT, "{user} was admitted.", "{user} is not waiting."),
    Verb.DENY: (ModerationAction.DENY, "{user} was denied.", "{user} is not waiting."),
}


class EndsCalls(Protocol):
    """Ends calls; `CallEnder` does."""

    async def end(self, room_id: str, by: str) -> int:
        """:return: how many participants were removed."""


class CommandRefused(Exception):
    """Somebody may not do this; the text says why."""


@define(eq=False)
class Commands:
    """Answers commands, one after another in each room.

    :ivar moderation: does what moderators ask for; ``None`` if nothing can.
    :ivar waiting: the users who wait in a room's lobby.
    """

    _voice: RoomVoice
    _client: MatrixClient
    _account: GuardAccount
    _residence: Residence
    _status: CallStatus
    _ender: EndsCalls
    moderation: Moderation | None
    waiting: Callable[[str], Sequence[str]]
    _clock: IReactorTime
    _metrics: Metrics
    _queues: dict[str, deque[RoomEvent]] = field(factory=dict, init=False)
    _limits: LRUCache[tuple[str, bool], RateLimit] = field(factory=lambda: LRUCache(10_000), init=False)
    _worker: KeyedWorker[str] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._worker = KeyedWorker(self._answer_all, ROOMS_AT_ONCE, _failed)

    @property
    def worker(self) -> KeyedWorker[str]:
        """Answers, one room at a time for each key."""
        return self._worker

    def received(self, room_id: str, event: RoomEvent) -> None:
        """Somebody wrote a command. Returns at once."""
        if not self._limit_of(room_id, event.sender).take():
            self._metrics.commands.labels("dropped").inc()
            return
        self._queues.setdefault(room_id, deque()).append(event)
        self._worker.run(room_id, urgent=False)

    def _limit_of(self, room_id: str, sender: str) -> RateLimit:
        """Which limit counts for a user now."""
        pushed = self._residence.state_of(room_id)
        moderates = pushed is not None and Authority.of_state(pushed.events).may_moderate(sender)
        limit = self._limits.get((room_id, moderates))
        if limit is None:
            burst, rate = (ROOM_BURST, ROOM_RATE) if moderates else (OTHERS_BURST, OTHERS_RATE)
            limit = self._limits[room_id, moderates] = RateLimit(self._clock, burst, rate)
        return limit

    def stop(self) -> None:
        self._worker.stop()

    async def _answer_all(self, room_id: str) -> None:
        queue = self._queues.get(room_id, deque())
        while queue:
            event = queue.popleft()
            text, outcome = await self._answer(room_id, event)
            self._metrics.commands.labels("done" if outcome == "leaving" else outcome).inc()
            log.info(
                "{user} commanded {command} in {room_id}: {outcome}",
                user=event.sender, command=str(event.mapping["body"])[:200], room_id=room_id, outcome=outcome,
                event_name="command",
            )  # fmt: skip
            await self._say(room_id, text, f"call-{event.event_id}" if event.event_id else "")
            if outcome == "leaving":
                await self._leave(room_id)
        self._queues.pop(room_id, None)

    async def _say(self, room_id: str, text: str, transaction: str = "") -> None:
        try:
            await self._voice.notice(room_id, text, transaction)
        except DependencyFailed as failed:
            log.warn("could not answer in {room_id}: {reason}", room_id=room_id, reason=failed.reason)

    async def _leave(self, room_id: str) -> None:
        try:
            await self._client.leave(room_id)
        except DependencyFailed as failed:
            await self._say(room_id, f"I could not leave ({failed.reason}).")

    async def _answer(self, room_id: str, event: RoomEvent) -> tuple[str, str]:
        """Do what a command says. :return: the answer, and the outcome."""
        doing = Deferred.fromCoroutine(self._do(room_id, event))
        try:
            text = await Deadline.after(self._clock, TIMEOUT).wait(doing)
        except (CommandRefused, NotACommand) as refused:
            return str(refused), "refused"
        except DependencyFailed as failed:
            return f"That did not work ({failed.dependency}: {failed.reason}).", "failed"
        except TimeoutError:
            return "That did not work in time.", "failed"
        except Exception:
            log.failure("a command in {room_id} failed", room_id=room_id)
            return "That did not work.", "failed"
        return text, "leaving" if text is GOODBYE else "done"

    async def _do(self, room_id: str, event: RoomEvent) -> str:
        pushed = self._residence.state_of(room_id)
        if pushed is None or not pushed.live:  # the sender's power level is not known
            raise DependencyFailed("synapse", "no_state")
        authority = Authority.of_state(pushed.events)
        if not authority.may_moderate(event.sender):
            raise CommandRefused(
                f"{one_line(event.sender)}: this needs power level {authority.moderate_level}, "
                f"yours is {authority.level_of(event.sender)}."
            )
        command = read_command(event.mapping["body"], _mentioned(event.mapping))
        match command.verb:
            case Verb.STATUS:
                return await self._status.describe(room_id)
            case Verb.HELP:
                return USAGE
            case Verb.LIMIT:
                return await self._set_limit(room_id, event.sender, command.limit, authority)
            case Verb.END:
                count = await self._ender.end(room_id, event.sender)
                return f"The call was ended; {count} participants were removed." if count else "Nobody is in the call."
            case Verb.LEAVE:
                return GOODBYE
        return await self._moderate(room_id, event.sender, command)

    async def _moderate(self, room_id: str, by: str, command: Command) -> str:
        if self.moderation is None:
            raise CommandRefused("This is not available here.")
        action, done, not_done = _ACTIONS[command.verb]
        users = [command.user] if command.user else list(self.waiting(room_id))
        if not users:
            return "Nobody is waiting."
        answers = []
        for user in users:
            try:
                outcome = done if await self.moderation.act(room_id, user, action, by) else not_done
            except OnlyDecided:
                outcome = "Dry run: nothing was done to {user}."
            answers.append(outcome.format(user=one_line(user)))
        more = len(answers) - USERS_NAMED
        return "\n".join(answers[:USERS_NAMED] + ([f"And {more} more."] if more > 0 else []))

    async def _set_limit(self, room_id: str, by: str, limit: int, authority: Authority) -> str:
        """Write the limit into room state, if both the moderator and the guard may."""
        needed = authority.level_to_send(VOICE_LIMIT)
        if not authority.may_send_state(by, VOICE_LIMIT):
            raise CommandRefused(
                f"{one_line(by)}: changing {VOICE_LIMIT} needs power level {needed}, yours is {authority.level_of(by)}."
            )
        own = self._account.user_id
        if not authority.may_send_state(own, VOICE_LIMIT):
            raise CommandRefused(
                f"I cannot change the limit: {VOICE_LIMIT} needs power level {needed}, mine is "
                f"{authority.level_of(own)}."
            )
        pushed = self._residence.state_of(room_id)
        event = pushed.events.get(VOICE_LIMIT) if pushed is not None else None
        content = dict(event.mapping) if event is not None else {}
        await self._client.put_state(room_id, VOICE_LIMIT, {**content, "max_users": limit})
        return f"At most {limit} people may be in the call now." if limit else "The call has no limit now."


GOODBYE = "I leave this room, and no longer hear what changes here."


def _mentioned(content: Mapping[str, Any]) -> list[str]:
    mentions = content.get("m.mentions")
    users = mentions.get("user_ids") if isinstance(mentions, dict) else None
    return [user for user in users if isinstance(user, str)] if isinstance(users, list) else []


def _failed(room_id: str, failure: Failure) -> None:
    log.failure("commands in {room_id} failed", failure, room_id=room_id)
