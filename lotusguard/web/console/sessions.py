# SPDX-License-Identifier: Apache-2.0
"""Signing in to the console: sessions, their CSRF tokens, and how often somebody may try."""

from __future__ import annotations

import hmac
from secrets import token_urlsafe

from attrs import define, field, frozen
from cachetools import TTLCache
from twisted.internet.interfaces import IReactorTime

SESSION_LIFETIME = 8 * 3600.0
SESSIONS_KEPT = 100
ATTEMPTS = 5
"""Wrong tokens that one address may send within `ATTEMPT_WINDOW`."""
ALL_ATTEMPTS = 50
"""The same for all addresses together."""
ATTEMPT_WINDOW = 60.0
ADDRESSES_KEPT = 10_000


class TooManyAttempts(Exception):
    """Too many wrong tokens lately."""


@frozen
class Session:
    """:ivar id: the cookie's value. :ivar csrf: what every form of this session carries."""

    id: str = field(repr=False)
    csrf: str = field(repr=False)


@define(eq=False)
class Sessions:
    """Who is signed in.

    :param token: ``GUARD_ADMIN_TOKEN``; ``""`` admits nobody.
    """

    _token: str = field(repr=False)
    _clock: IReactorTime
    _sessions: TTLCache[str, Session] = field(init=False, repr=False)
    _failures: TTLCache[str, int] = field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._sessions = TTLCache(SESSIONS_KEPT, SESSION_LIFETIME, timer=self._clock.seconds)
        self._failures = TTLCache(ADDRESSES_KEPT, ATTEMPT_WINDOW, timer=self._clock.seconds)

    def use_token(self, token: str) -> None:
        """Another token counts from now on; who is signed in has to sign in again."""
        self._token = token
        self._sessions.clear()

    @property
    def enabled(self) -> bool:
        return bool(self._token)

    def sign_in(self, given: str, address: str) -> Session | None:
        """Start a session. :return: ``None`` if the token is wrong. :raises TooManyAttempts:"""
        if self._failures.get(address, 0) >= ATTEMPTS or self._failures.get("", 0) >= ALL_ATTEMPTS:
            raise TooManyAttempts
        if not self._token or not hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode("utf-8")):
            for key in (address, ""):
                self._failures[key] = self._failures.get(key, 0) + 1
            return None
        session = Session(token_urlsafe(32), token_urlsafe(32))
        self._sessions[session.id] = session
        return session

    def find(self, cookie: str) -> Session | None:
        """The session of a cookie. Looked up by an unguessable value, so its timing tells nothing."""
        session: Session | None = self._sessions.get(cookie)
        return session

    def sign_out(self, session: Session) -> None:
        self._sessions.pop(session.id, None)

    @staticmethod
    def has_csrf(session: Session, given: str) -> bool:
        """Whether a form was made for this session."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), session.csrf.encode("ascii"))
