# SPDX-License-Identifier: Apache-2.0
"""The operators' listener: health, metrics, rooms, and the homeserver's notice that a policy changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from typing import Any
from urllib.parse import parse_qsl

from attrs import asdict, define, field
from klein import Klein
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from twisted.internet.defer import TimeoutError
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from lotusguard import __version__
from lotusguard.clients.dependency import DependencyFailed
from lotusguard.guard.calls.changes import CallChanges
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.calls.moderation import Moderation, ModerationAction, OnlyDecided
from lotusguard.guard.health import Health
from lotusguard.guard.joins.decision_store import HistoryUnavailable, Question, RecordKind
from lotusguard.guard.joins.decisions import DecisionLog
from lotusguard.guard.lobby import Lobby
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.rooms.sources import RoomSources
from lotusguard.guard.seats.book import SeatBook
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.rules.identity import is_short_name
from lotusguard.web.answers import (
    BAD_MODERATION,
    BAD_QUESTION,
    BAD_ROOM,
    NO_ROUTE,
    NOBODY_TO_MODERATE,
    NOT_MODERATED,
    OPERATORS_ONLY,
    Rejected,
    Reply,
    answer_body,
    answer_failure,
    answer_json,
)
from lotusguard.web.bearer import has_bearer
from lotusguard.web.console.routes import Console
from lotusguard.web.rooms import RoomsReport
from lotusguard.web.site import GuardRequest, GuardSite

MAX_BODY = 4096
"""Bytes that the body of an operator's request may have, times `RELAYED_FACTOR`."""

FOREVER = 1e12
"""A time in seconds since the epoch that nobody will see."""

Handler = Callable[["OperatorApi", GuardRequest], Any]


def for_operators(handler: Handler) -> Handler:
    """Wants the operators' token. Without one configured, nobody is answered."""

    @wraps(handler)
    def checked(api: OperatorApi, request: GuardRequest) -> Any:
        if not has_bearer(request, api.token):
            raise Rejected(OPERATORS_ONLY)
        return handler(api, request)

    return checked


