# SPDX-License-Identifier: Apache-2.0
"""A Synapse module that tells the guard at once when a room's policy, power levels or members change.

It runs inside Synapse and needs Synapse and Twisted only, so Synapse's environment may hold just this file::

    modules:
      - module: lotusguard.synapse_module.PolicyPush
        config:
          url: http://127.0.0.1:8072            # the guard's operators' listener
          token_path: /etc/lotusguard/token     # its GUARD_ADMIN_TOKEN; or token: with the token itself
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from synapse.module_api import EventBase, ModuleApi, StateMap, make_deferred_yieldable
from synapse.module_api.errors import ConfigError
from twisted.internet.protocol import Protocol
from twisted.web.client import Agent, FileBodyProducer, HTTPConnectionPool
from twisted.web.http_headers import Headers

logger = logging.getLogger(__name__)

POLICY_EVENTS = (
    "io.lotus.voice_limit",
    "io.lotus.room_quality",
    "io.lotus.call_permissions",
    "io.lotus.lobby",
    "m.room.power_levels",
)
"""State events, with the state key "", that decide what the guard enforces."""
TIMEOUT = 2.0
"""Seconds for one request, connecting included."""
FIRST_PAUSE = 0.25
"""Seconds before the second attempt; doubled with each."""
GIVE_UP = 10.0
"""Seconds after which no attempt is begun. By then the guard has read the state by itself, or has been restarted."""
ROOMS_AT_ONCE = 100
"""Rooms with requests in flight or waiting. The guard notices changes in further rooms by itself."""
ROOMS_AT_ONCE_FOR_JOINS = 50
"""The same limit for joining users. They are least urgent: the guard reads a membership before it refuses a user."""
MOST_USERS = 5
"""Changed members of a room that are reported one by one. If there are more, the whole room is reported."""
JOINS_REMEMBERED = 10_000
"""Reported joins that are remembered, because a changed display name is an m.room.member event with "join", too."""
SHORT_BODY = 4096
"""Longest answer that is read, in bytes, so that its connection can be used again. Only the status counts."""
IDLE_TIMEOUT = 5
"""Seconds for which an unused connection to the guard stays open."""


@dataclass(frozen=True)
class PolicyPushConfig:
    """:ivar url: the operators' listener, without a trailing slash."""

    url: str
    token: str = field(repr=False)


@dataclass
class _Changes:
    """Changes of one room that have not been reported.

    :ivar users: users whose membership changed, in order.
    :ivar whole: the policy changed, or the membership of more than `MOST_USERS` users.
    :ivar count: number of changes so far.
    :ivar attempted: ``count`` at the last attempt to report.
    """

    users: dict[str, None] = field(default_factory=dict)
    whole: bool = False
    count: int = 0
    attempted: int = 0

    def __bool__(self) -> bool:
        return self.whole or bool(self.users)

    def add(self, user: str | None) -> None:
        """:param user: the user whose membership changed; None if the policy changed."""
        if user is None:
            self.whole = True
        elif not self.whole:
            self.users[user] = None
        if self.whole or len(self.users) > MOST_USERS:
            self.whole = True
            self.users.clear()

    def first(self) -> str | None:
        """The user to report next; None for the whole room."""
        return None if self.whole else next(iter(self.users))

    def remove(self, user: str | None) -> None:
        """Remove a change that is about to be reported."""
        if user is None:
            self.whole = False
        else:
            self.users.pop(user, None)


