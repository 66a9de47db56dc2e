# SPDX-License-Identifier: Apache-2.0
"""The console's routes: signing in, the pages, the stream of updates, and what operators do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from urllib.parse import parse_qs

from attrs import define, field
from klein import Klein
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.template import Tag, flattenString

from lotusguard.guard.calls.changes import CallChanges
from lotusguard.guard.calls.moderation import Moderation, ModerationAction, OnlyDecided
from lotusguard.web.answers import NO_ROUTE, OPERATORS_ONLY, Rejected, Reply, answer_failure
from lotusguard.web.console import pages
from lotusguard.web.console.sessions import Session, Sessions, TooManyAttempts
from lotusguard.web.console.view import ConsoleView, Overview
from lotusguard.web.site import GuardRequest

log = Logger()

COOKIE = b"lotusguard_session"
MOST_FIELDS = 20
BAD_FORM = Reply(400, "M_INVALID_PARAM", "The form has too many fields.")
UPDATE_EVERY = 2.0
"""Seconds between two looks at whether the overview has changed."""
SHARE = 0.02
"""Part of its time that a console may take up the guard: with many calls it is updated less often."""
KEEP_ALIVE = 20.0
"""Seconds after which an unchanged stream is sent a comment, so that proxies keep it open."""
STREAMS = 8
"""Consoles that may be kept up to date at the same time."""
_HEADERS = {
    b"Cache-Control": b"no-store",
    b"Content-Security-Policy": b"default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"Referrer-Policy": b"no-referrer",
    b"X-Content-Type-Options": b"nosniff",
    b"X-Frame-Options": b"DENY",
}
_STATIC = {"style.css": b"text/css; charset=utf-8", "console.js": b"text/javascript; charset=utf-8"}
_QUESTIONS = {
    "admit": ("Admit {user} to the call?", "Admit"),
    "deny": ("Deny {user} entry to the call?", "Deny"),
    "mute": ("Mute {user} in the call?", "Mute"),
    "remove": ("Remove {user} from the call?", "Remove"),
    "refresh": ("Read the room's policy and members again?", "Read again"),
}


class SignedOut(Exception):
    """The request has no session."""


@define(slots=False, eq=False)
class Console:
    """The routes below ``/console`` and the front page. Off where no operators' token is set."""

    app = Klein()

    _view: ConsoleView
    _sessions: Sessions
    _moderation: Moderation | None
    _changes: CallChanges
    _clock: IReactorTime
    _streams: int = field(default=0, init=False)

    # -- pages -------------------------------------------------------------------------------------------

    async def front_page(self, request: GuardRequest) -> None:
        """``GET /``"""
        if not self._sessions.enabled:
            raise Rejected(OPERATORS_ONLY)
        if self._session(request) is None:
            await _send(request, 200, pages.sign_in())
        else:
            await _send(request, 200, pages.overview(await self._view.overview()))

    @app.route("/rooms", methods=["GET"])
    async def rooms(self, request: GuardRequest) -> None:
        """All live calls."""
        self._signed_in(request)
        await _send(request, 200, pages.all_rooms(await self._view.rooms()))

    @app.route("/room", methods=["GET"])
    async def room(self, request: GuardRequest) -> None:
        """One call."""
        self._signed_in(request)
        row = await self._view.room(_query(request).get("id", ""))
        if row is None:
            await _send(request, 404, pages.message("No such call", "Nobody is in the call of this room any more."))
            return
        rights = {one.user: self._view.allowed(row.room_id, one.user) for one in row.present}
        await _send(request, 200, pages.room(row, rights))

    @app.route("/confirm", methods=["GET"])
    async def confirm(self, request: GuardRequest) -> None:
        """Asks before something is done."""
        session = self._signed_in(request)
        fields = {name: _query(request).get(name, "") for name in ("room_id", "user", "action")}
        if fields["action"] not in _QUESTIONS:
            raise Rejected(NO_ROUTE)
        question, button = _QUESTIONS[fields["action"]]
        asked, name = question.format(user=fields["user"]), self._view.names.of(fields["room_id"])
        await _send(request, 200, pages.confirm(asked, button, session.csrf, fields, name))

    @app.route("/style.css", methods=["GET"])
    def style(self, request: GuardRequest) -> bytes:
        return _static(request, "style.css")

    @app.route("/console.js", methods=["GET"])
    def script(self, request: GuardRequest) -> bytes:
        return _static(request, "console.js")

    # -- signing in --------------------------------------------------------------------------------------

    @app.route("/sign-in", methods=["POST"])
    async def sign_in(self, request: GuardRequest) -> None:
        """Start a session."""
        address = request.getClientIP() or ""
        try:
            session = self._sessions.sign_in(_form(request).get("token", ""), address)
        except TooManyAttempts:
            await _send(request, 429, pages.sign_in("Too many wrong tokens. Try again in a minute."))
            return
        if session is None:
            log.warn(
                "somebody at {address} sent a wrong operators' token", address=address, event_name="sign_in_failed"
            )
            await _send(request, 403, pages.sign_in("This is not the operators' token."))
            return
        log.info("an operator signed in from {address}", address=address, event_name="signed_in")
        _set_cookie(request, session.id, None)
        _redirect(request)

    @app.route("/sign-out", methods=["GET"])
    def sign_out(self, request: GuardRequest) -> None:
        """End the session. Other sites cannot cause this: browsers send them without the cookie."""
        session = self._session(request)
        if session is not None:
            self._sessions.sign_out(session)
            _set_cookie(request, "", 0)
        _redirect(request)

    # -- actions -----------------------------------------------------------------------------------------

    @app.route("/act", methods=["POST"])
    async def act(self, request: GuardRequest) -> None:
        """Do what was confirmed."""
        session = self._signed_in(request)
        form = _form(request)
        if not self._sessions.has_csrf(session, form.get("csrf", "")):
            await _send(request, 403, pages.message("Not done", "This form is not from this session. Try again."))
            return
        room_id, user, action = (form.get(name, "") for name in ("room_id", "user", "action"))
        if action not in _QUESTIONS:
            raise Rejected(NO_ROUTE)
        try:
            done = await self._do(room_id, user, action, _operator(request))
        except OnlyDecided:
            await _send(request, 200, pages.message("Not done", f"Dry run: nothing was done to {user}."))
            return
        if not done:
            await _send(request, 404, pages.message("Not done", f"{user} neither waits nor is in this call any more."))
            return
        _redirect(request)

    async def _do(self, room_id: str, user: str, action: str, by: str) -> bool:
        log.info(
            "{by} asked at the console: {action} {user} in {room_id}",
            by=by, action=action, user=user, room_id=room_id, event_name="console_action",
        )  # fmt: skip
        if action == "refresh":
            await self._changes.room_changed(room_id)
            return True
        if self._moderation is None:
            return False
        return await self._moderation.act(room_id, user, ModerationAction(action), by)

    # -- updates -----------------------------------------------------------------------------------------

    @app.route("/events", methods=["GET"])
    async def events(self, request: GuardRequest) -> None:
        """Server-sent events: the overview's content each time that it changes."""
        self._signed_in(request)
        if self._streams >= STREAMS:
            request.setResponseCode(204)  # tells the browser not to ask again
            request.finish()
            return
        for name, value in (*_HEADERS.items(), (b"Content-Type", b"text/event-stream"), (b"X-Accel-Buffering", b"no")):
            request.setHeader(name, value)
        self._streams += 1
        request.site.in_flight.discard(request)  # an open console does not delay a stop
        try:
            await self._stream(request)
        except CancelledError:
            pass
        finally:
            self._streams -= 1

    async def _stream(self, request: GuardRequest) -> None:
        gone: Deferred[None] = request.notifyFinish()
        gone.addErrback(lambda _: None)
        shown: Overview | None = None
        sent_at = self._clock.seconds()
        while not gone.called and self._session(request) is not None:
            began = self._clock.seconds()
            overview = await self._view.overview()
            if overview != shown:
                html = b"".join([await flattenString(None, part) for part in pages.live_part(overview)])
                if not gone.called:
                    request.write(b"data: " + json.dumps({"html": html.decode()}).encode() + b"\n\n")
                shown, sent_at = overview, began
            elif began - sent_at >= KEEP_ALIVE:
                request.write(b": nothing new\n\n")
                sent_at = began
            await deferLater(self._clock, pause_after(self._clock.seconds() - began))

    # -- sessions ----------------------------------------------------------------------------------------

    def _session(self, request: GuardRequest) -> Session | None:
        cookie = request.getCookie(COOKIE)
        return self._sessions.find(cookie.decode("latin-1")) if cookie else None

    def _signed_in(self, request: GuardRequest) -> Session:
        session = self._session(request)
        if session is None:
            raise SignedOut
        return session

    @app.route("/", branch=True)
    def nothing(self, request: GuardRequest) -> None:
        """No such page, or not with this method."""
        raise Rejected(NO_ROUTE)

    @app.handle_errors(SignedOut)  # type: ignore[arg-type]
    def signed_out(self, request: GuardRequest, failure: Failure) -> None:
        """Show the sign-in form."""
        _redirect(request)

    @app.handle_errors(Exception)  # type: ignore[arg-type]
    def failed(self, request: GuardRequest, failure: Failure) -> None:
        """See ``web/answers.py``."""
        answer_failure(request, failure)


