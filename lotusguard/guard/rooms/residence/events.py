# SPDX-License-Identifier: Apache-2.0
"""What follows from an answer to ``/sync``: enforcement, member lists to be read, commands, reactions."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol

from attrs import define, field
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.synapse import MatrixClient
from lotusguard.clients.synapse.sync_answer import MEMBER, JoinedRoom, RoomEvent
from lotusguard.clients.waiting import run_in_background
from lotusguard.guard.rooms.residence.account import GuardAccount
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.guard.rooms.residence.room import MESSAGE, REACTION, RoomChange
from lotusguard.guard.rooms.residence.voice import ResidentVoice
from lotusguard.guard.rooms.voice import Reaction
from lotusguard.rules.commands import is_command as begins_as_command
from lotusguard.rules.state import StateEvent

log = Logger()

USERS_NAMED = 20
"""Memberships that change in one answer and are passed on one by one; with more, the whole room is read again."""
ROOMS_AT_ONCE = 4
"""Rooms whose members are read at the same time."""
READ_AGAIN = 10.0
"""Seconds after which a member list that could not be read is read again."""
OLDEST = 60.0
"""Seconds after which a command or a reaction is not answered any more: the guard was away."""
CANNOT_READ = (
    "I enforce this room's call settings. Messages here are encrypted and I have no keys, so I cannot read commands; "
    "room state, power levels and reactions work."
)


class RoomListener(Protocol):
    """Who enforces what changed (`CallChanges`)."""

    async def resident_room_changed(self, room_id: str, user: str = "") -> None:
        """State or memberships of the room changed. :param user: whose membership, if only one did."""

    async def resident_room_left(self, room_id: str) -> None:
        """The account is not in the room any more."""


class CommandListener(Protocol):
    """Who answers commands (`Commands`)."""

    def received(self, room_id: str, event: RoomEvent) -> None:
        """Somebody wrote a command. Returns at once."""

    def stop(self) -> None:
        """Answer no more."""


@define(eq=False)
class RoomEvents:
    """Passes on what happens in rooms that the account is in.

    :ivar commands: answers commands; ``None`` if nobody does.
    """

    _client: MatrixClient
    _account: GuardAccount
    _residence: Residence
    _voice: ResidentVoice
    _listener: RoomListener
    _clock: IReactorTime
    commands: CommandListener | None = field(default=None, init=False)
    _due: dict[str, set[str]] = field(factory=dict, init=False)
    _left: set[str] = field(factory=set, init=False)
    _recent: dict[str, dict[str, bool]] = field(factory=dict, init=False)
    _tellers: KeyedWorker[str] = field(init=False)
    _readers: KeyedWorker[str] = field(init=False)
    _being_read: set[str] = field(factory=set, init=False)
    _background: set[Deferred[object]] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        self._tellers = KeyedWorker(self._tell, ROOMS_AT_ONCE, _failed)
        self._readers = KeyedWorker(self._read_members, ROOMS_AT_ONCE, _failed)

    def stop(self) -> None:
        self._tellers.stop()
        self._readers.stop()
        if self.commands is not None:
            self.commands.stop()
        for work in list(self._background):
            work.cancel()

    def changed(self, room_id: str, change: RoomChange, news: JoinedRoom, *, full: bool, new: bool) -> None:
        """Something changed in a room. :param full: the answer tells the whole state. :param new: of a new room."""
        if change.gap or full or new:
            members = [event for event in (*news.state, *news.timeline) if event.type == MEMBER and event.state_key]
            self._recent[room_id] = {
                event.state_key: event.mapping.get("membership") == "join" for event in members if event.state_key
            }
            self.read_members(room_id)
        for kind in change.redacted:
            self._start(self._read_again(room_id, kind))
        if change.encrypted and not full:
            self._start(self._say_it_cannot_read(room_id))
        if full and new:
            return  # the guard has just started, or has just been told of the room: nothing that it knows is old
        if change.state or change.gap or full or new or len(change.users) > USERS_NAMED:
            self._pass_on(room_id, {""})
        elif change.users:
            self._pass_on(room_id, set(change.users))

    def left(self, room_id: str) -> None:
        """The account is not in a room any more: it was removed, or it left."""
        log.info("no longer in {room_id}", room_id=room_id, event_name="room_left")
        self._recent.pop(room_id, None)
        self._left.add(room_id)
        self._pass_on(room_id, {""})
        self._start(self._client.forget(room_id))

    def said(self, room_id: str, news: JoinedRoom) -> None:
        """What people said: commands and reactions."""
        for event in news.timeline:
            if event.sender == self._account.user_id or event.state_key is not None or event.age > OLDEST:
                continue
            if event.type == REACTION:
                self._hear(room_id, event)
            elif is_command(event) and self.commands is not None:
                self.commands.received(room_id, event)

    def holds_commands(self, news: JoinedRoom) -> bool:
        """Whether there is a command, or a reaction, in it."""
        return any(event.type == REACTION or is_command(event) for event in news.timeline)

    def _hear(self, room_id: str, event: RoomEvent) -> None:
        relation = event.mapping.get("m.relates_to")
        target, key = (relation.get("event_id"), relation.get("key")) if isinstance(relation, dict) else (None, None)
        if isinstance(target, str) and isinstance(key, str):
            self._voice.hear(Reaction(room_id, event.sender, target, key))

    # -- enforcement -----------------------------------------------------------------------------------------

    def _pass_on(self, room_id: str, users: set[str]) -> None:
        self._due.setdefault(room_id, set()).update(users)
        self._tellers.run(room_id)

    async def _tell(self, room_id: str) -> None:
        users = self._due.pop(room_id, set())
        if room_id in self._left:
            self._left.discard(room_id)
            if not self._residence.is_resident(room_id):
                await self._listener.resident_room_left(room_id)
        for user in {""} if "" in users else users:
            await self._listener.resident_room_changed(room_id, user)

    # -- reading -------------------------------------------------------------------------------------------

    def read_members(self, room_id: str) -> None:
        """Read the room's member list soon. Until then its memberships are looked up one by one."""
        self._residence.members_unknown(room_id)
        self._readers.run(room_id, urgent=room_id in self._being_read)

    async def _read_members(self, room_id: str) -> None:
        room = self._residence.room(room_id)
        if room is None:
            return
        room.begin_reading_members(self._recent.pop(room_id, {}).items())
        self._being_read.add(room_id)
        try:
            members = await self._client.joined_members(room_id)
        except DependencyFailed as failed:
            log.debug("the members of {room_id} were not read: {reason}", room_id=room_id, reason=failed.reason)
            self._start(self._read_members_later(room_id))
        else:
            self._residence.members_read(room_id, members)
        finally:
            self._being_read.discard(room_id)

    async def _read_members_later(self, room_id: str) -> None:
        await deferLater(self._clock, READ_AGAIN)
        self.read_members(room_id)

    async def _read_again(self, room_id: str, kind: str) -> None:
        """A state event was redacted: read what is left of it."""
        events = await self._client.room_state(room_id, (kind,))
        self._residence.put_state(room_id, events.get(kind) or StateEvent(kind, {}))
        self._pass_on(room_id, {""})

    async def _say_it_cannot_read(self, room_id: str) -> None:
        await self._voice.notice(room_id, CANNOT_READ)

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        """Do something that nobody waits for; every wait in it is bounded."""
        running = run_in_background(work, _log_failure)
        if not running.called:
            self._background.add(running)
            running.addBoth(lambda _: self._background.discard(running))


def is_command(event: RoomEvent) -> bool:
    """Whether a message is a command: a text that begins with ``!call``, not an edit."""
    content = event.mapping
    body = content.get("body")
    if event.type != MESSAGE or content.get("msgtype") != "m.text" or not isinstance(body, str):
        return False
    relation = content.get("m.relates_to")
    edited = isinstance(relation, dict) and relation.get("rel_type") == "m.replace"
    return not edited and begins_as_command(body)


def _log_failure(failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.debug("{reason}", reason=failure.getErrorMessage())
    else:
        log.failure("work for a room failed", failure)


def _failed(room_id: str, failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.warn("{room_id}: {reason}", room_id=room_id, reason=failure.getErrorMessage(), event_name="room_not_read")
    else:
        log.failure("what changed in {room_id} could not be applied", failure, room_id=room_id)
