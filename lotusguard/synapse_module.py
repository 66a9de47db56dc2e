# SPDX-License-Identifier: Apache-2.0
"""A Synapse module: tells the guard at once that a room's policy changed. Beside the house: it runs inside Synapse.

It needs Synapse and Twisted and nothing else of lotusguard, so Synapse's environment may hold just this file::

    modules:
      - module: lotusguard.synapse_module.PolicyPush
        config:
          url: http://127.0.0.1:8072            # the guard's operators' listener
          token_path: /etc/lotusguard/token     # its GUARD_ADMIN_TOKEN; or token: with the token itself
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from synapse.module_api import EventBase, ModuleApi, StateMap, make_deferred_yieldable
from synapse.module_api.errors import ConfigError
from twisted.internet.protocol import Protocol
from twisted.web.client import Agent, FileBodyProducer
from twisted.web.http_headers import Headers

logger = logging.getLogger(__name__)

POLICY_EVENTS = ("io.lotus.voice_limit", "io.lotus.room_quality")
TIMEOUT = 2.0
"""Seconds for one try, the connecting included."""
FIRST_PAUSE = 0.25
"""Seconds before the second try; doubled with each."""
GIVE_UP = 10.0
"""Seconds after which no further try is begun: by then the guard has looked for itself, or will start with no cache."""
ROOMS_AT_ONCE = 100
"""Rooms that are being told of at once; changes of more than these are left for the guard to notice."""


@dataclass(frozen=True)
class PolicyPushConfig:
    """:ivar url: the operators' listener, without a trailing slash."""

    url: str
    token: str = field(repr=False)


class PolicyPush:
    """Posts ``/policy-changed`` whenever one of our state events is new, or the one in force is redacted.

    Synapse calls `on_new_event` on every worker for every event and waits for it before clients see the event: it
    starts a background process and returns. Every worker tells the guard, which does no harm: telling it twice has
    it look twice. It must be so, as the process that answers the admin API may learn of an event after the
    process that wrote it, and is the last to tell.

    :param reactor: the one Synapse runs on.
    :param agent: what sends the requests.
    """

    def __init__(self, config: PolicyPushConfig, api: ModuleApi, *, reactor: Any = None, agent: Any = None) -> None:
        if reactor is None:
            from twisted.internet import reactor
        self._api = api
        self._clock = reactor
        self._agent = agent if agent is not None else Agent(reactor, connectTimeout=TIMEOUT)
        self._uri = f"{config.url}/policy-changed".encode("ascii")
        self._headers = {"Authorization": [f"Bearer {config.token}"], "Content-Type": ["application/json"]}
        self._telling: set[str] = set()
        self._changed_again: set[str] = set()
        self._overrun = False
        api.register_third_party_rules_callbacks(on_new_event=self.on_new_event)

    @staticmethod
    def parse_config(config: Mapping[str, Any]) -> PolicyPushConfig:
        """:raises ConfigError: one line that names the key, its fault and what is expected; never the token."""
        for key in config:
            if key not in ("url", "token", "token_path"):
                raise ConfigError(f"{key}: no key has this name; expected url and token or token_path", (str(key),))
        if ("token" in config) == ("token_path" in config):
            fault = "both are set" if "token" in config else "neither is set"
            raise ConfigError(f"token, token_path: {fault}; expected one of them", ("token",))
        key = "token" if "token" in config else "token_path"
        token = config["token"] if key == "token" else _contents(config["token_path"])
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(f"{key}: holds no token; expected the guard's GUARD_ADMIN_TOKEN", (key,))
        return PolicyPushConfig(_base_url(config.get("url")), token)

    async def on_new_event(self, event: EventBase, state: StateMap[EventBase]) -> None:
        """Called by Synapse with each new event and the room's state after it. Waits for nothing."""
        if not changes_policy(event, state):
            return
        room_id = event.room_id
        if room_id in self._telling:
            self._changed_again.add(room_id)
        elif len(self._telling) < ROOMS_AT_ONCE:
            self._telling.add(room_id)
            self._api.delayed_background_call(0, self._tell, room_id, desc="lotusguard_policy_push")
        elif not self._overrun:
            self._overrun = True
            logger.warning("the guard is not told of some rooms' policies: it has to be told of too many at once")

    async def _tell(self, room_id: str) -> None:
        """Tell the guard until it knows of every change up to now."""
        try:
            while True:
                fault = await self._tried(room_id)
                if fault:
                    logger.warning("the guard was not told that the policy of %s changed: %s", room_id, fault)
                if room_id not in self._changed_again:
                    return
        finally:
            self._telling.discard(room_id)
            self._changed_again.discard(room_id)
            self._overrun = False

    async def _tried(self, room_id: str) -> str:
        """:return: why the guard could not be told, or ``""``."""
        end = self._clock.seconds() + GIVE_UP
        pause = FIRST_PAUSE
        while True:
            self._changed_again.discard(room_id)  # this try tells of all that changed until now
            try:
                code = await self._post(room_id)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"[:200]
            else:
                if code < 300:
                    return ""
                fault = f"it answers {code}"
                if code in (401, 403):
                    return f"{fault}; the token must be its GUARD_ADMIN_TOKEN"
                if code < 500 and code != 429:
                    return f"{fault}; the url must be its operators' listener"
            if self._clock.seconds() + pause > end:
                return fault
            await self._api.sleep(pause)
            pause *= 2

    async def _post(self, room_id: str) -> int:
        """:return: the status that the guard answers with."""
        body = FileBodyProducer(BytesIO(json.dumps({"room_id": room_id}).encode("ascii")))
        asked = self._agent.request(b"POST", self._uri, Headers(self._headers), body)
        response = await make_deferred_yieldable(asked.addTimeout(TIMEOUT, self._clock))
        response.deliverBody(_Unread())
        code: int = response.code
        return code


def changes_policy(event: EventBase, state: StateMap[EventBase]) -> bool:
    """Whether a new event is, or takes the content from, what a room's policy is made of."""
    if event.type in POLICY_EVENTS:
        return event.get_state_key() == ""
    if event.type == "m.room.redaction":
        inforce = [state[kind, ""].event_id for kind in POLICY_EVENTS if (kind, "") in state]
        return event.redacts in inforce
    return False


class _Unread(Protocol):
    """Takes no body: the status was all."""

    def connectionMade(self) -> None:
        assert self.transport is not None
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
        raise ConfigError(f"url: is no http(s) URL of a service; {expected}", ("url",))
    return text.rstrip("/")


def _contents(path: object) -> str:
    try:
        return Path(str(path)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        fault = f"token_path: {str(path)!r} cannot be read ({reason}); expected a file that Synapse may read"
        raise ConfigError(fault, ("token_path",)) from None