def pause_after(took: float) -> float:
    """Seconds until the overview is made again. :param took: seconds that it took, which may have been waiting only."""
    return min(max(UPDATE_EVERY, took / SHARE), KEEP_ALIVE)


def _query(request: GuardRequest) -> Mapping[str, str]:
    return _last(request.uri.partition(b"?")[2])


def _form(request: GuardRequest) -> Mapping[str, str]:
    return _last(request.body())


def _last(encoded: bytes) -> Mapping[str, str]:
    try:
        parsed = parse_qs(encoded.decode("utf-8", "replace"), max_num_fields=MOST_FIELDS)
    except ValueError:
        raise Rejected(BAD_FORM) from None
    return {name: values[-1] for name, values in parsed.items()}


def _operator(request: GuardRequest) -> str:
    """Who acts, as an authenticating proxy says; else "operator"."""
    named = request.requestHeaders.getRawHeaders(b"x-forwarded-user") or [b"operator"]
    return named[0].decode("utf-8", "replace")[:255]


def _set_cookie(request: GuardRequest, value: str, max_age: int | None) -> None:
    scheme = (request.requestHeaders.getRawHeaders(b"x-forwarded-proto") or [b""])[0].partition(b",")[0].strip()
    request.addCookie(
        COOKIE, value.encode("ascii"), path=b"/", max_age=None if max_age is None else b"%d" % max_age,
        secure=scheme.lower() == b"https", httpOnly=True, sameSite=b"strict",
    )  # fmt: skip


def _redirect(request: GuardRequest) -> None:
    request.setResponseCode(303)
    request.setHeader(b"Location", b"/")
    request.setHeader(b"Cache-Control", b"no-store")
    request.finish()


def _static(request: GuardRequest, name: str) -> bytes:
    for header, value in (*_HEADERS.items(), (b"Content-Type", _STATIC[name])):
        request.setHeader(header, value)
    return files("lotusguard.web.console").joinpath("static", name).read_bytes()


async def _send(request: GuardRequest, code: int, page: Tag) -> None:
    body = b"<!DOCTYPE html>\n" + await flattenString(None, page)
    request.setResponseCode(code)
    for name, value in _HEADERS.items():
        request.setHeader(name, value)
    request.setHeader(b"Content-Type", b"text/html; charset=utf-8")
    request.setHeader(b"Content-Length", b"%d" % len(body))
    request.write(body)
    request.finish()