@define(slots=False, eq=False)
class OperatorApi:
    """The routes of the operators' listener; loopback by default.

    :param guard: the name of this guard among several: its host and port.
    :param token: the bearer token of private routes; ``""`` admits nobody.
    """

    app = Klein()

    _health: Health
    _decision_log: DecisionLog
    _enforcement: Enforcement
    _changes: CallChanges
    _policies: Policies
    _sources: RoomSources
    _seats: SeatBook
    _registry: TokenRegistry
    _metrics: Metrics
    _lobby: Lobby
    _moderation: Moderation
    _console: Console
    _guard: Callable[[], str]
    _clock: IReactorTime
    token: str = field(repr=False)

    def site(self, reactor: Any) -> GuardSite:
        """The listener's site."""
        return GuardSite(self.app, reactor, max_body=MAX_BODY)

    @app.route("/healthz")
    def healthz(self, request: GuardRequest) -> None:
        """The process is alive."""
        answer_json(request, 200, {"status": "ok", "version": __version__})

    @app.route("/readyz")
    async def readyz(self, request: GuardRequest) -> None:
        """What is and is not enforced: 200 if everything is, else 503."""
        report = await self._health.report()
        answer_json(request, 200 if report["ready"] else 503, {"guard": self._guard(), **report})

    @app.route("/metrics")
    def metrics(self, request: GuardRequest) -> bytes:
        """For Prometheus."""
        request.setHeader(b"Content-Type", CONTENT_TYPE_LATEST.encode("ascii"))
        return generate_latest(self._metrics.registry)

    @app.route("/rooms")
    @for_operators
    async def rooms(self, request: GuardRequest) -> None:
        """Live rooms of all guards; the SFU rooms that this guard enforces, and its latest decisions."""
        decisions = [asdict(decision) for decision in list(self._decision_log.decisions)[-100:]]
        report = RoomsReport(
            self._seats, self._policies, self._sources, self._enforcement, self._registry, self._clock
        )  # fmt: skip
        answer_body(request, 200, await report.as_json(guard=self._guard(), decisions=decisions))

    @app.route("/decisions")
    @for_operators
    async def decisions(self, request: GuardRequest) -> None:
        """What became of joins, and who was removed: ``?user=&room=&kind=&since=&until=``, oldest first."""
        try:
            found = await self._decision_log.kept.find(_question(request))
        except HistoryUnavailable as unavailable:
            raise Rejected(Reply(503, "M_UNKNOWN", f"Decisions cannot be read: {unavailable}.")) from None
        answer_json(request, 200, {"decisions": [record.as_json() for record in found]})

    @app.route("/policy-changed", methods=["POST"])
    @for_operators
    async def policy_changed(self, request: GuardRequest) -> None:
        """A room's state or memberships changed, says the homeserver's module: 202, and it is enforced at once."""
        try:
            content = json.loads(request.body())
            room_id, user = content["room_id"], content.get("user", "")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            room_id = user = None
        if not _is_id(room_id, "!") or not (user == "" or _is_id(user, "@")):
            raise Rejected(BAD_ROOM)
        await self._changes.room_changed(room_id, user)
        answer_json(request, 202, {})

    @app.route("/lobby")
    @for_operators
    def waiting(self, request: GuardRequest) -> None:
        """Who waits in which lobby, the longest waiting first."""
        rooms: dict[str, list[dict[str, Any]]] = {}
        for one in self._lobby.waiting():
            entry = {"user": one.user, "since": round(one.since, 3), "color": one.color}
            rooms.setdefault(one.room_id, []).append(entry)
        listed = [{"room_id": room_id, "waiting": entries} for room_id, entries in rooms.items()]
        answer_json(request, 200, {"rooms": listed})

    @app.route("/moderate", methods=["POST"])
    @for_operators
    async def moderate(self, request: GuardRequest) -> None:
        """Admit, deny, remove or mute somebody."""
        try:
            content = json.loads(request.body())
            room_id, user, action = content["room_id"], content["user"], ModerationAction(content["action"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise Rejected(BAD_MODERATION) from None
        if not _is_id(room_id, "!") or not _is_id(user, "@"):
            raise Rejected(BAD_MODERATION)
        try:
            done = await self._moderation.act(room_id, user, action, by="an operator")
        except OnlyDecided:
            answer_json(request, 200, {"done": False})
            return
        except (DependencyFailed, TimeoutError):
            raise Rejected(NOT_MODERATED) from None
        if not done:
            raise Rejected(NOBODY_TO_MODERATE)
        answer_json(request, 200, {"done": True})

    @app.route("/", methods=["GET"])
    async def front_page(self, request: GuardRequest) -> None:
        """The console, for people."""
        await self._console.front_page(request)

    @app.route("/console", branch=True)
    def console(self, request: GuardRequest) -> Any:
        """See ``web/console/``. Its users sign in with the operators' token: without one, there is nothing."""
        if not self.token:
            raise Rejected(OPERATORS_ONLY)
        return self._console.app.resource()

    @app.route("/", branch=True)
    def nothing(self, request: GuardRequest) -> None:
        """No such route, or not with this method."""
        raise Rejected(NO_ROUTE)

    @app.handle_errors(Exception)  # type: ignore[arg-type]
    def failed(self, request: GuardRequest, failure: Failure) -> None:
        """See ``web/answers.py``."""
        answer_failure(request, failure)


def _is_id(given: object, sigil: str) -> bool:
    """Whether this can be the ID of a room or a user. A lone surrogate cannot be sent to the homeserver."""
    if not isinstance(given, str) or not given.startswith(sigil) or not is_short_name(given):
        return False
    return not any("\ud800" <= character <= "\udfff" for character in given)


def _question(request: GuardRequest) -> Question:
    """:raises Rejected: a parameter is not what it should be."""
    query = request.uri.partition(b"?")[2].decode("ascii", "replace")
    given = dict(parse_qsl(query, errors="replace"))
    try:
        kind = RecordKind(given["kind"]) if given.get("kind") else None
        since, until = float(given.get("since") or 0.0), float(given.get("until") or FOREVER)
    except ValueError:
        raise Rejected(BAD_QUESTION) from None
    return Question(since, until, given.get("user", ""), given.get("room", ""), kind)
