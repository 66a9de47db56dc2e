# SPDX-License-Identifier: Apache-2.0
"""The operators' door: health, metrics, rooms, and the homeserver's word that a policy changed. Floor: web."""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from functools import wraps
from typing import Any

from attrs import asdict
from klein import Klein
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure
from werkzeug.exceptions import HTTPException

from lotusguard import __version__
from lotusguard.guard.calls.enforcement import Enforcement
from lotusguard.guard.health import Health
from lotusguard.guard.joins.decisions import DecisionLog
from lotusguard.guard.rooms.policies import Policies
from lotusguard.guard.seats.book import MemorySeatBook
from lotusguard.guard.seats.registry import TokenRegistry
from lotusguard.metrics import Metrics
from lotusguard.web.answers import answer_json, refuse
from lotusguard.web.site import GuardRequest

log = Logger()


class NotAllowed(Exception):
    """Without the operators' token."""


Handler = Callable[["OperatorRoutes", GuardRequest], Any]


def for_operators(handler: Handler) -> Handler:
    """Answers only to who has the operators' token. Without one configured, to nobody."""

    @wraps(handler)
    def checked(door: OperatorRoutes, request: GuardRequest) -> Any:
        given = request.requestHeaders.getRawHeaders(b"authorization") or [b""]
        wanted = b"Bearer " + door.token.encode("utf-8")
        if not door.token or not hmac.compare_digest(given[0], wanted):
            raise NotAllowed
        return handler(door, request)

    return checked


class OperatorRoutes:
    """Routes for operators and their tools; loopback by default.

    :param token: what private routes want as Bearer; ``""`` lets nobody in.
    """

    app = Klein()

    def __init__(
        self,
        *,
        health: Health,
        decision_log: DecisionLog,
        enforcement: Enforcement,
        policies: Policies,
        seats: MemorySeatBook,
        registry: TokenRegistry,
        metrics: Metrics,
        clock: IReactorTime,
        token: str,
    ) -> None:
        self._health = health
        self._decision_log = decision_log
        self._enforcement = enforcement
        self._policies = policies
        self._seats = seats
        self._registry = registry
        self._metrics = metrics
        self._clock = clock
        self.token = token

    @app.route("/healthz")
    def healthz(self, request: GuardRequest) -> None:
        """Alive."""
        answer_json(request, 200, {"status": "ok", "version": __version__})

    @app.route("/readyz")
    async def readyz(self, request: GuardRequest) -> None:
        """What is and is not being enforced: 200 when all is, else 503."""
        report = await self._health.report()
        answer_json(request, 200 if report["ready"] else 503, report)

    @app.route("/metrics")
    def metrics(self, request: GuardRequest) -> bytes:
        request.setHeader(b"Content-Type", CONTENT_TYPE_LATEST.encode("ascii"))
        return generate_latest(self._metrics.registry)

    @app.route("/rooms")
    @for_operators
    async def rooms(self, request: GuardRequest) -> None:
        """Live rooms: policy, who sits where, seats, last decisions."""
        now = self._clock.seconds()
        listed = []
        for room_id, room in sorted(self._seats.rooms.items()):
            if room.idle(now):
                continue
            policy = self._policies.last_known(room_id)
            listed.append(
                {
                    "room_id": room_id,
                    "policy": {
                        "max_users": policy.max_users,
                        "forbidden": sorted(source.claim for source in policy.forbidden),
                    },
                    "seats_held": room.held(now),
                    "awaited": sorted(room.awaited(now)),
                    "present": [
                        {"user": seat.user, "identity": seat.identity, "alias": at.alias, "seated": seat.seated}
                        for at, seat in room.sessions.items()
                    ],
                }
            )
        watched = {}
        for alias, participants in self._enforcement.watched.items():
            slot = await self._registry.slot_of(alias)
            watched[alias] = {"participants": participants, "room_id": slot.room_id if slot else None}
        decisions = [asdict(decision) for decision in list(self._decision_log.decisions)[-100:]]
        answer_json(request, 200, {"rooms": listed, "sfu_rooms": watched, "decisions": decisions})

    @app.route("/policy-changed", methods=["POST"])
    @for_operators
    async def policy_changed(self, request: GuardRequest) -> None:
        """The homeserver's module tells that a room's policy changed: 202, and it is enforced at once."""
        try:
            content = json.loads(request.body())
            room_id = content["room_id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            room_id = None
        if not isinstance(room_id, str) or not room_id.startswith("!"):
            refuse(request, 400, "M_BAD_JSON", 'A JSON object {"room_id": "!…"} is expected.', cors=False)
            return
        await self._enforcement.policy_changed(room_id)
        answer_json(request, 202, {})

    @app.handle_errors(HTTPException)  # type: ignore[arg-type]
    def no_route(self, request: GuardRequest, failure: Failure) -> None:
        code = getattr(failure.value, "code", None) or 404
        refuse(request, code if code >= 400 else 404, "M_UNRECOGNIZED", "There is nothing here.", cors=False)

    @app.handle_errors(NotAllowed)  # type: ignore[arg-type]
    def not_allowed(self, request: GuardRequest, failure: Failure) -> None:
        refuse(request, 403, "M_FORBIDDEN", "The operators' token is needed here.", cors=False)
