# SPDX-License-Identifier: Apache-2.0
"""The console's routes: signing in, the pages, the stream of updates, and what operators do."""

from __future__ import annotations

from attrs import define, field
from klein import Klein
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from lotusguard.clients.dependency import DependencyFailed
from lotusguard.guard.calls.changes import CallChanges
from lotusguard.guard.calls.moderation import Moderation, ModerationAction, OnlyDecided
from lotusguard.web.answers import NO_ROUTE, OPERATORS_ONLY, Rejected, answer_failure
from lotusguard.web.console import pages
from lotusguard.web.console.answers import COOKIE, redirect, send, set_cookie, static
from lotusguard.web.console.forms import form, operator, page_number, query
from lotusguard.web.console.sessions import Session, Sessions, TooManyAttempts
from lotusguard.web.console.updates import Updates
from lotusguard.web.console.view import ConsoleView, Page
from lotusguard.web.site import GuardRequest

log = Logger()

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
    _updates: Updates = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._updates = Updates(self._view, self._clock)

    # -- pages -------------------------------------------------------------------------------------------

    async def front_page(self, request: GuardRequest) -> None:
        """``GET /``"""
        if not self._sessions.enabled:
            raise Rejected(OPERATORS_ONLY)
        if self._session(request) is None:
            await send(request, 200, pages.sign_in())
        else:
            await send(request, 200, pages.overview(await self._view.overview()))

    @app.route("/rooms", methods=["GET"])
    async def rooms(self, request: GuardRequest) -> None:
        """All live calls, a page at a time."""
        self._signed_in(request)
        await send(request, 200, pages.all_rooms(await self._view.rooms(page_number(request))))

    @app.route("/room", methods=["GET"])
    async def room(self, request: GuardRequest) -> None:
        """One call, a page of its participants at a time."""
        self._signed_in(request)
        row = await self._view.room(query(request).get("id", ""))
        if row is None:
            await send(request, 404, pages.message("No such call", "Nobody is in the call of this room any more."))
            return
        shown = Page.of(row.present, page_number(request))
        rights = {one.user: self._view.allowed(row.room_id, one.user) for one in shown.items}
        await send(request, 200, pages.room(row, shown, rights))

    @app.route("/confirm", methods=["GET"])
    async def confirm(self, request: GuardRequest) -> None:
        """Asks before something is done."""
        session = self._signed_in(request)
        fields = {name: query(request).get(name, "") for name in ("room_id", "user", "action")}
        if fields["action"] not in _QUESTIONS:
            raise Rejected(NO_ROUTE)
        question, button = _QUESTIONS[fields["action"]]
        asked, name = question.format(user=fields["user"]), self._view.names.of(fields["room_id"])
        await send(request, 200, pages.confirm(asked, button, session.csrf, fields, name))

    @app.route("/style.css", methods=["GET"])
    def style(self, request: GuardRequest) -> bytes:
        return static(request, "style.css")

    @app.route("/console.js", methods=["GET"])
    def script(self, request: GuardRequest) -> bytes:
        return static(request, "console.js")

    # -- signing in --------------------------------------------------------------------------------------

    @app.route("/sign-in", methods=["POST"])
    async def sign_in(self, request: GuardRequest) -> None:
        """Start a session."""
        address = request.getClientIP() or ""
        try:
            session = self._sessions.sign_in(form(request).get("token", ""), address)
        except TooManyAttempts:
            await send(request, 429, pages.sign_in("Too many wrong tokens. Try again in a minute."))
            return
        if session is None:
            log.warn(
                "somebody at {address} sent a wrong operators' token", address=address, event_name="sign_in_failed"
            )
            await send(request, 403, pages.sign_in("This is not the operators' token."))
            return
        log.info("an operator signed in from {address}", address=address, event_name="signed_in")
        set_cookie(request, session.id, None)
        redirect(request)

    @app.route("/sign-out", methods=["GET"])
    def sign_out(self, request: GuardRequest) -> None:
        """End the session. Other sites cannot cause this: browsers send them without the cookie."""
        session = self._session(request)
        if session is not None:
            self._sessions.sign_out(session)
            set_cookie(request, "", 0)
        redirect(request)

    # -- actions -----------------------------------------------------------------------------------------

    @app.route("/act", methods=["POST"])
    async def act(self, request: GuardRequest) -> None:
        """Do what was confirmed."""
        session = self._signed_in(request)
        fields = form(request)
        if not self._sessions.has_csrf(session, fields.get("csrf", "")):
            await send(request, 403, pages.message("Not done", "This form is not from this session. Try again."))
            return
        room_id, user, action = (fields.get(name, "") for name in ("room_id", "user", "action"))
        if action not in _QUESTIONS:
            raise Rejected(NO_ROUTE)
        try:
            done = await self._do(room_id, user, action, operator(request))
        except OnlyDecided:
            await send(request, 200, pages.message("Not done", f"Dry run: nothing was done to {user}."))
            return
        except DependencyFailed as failed:
            await send(request, 502, pages.message("Not done", f"A service does not do it: {failed}. Try again."))
            return
        except TimeoutError:
            await send(request, 502, pages.message("Not done", "LiveKit did not do it in time. Try again."))
            return
        if not done:
            await send(request, 404, pages.message("Not done", f"{user} neither waits nor is in this call any more."))
            return
        redirect(request)

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
        await self._updates.stream(request, lambda: self._session(request) is not None)

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
        redirect(request)

    @app.handle_errors(Exception)  # type: ignore[arg-type]
    def failed(self, request: GuardRequest, failure: Failure) -> None:
        """See ``web/answers.py``."""
        answer_failure(request, failure)
