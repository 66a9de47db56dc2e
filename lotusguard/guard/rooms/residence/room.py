# SPDX-License-Identifier: Apache-2.0
"""What is known of one room by being in it, kept up to date from the answers to ``/sync``. No I/O."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from attrs import define, field, frozen

from lotusguard.clients.synapse.sync_answer import MEMBER, JoinedRoom, RoomEvent
from lotusguard.rules.membership import Membership
from lotusguard.rules.state import LEVEL_TYPES, POLICY_TYPES, StateEvent

ENCRYPTION = "m.room.encryption"
MESSAGE, REACTION, REDACTION = "m.room.message", "m.reaction", "m.room.redaction"
KEPT_TYPES = (*POLICY_TYPES, *LEVEL_TYPES, ENCRYPTION)
"""State events that are kept, with the state key ``""``."""
STATE_TYPES = (*KEPT_TYPES, MEMBER)
TIMELINE_TYPES = (MESSAGE, REACTION, REDACTION)


@frozen
class RoomChange:
    """What an answer changed.

    :ivar state: whether a kept state event changed.
    :ivar users: whose membership changed.
    :ivar redacted: types of kept state events that were redacted: they have to be read again.
    :ivar gap: events are missing: memberships may have changed unseen.
    :ivar encrypted: the room has just become encrypted.
    """

    state: bool
    users: frozenset[str]
    redacted: frozenset[str]
    gap: bool
    encrypted: bool


@define(eq=False)
class ResidentRoom:
    """One room.

    :ivar state: the kept state events by type; another mapping after each change.
    :ivar inviter: who invited the account; ``""`` if that is not known.
    :ivar size: bytes of ``state``, about.
    :ivar joined: the users who are joined; ``None`` until they were read, or if they are too many to be kept.
    """

    state: Mapping[str, StateEvent] = field(factory=dict)
    joined: set[str] | None = None
    inviter: str = ""
    size: int = 0
    _event_ids: dict[str, str] = field(factory=dict)
    _heard_while_reading: dict[str, bool] | None = field(default=None, init=False)

    @property
    def encrypted(self) -> bool:
        return ENCRYPTION in self.state

    # -- answers to /sync ----------------------------------------------------------------------------------

    def apply(self, news: JoinedRoom) -> RoomChange:
        """Take over what an answer says. ``state`` is older than ``timeline``."""
        before, was_encrypted = self.state, self.encrypted
        state, users, redacted = dict(before), set(), set()
        by_event_id = {event_id: kind for kind, event_id in self._event_ids.items()}
        for event in (*news.state, *news.timeline):
            if event.state_key == "" and event.type in KEPT_TYPES:
                state[event.type] = StateEvent(event.type, event.content, event.sender)
                self._event_ids[event.type] = event.event_id
                by_event_id[event.event_id] = event.type
            elif event.type == MEMBER and event.state_key:
                if self._apply_member(event):
                    users.add(event.state_key)
            elif event.type == REDACTION and event.redacts in by_event_id:
                redacted.add(by_event_id[event.redacts])
        if state != before:
            self._replace(state)
        return RoomChange(
            state != before, frozenset(users), frozenset(redacted), news.limited, self.encrypted and not was_encrypted
        )

    def _apply_member(self, event: RoomEvent) -> bool:
        """:return: whether the membership changed, as far as is known."""
        assert event.state_key is not None
        joined = event.mapping.get("membership") == Membership.JOIN.value
        if self._heard_while_reading is not None:
            self._heard_while_reading[event.state_key] = joined
        if self.joined is None:
            return True
        if joined == (event.state_key in self.joined):
            return False
        (self.joined.add if joined else self.joined.discard)(event.state_key)
        return True

    def put(self, event: StateEvent) -> None:
        """A kept state event as it was just read."""
        known = self.state.get(event.type)
        self._replace({**self.state, event.type: StateEvent(event.type, event.content, known.sender if known else "")})

    def forget_state(self) -> None:
        """It is too large to be kept."""
        self._event_ids.clear()
        self._replace({})

    def _replace(self, state: Mapping[str, StateEvent]) -> None:
        self.state = state
        self.size = sum(len(str(event.content)) + 200 for event in state.values())

    # -- members -------------------------------------------------------------------------------------------

    def begin_reading_members(self, recent: Iterable[tuple[str, bool]] = ()) -> None:
        """The member list is being read. What is heard from now on is newer than the list, or about to be corrected
        by what is heard next."""
        self._heard_while_reading = dict(recent)

    def members_read(self, members: Iterable[str] | None) -> None:
        """The member list as it was read; ``None`` if it is too long to be kept."""
        heard, self._heard_while_reading = self._heard_while_reading or {}, None
        if members is None:
            self.joined = None
            return
        joined = set(members)
        for user, is_joined in heard.items():
            (joined.add if is_joined else joined.discard)(user)
        self.joined = joined

    # -- the state store -----------------------------------------------------------------------------------

    def dumped(self) -> str:
        """The state as JSON. Members are not among it: they are read again."""
        events = [[event.type, event.content, event.sender] for event in self.state.values()]
        return json.dumps({"state": events, "event_ids": self._event_ids, "inviter": self.inviter})

    @classmethod
    def loaded(cls, text: str) -> ResidentRoom:
        """:raises ValueError: this is not what `dumped` wrote."""
        try:
            content: Any = json.loads(text)
            event_ids = {str(kind): str(event_id) for kind, event_id in content["event_ids"].items()}
            room = cls(inviter=str(content.get("inviter", "")), event_ids=event_ids)
            room._replace({kind: StateEvent(kind, value, sender) for kind, value, sender in content["state"]})
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("not a stored room") from error
        return room