class PolicyPush:
    """Posts ``/policy-changed`` when one of our state events is new or redacted, and when a user joins, leaves, or is
    kicked or banned.

    Synapse calls `on_new_event` on every worker for every event and waits for it before clients see the event. So it
    starts a background process and returns. Every worker reports every change, because the process that answers the
    admin API may learn of an event later than the process that wrote it; a second report does no harm.

    :param reactor: the one Synapse runs on.
    :param agent: sends the requests.
    """

    def __init__(self, config: PolicyPushConfig, api: ModuleApi, *, reactor: Any = None, agent: Any = None) -> None:
        if reactor is None:
            from twisted.internet import reactor
        self._api = api
        self._clock = reactor
        self._agent = agent if agent is not None else _agent(reactor)
        self._uri = f"{config.url}/policy-changed".encode("ascii")
        self._headers = {"Authorization": [f"Bearer {config.token}"], "Content-Type": ["application/json"]}
        self._rooms: dict[str, _Changes] = {}
        self._joins: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._overrun = False
        api.register_third_party_rules_callbacks(on_new_event=self.on_new_event)

    @staticmethod
    def parse_config(config: Mapping[str, Any]) -> PolicyPushConfig:
        """:raises ConfigError: one line that names the key, its fault and what is expected; never the token."""
        for key in config:
            if key not in ("url", "token", "token_path"):
                raise ConfigError(f"{key}: unknown key; expected url and token or token_path", (str(key),))
        if ("token" in config) == ("token_path" in config):
            fault = "both are set" if "token" in config else "neither is set"
            raise ConfigError(f"token, token_path: {fault}; expected one of them", ("token",))
        key = "token" if "token" in config else "token_path"
        token = config["token"] if key == "token" else _contents(config["token_path"])
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(f"{key}: holds no token; expected the guard's GUARD_ADMIN_TOKEN", (key,))
        return PolicyPushConfig(_base_url(config.get("url")), token)

    async def on_new_event(self, event: EventBase, state: StateMap[EventBase]) -> None:
        """Called by Synapse with each new event and the room's state after it. Returns at once."""
        user = changed_member(event)
        if user is not None:
            joined = event.content.get("membership") == "join"
            if not (joined and self._is_known_join(event.room_id, user)):
                self._report(event.room_id, user, ROOMS_AT_ONCE_FOR_JOINS if joined else ROOMS_AT_ONCE)
            if not joined:
                self._joins.pop((event.room_id, user), None)
        elif changes_policy(event, state):
            self._report(event.room_id, None, ROOMS_AT_ONCE)

    def _is_known_join(self, room_id: str, user: str) -> bool:
        """Whether this join has been reported, so that the event only changes a display name or an avatar."""
        known = (room_id, user) in self._joins
        self._joins[room_id, user] = None
        self._joins.move_to_end((room_id, user))
        if len(self._joins) > JOINS_REMEMBERED:
            self._joins.popitem(last=False)
        return known

    def _report(self, room_id: str, user: str | None, limit: int) -> None:
        changes = self._rooms.get(room_id)
        if changes is not None:
            changes.add(user)
            changes.count += 1
        elif len(self._rooms) < limit:
            changes = self._rooms[room_id] = _Changes()
            changes.add(user)
            self._api.delayed_background_call(0, self._tell, room_id, changes, desc="lotusguard_policy_push")
        elif limit == ROOMS_AT_ONCE and not self._overrun:
            self._overrun = True
            logger.warning("the guard is not told of changes in some rooms: too many rooms change at once")

    async def _tell(self, room_id: str, changes: _Changes) -> None:
        """Report every change of a room, including those that arrive during a report."""
        try:
            while changes:
                error = await self._report_all(room_id, changes)
                if error:
                    logger.warning("could not tell the guard that %s changed: %s", room_id, error)
                    if changes.attempted == changes.count:
                        return
        finally:
            del self._rooms[room_id]
            self._overrun = False

    async def _report_all(self, room_id: str, changes: _Changes) -> str:
        """:return: why the guard could not be told, or ``""``."""
        end = self._clock.seconds() + GIVE_UP
        pause = FIRST_PAUSE
        while changes:
            user = changes.first()
            changes.remove(user)  # a change during the report is reported separately
            changes.attempted = changes.count
            error, final = await self._attempt(room_id, user)
            if not error:
                continue
            changes.add(user)
            if final or self._clock.seconds() + pause > end:
                return error
            await self._api.sleep(pause)
            pause *= 2
        return ""

    async def _attempt(self, room_id: str, user: str | None) -> tuple[str, bool]:
        """:return: why the guard could not be told, or ``""``; and whether another attempt is useless."""
        try:
            code = await self._post(room_id, user)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:200], False
        if code < 300:
            return "", True
        answered = f"it answers {code}"
        if code in (401, 403):
            return f"{answered}; the token must be its GUARD_ADMIN_TOKEN", True
        if code < 500 and code != 429:
            return f"{answered}; the url must be its operators' listener", True
        return answered, False

    async def _post(self, room_id: str, user: str | None) -> int:
        """:return: the status of the guard's answer."""
        content = {"room_id": room_id} if user is None else {"room_id": room_id, "user": user}
        body = FileBodyProducer(BytesIO(json.dumps(content).encode("ascii")))
        asked = self._agent.request(b"POST", self._uri, Headers(self._headers), body)
        response = await make_deferred_yieldable(asked.addTimeout(TIMEOUT, self._clock))
        response.deliverBody(_Discard(response.length))
        code: int = response.code
        return code


def changes_policy(event: EventBase, state: StateMap[EventBase]) -> bool:
    """Whether a new event is one of our state events, or redacts one that is in force."""
    if event.type in POLICY_EVENTS:
        return event.get_state_key() == ""
    if event.type == "m.room.redaction":
        in_force = [state[kind, ""].event_id for kind in POLICY_EVENTS if (kind, "") in state]
        return event.redacts in in_force
    return False


def changed_member(event: EventBase) -> str | None:
    """The user who joined, left, was kicked or was banned by this event; None for any other event."""
    if event.type != "m.room.member" or event.content.get("membership") not in ("join", "leave", "ban"):
        return None
    return event.get_state_key()


def _agent(reactor: Any) -> Agent:
    pool = HTTPConnectionPool(reactor)
    pool.cachedConnectionTimeout = IDLE_TIMEOUT
    return Agent(reactor, connectTimeout=TIMEOUT, pool=pool)


class _Discard(Protocol):
    """Discards a short body, so that the connection can be used again; closes the connection if the body is longer."""

    def __init__(self, length: object) -> None:
        self._short = isinstance(length, int) and length <= SHORT_BODY

    def connectionMade(self) -> None:
        assert self.transport is not None
        if not self._short:
            self.transport.loseConnection()


def _base_url(url: object) -> str:
    expected = "expected a URL such as http://127.0.0.1:8072"
    if url is None:
        raise ConfigError(f"url: is not set; {expected}", ("url",))
    text = str(url).strip()
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    plain = text.isascii() and text.isprintable() and " " not in text
    if not usable or not plain or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"url: is not an http(s) URL of a service; {expected}", ("url",))
    return text.rstrip("/")


def _contents(path: object) -> str:
    try:
        return Path(str(path)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        fault = f"token_path: {str(path)!r} cannot be read ({reason}); expected a file that Synapse may read"
        raise ConfigError(fault, ("token_path",)) from None
