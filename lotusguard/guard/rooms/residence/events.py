# SPDX-License-Identifier: Apache-2.0
"""What follows from an answer to ``/sync``: enforcement, member lists to be read, commands, reactions."""

from __future__ import annotations

from typing import Protocol

from attrs import define, field
from cachetools import LRUCache
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.clients.keyed_worker import KeyedWorker
from lotusguard.clients.synapse import MatrixClient
from lotusguard.clients.synapse.sync_answer import JoinedRoom, RoomEvent
from lotusguard.guard.rooms.residence.account import GuardAccount
from lotusguard.guard.rooms.residence.background import BackgroundWork
from lotusguard.guard.rooms.residence.member_lists import READ_AGAIN, READ_AGAIN_LATEST, MemberLists
from lotusguard.guard.rooms.residence.residence import Residence
from lotusguard.guard.rooms.residence.room import KEPT_TYPES, MESSAGE, REACTION, RoomChange
from lotusguard.guard.rooms.residence.voice import ResidentVoice
from lotusguard.guard.rooms.voice import Reaction
from lotusguard.rules.commands import is_command as begins_as_command
from lotusguard.rules.state import StateEvent

log = Logger()

USERS_NAMED = 20
"""Memberships that change in one answer and are passed on one by one; with more, the whole room is read again."""
ROOMS_AT_ONCE = 4
"""Rooms whose changes are passed on at the same time."""
EVENTS_REMEMBERED = 10_000
"""Commands and reactions. A homeserver that sends one twice has it done once."""
OLDEST = 60.0
"""Seconds after which a command or a reaction is not answered any more: the guard was away."""
CANNOT_READ = (
    "I enforce this room's call settings. Messages here are encrypted and I have no keys, so I cannot read commands; "
    "room state, power levels and reactions work."
)


class RoomListener(Protocol):
    """Enforces what changed; `CallChanges` is one."""

    async def resident_room_changed(self, room_id: str, user: str = "") -> None:
        """State or memberships of the room changed. :param user: whose membership, if only one did."""

    async def resident_room_left(self, room_id: str) -> None:
        """The account is not in the room any more."""


class CommandListener(Protocol):
    """Answers commands; `Commands` is one."""

    def received(self, room_id: str, event: RoomEvent) -> None:
        """Somebody wrote a command. Returns at once."""

    def stop(self) -> None:
        """Answer no more."""


@define(eq=False)
class RoomEvents:
    """Passes on what happens in rooms that the account is in.

    :ivar commands: answers commands; ``None`` if nobody does. :ivar member_lists: reads the rooms' member lists.
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
    _heard: LRUCache[str, None] = field(factory=lambda: LRUCache(EVENTS_REMEMBERED), init=False)
    _tellers: KeyedWorker[str] = field(init=False)
    member_lists: MemberLists = field(init=False)
    _background: BackgroundWork = field(factory=BackgroundWork, init=False)

    def __attrs_post_init__(self) -> None:
        self._tellers = KeyedWorker(self._tell, ROOMS_AT_ONCE, _failed)
        self.member_lists = MemberLists(self._client, self._residence, self._clock)

    def stop(self) -> None:
        self._tellers.stop()
        self.member_lists.stop()
        if self.commands is not None:
            self.commands.stop()
        self._background.stop()

    def changed(self, room_id: str, change: RoomChange, news: JoinedRoom, *, full: bool, new: bool) -> None:
        """Something changed in a room. :param full: the answer tells the whole state. :param new: of a new room."""
        if change.gap or full or new:
            self.member_lists.read(room_id, (*news.state, *news.timeline))
        for kind in change.redacted:
            self._background.start_anew((room_id, kind), self._read_again(room_id, kind))
        if change.encrypted and not full:
            self._background.start(self._say_it_cannot_read(room_id))
        if full and new:
            return  # the guard has just started, or has just been told of the room: nothing that it knows is old
        if change.state or change.gap or full or new or len(change.users) > USERS_NAMED:
            self._pass_on(room_id, {""})
        elif change.users:
            self._pass_on(room_id, set(change.users))

    def left(self, room_id: str) -> None:
        """The account is not in a room any more: it was removed, or it left."""
        log.info("no longer in {room_id}", room_id=room_id, event_name="room_left")
        self.member_lists.left(room_id)
        for kind in KEPT_TYPES:
            self._background.cancel((room_id, kind))
        self._left.add(room_id)
        self._pass_on(room_id, {""})
        self._background.start(self._client.forget(room_id))

    def said(self, room_id: str, news: JoinedRoom) -> None:
        """What people said: commands and reactions."""
        for event in news.timeline:
            if event.sender == self._account.user_id or event.state_key is not None or event.age > OLDEST:
                continue
            if event.event_id in self._heard:
                continue
            if event.event_id and (event.type == REACTION or is_command(event)):
                self._heard[event.event_id] = None
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

    async def _read_again(self, room_id: str, kind: str) -> None:
        """A state event was redacted: read what is left of it, unless a newer one is heard in between.

        It is tried until the homeserver answers, ever more rarely: the room's state would stay wrong otherwise. It ends
        when the event is redacted again, when the account leaves the room, and with the guard.
        """
        room, pause = self._residence.room(room_id), READ_AGAIN
        redacted = room.state.get(kind) if room is not None else None
        while room is not None and redacted is not None and room.state.get(kind) is redacted:
            try:
                events = await self._client.room_state(room_id, (kind,))
            except DependencyFailed:
                await deferLater(self._clock, pause)
                pause = min(READ_AGAIN_LATEST, 2 * pause)
            else:
                if room.state.get(kind) is redacted:
                    self._residence.put_state(room_id, events.get(kind) or StateEvent(kind, {}))
                break
            room = self._residence.room(room_id)
        self._pass_on(room_id, {""})

    async def _say_it_cannot_read(self, room_id: str) -> None:
        await self._voice.notice(room_id, CANNOT_READ)


def is_command(event: RoomEvent) -> bool:
    """Whether a message is a command: a text that begins with ``!call``, not an edit."""
    content = event.mapping
    body = content.get("body")
    if event.type != MESSAGE or content.get("msgtype") != "m.text" or not isinstance(body, str):
        return False
    relation = content.get("m.relates_to")
    edited = isinstance(relation, dict) and relation.get("rel_type") == "m.replace"
    return not edited and begins_as_command(body)


def _failed(room_id: str, failure: Failure) -> None:
    if failure.check(DependencyFailed):
        log.warn("{room_id}: {reason}", room_id=room_id, reason=failure.getErrorMessage(), event_name="room_not_read")
    else:
        log.failure("what changed in {room_id} could not be applied", failure, room_id=room_id)
