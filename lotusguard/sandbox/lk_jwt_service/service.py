# SPDX-License-Identifier: Apache-2.0
"""A stand-in for lk-jwt-service, the guard's upstream. Sandbox.

Behaviour read from its ``handler.go`` and ``helper.go`` (0.5.0) and compared with the running program.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lotusguard.sandbox.go.http import ServeMux, encode
from lotusguard.sandbox.go.lax_json import NotDecodable, decode
from lotusguard.sandbox.livekit.tokens import BadToken, mint, verify
from lotusguard.sandbox.lk_jwt_service import requests
from lotusguard.sandbox.lk_jwt_service.dependencies import Dependencies
from lotusguard.sandbox.lk_jwt_service.records import REMEMBERED, Issued, Job, OtherSfu, WebhookSeen
from lotusguard.sandbox.lk_jwt_service.requests import CORS_JSON, PLAIN_JSON, ROOM_SLOT, Naming
from lotusguard.sandbox.standin import StandIn
from lotusguard.sandbox.wire import Asked, Reply

ROUTES = {
    "/sfu/get": "sfu_get",
    "/get_token": "get_token",
    "/delegate_delayed_leave": "delegate_delayed_leave",
    "/sfu_webhook": "sfu_webhook",
    "/healthz": "healthz",
}
APP_SERVICE_ROUTES = {
    f"/_matrix/{api}/{version}/rtc/livekit/get_token": f"{api}_get_token"
    for api in ("client", "federation")
    for version in ("unstable/io.element.msc4195", "v1")
}


class FakeLkJwtService(StandIn):
    """lk-jwt-service. Route names for ``faults``: the values of ``ROUTES`` and ``APP_SERVICE_ROUTES``, or ``""``.

    All parameters but ``redirect_status`` are attributes too and may be changed at any time.

    :param sfu_url: base address of the SFU; clients are told it with ``ws``.
    :param homeservers: base address by server name; OpenID tokens of other homeservers are refused.
    :param full_access: homeservers whose users may create SFU rooms; ``("*",)`` for all.
    :param naming: the release whose names are used; before 0.4.3, ``/sfu/get`` also accepts the new body.
    :param hs_token: the homeserver's token; turns the app-service mode on. ``None``: that mode is off.
    :param is_member: whether a user is in a room; asked in app-service mode only.
    :param other_sfus: further SFUs that callers may choose by ``url`` or ``server_name``. If there are any, bodies may
        have the fields of newer releases.
    :param extra_claims: override a token's claims; ``video`` is merged.
    :param redirect_status: 307 as built with Go 1.26; 301 before.
    :param now: the time for tokens, in seconds since the epoch.
    :ivar issued: the tokens issued, oldest first.
    :ivar jobs: the delegated delayed leaves, by alias and identity.
    :ivar replaced: delayed leaves that were replaced by newer ones of the same identity, oldest first.
    :ivar webhooks: the webhooks received, oldest first.
    """

    def __init__(
        self,
        reactor: Any,
        *,
        key: str,
        secret: str,
        sfu_url: str,
        homeservers: Mapping[str, str],
        full_access: Collection[str] = ("*",),
        naming: Naming = "0.4.3",
        hs_token: str | None = None,
        is_member: Callable[[str, str], bool] = lambda room, user: True,
        other_sfus: Iterable[OtherSfu] = (),
        extra_claims: Mapping[str, Any] | None = None,
        redirect_status: int = 307,
        now: Callable[[], float] = time.time,
        port: int = 0,
        clock: Any = None,
    ) -> None:
        super().__init__(reactor, port=port, clock=clock)
        self.key, self.secret = key, secret
        self.sfu_url = sfu_url
        self.homeservers = dict(homeservers)
        self.full_access = list(full_access)
        self.naming = naming
        self.hs_token = hs_token
        self.is_member = is_member
        self.other_sfus = list(other_sfus)
        self.extra_claims = dict(extra_claims or {})
        self.now = now
        self.issued: deque[Issued] = deque(maxlen=REMEMBERED)
        self.jobs: dict[tuple[str, str], Job] = {}
        self.replaced: deque[Job] = deque(maxlen=REMEMBERED)
        self.webhooks: deque[WebhookSeen] = deque(maxlen=REMEMBERED)
        self._plain_mux = ServeMux(ROUTES, redirect_status)
        self._app_service_mux = ServeMux(ROUTES | APP_SERVICE_ROUTES, redirect_status)
        self._dependencies = Dependencies(reactor, self.pool, self.homeservers)

    @property
    def livekit_url(self) -> str:
        """The address of the SFU that clients are told."""
        return self.sfu_url.replace("http", "ws", 1)

    def route_of(self, asked: Asked) -> str:
        found = self._find(asked)
        return "" if isinstance(found, Reply) else (ROUTES | APP_SERVICE_ROUTES)[found]

    def _find(self, asked: Asked) -> str | Reply:
        """The pattern of the request's route, or the answer if there is none."""
        mux = self._plain_mux if self.hs_token is None else self._app_service_mux
        return mux.find(asked.path, asked.query, asked.method)

    async def answer(self, asked: Asked, route: str) -> Reply:
        if not route:
            found = self._find(asked)
            assert isinstance(found, Reply)
            return found
        if route == "healthz":
            return Reply(200 if asked.method in ("GET", "HEAD") else 405)
        if route == "sfu_webhook":
            return self._webhook(asked)
        headers = PLAIN_JSON if route == "federation_get_token" else CORS_JSON
        if asked.method == "OPTIONS" and headers is CORS_JSON:
            return Reply(200, b"", headers)
        if asked.method != "POST":
            return Reply(405, b"", headers)
        answered = await getattr(self, f"_{route}")(asked)
        return Reply(200, encode(answered), headers)

    async def _sfu_get(self, asked: Asked) -> dict[str, str]:
        if self._takes_new_body(asked.body):
            return await self._token(self._new_body(asked), "sfu_get")
        request = requests.read(asked.body, requests.LEGACY_BODY)
        requests.check_legacy(request)
        user = await self._dependencies.user_of(request["openid_token"])
        identity = f"{user}:{request['device_id']}"
        alias = requests.room_alias(request["room"], ROOM_SLOT, self.naming)
        await self._prepare(request, alias, identity)
        issued = self._issue("sfu_get", request["room"], ROOM_SLOT, alias, identity, user)
        return {"url": issued.sfu_url, "jwt": issued.token}

    async def _get_token(self, asked: Asked) -> dict[str, str]:
        return await self._token(self._new_body(asked), "get_token")

    async def _token(self, request: dict[str, Any], route: str) -> dict[str, str]:
        requests.check(request)
        user, alias, identity = await self._names(request)
        other = self._chosen_sfu(request)
        await self._prepare(request, alias, identity, at_own_sfu=other is None)
        issued = self._issue(route, request["room_id"], request["slot_id"], alias, identity, user, other)
        return {"url": issued.sfu_url, "jwt": issued.token}

    async def _delegate_delayed_leave(self, asked: Asked) -> dict[str, str]:
        request = self._new_body(asked)
        requests.check(request, delegation=True)
        _user, alias, identity = await self._names(request)
        if not self._has_full_access(request["openid_token"]["matrix_server_name"]):
            raise requests.refusal(
                403, "M_FORBIDDEN", "Delegation of delayed events is only supported for full access users"
            )
        self._schedule(request, alias, identity)
        return {}

    async def _client_get_token(self, asked: Asked) -> dict[str, str]:
        self._check_hs_token(asked, CORS_JSON)
        request = requests.read(asked.body, requests.CLIENT_BODY)
        user = asked.header("X-Matrix-User-Identifier") or ""
        return await self._app_service_token(request, user, "client_get_token", CORS_JSON)

    async def _federation_get_token(self, asked: Asked) -> dict[str, str]:
        self._check_hs_token(asked, PLAIN_JSON)
        request = requests.read(asked.body, requests.FEDERATION_BODY)
        user = request["user_id"]
        if user.partition(":")[2] != asked.header("X-Matrix-Origin"):
            raise requests.unauthorised(PLAIN_JSON)
        return await self._app_service_token(request, user, "federation_get_token", PLAIN_JSON)

    def _check_hs_token(self, asked: Asked, headers: tuple[tuple[str, str], ...]) -> None:
        if asked.header("Authorization") != f"Bearer {self.hs_token}":
            raise requests.unauthorised(headers)

    async def _app_service_token(
        self, request: dict[str, Any], user: str, route: str, headers: tuple[tuple[str, str], ...]
    ) -> dict[str, str]:
        room, slot, member = request["room_id"], request["slot_id"], request["member_id"]
        if not room or not slot or not member or not user:
            text = "The request body is missing `room_id`, `slot_id`, `member_id` or the user"
            raise requests.refusal(400, "M_BAD_JSON", text, headers)
        if not self.is_member(room, user):
            raise requests.refusal(403, "M_FORBIDDEN", "The user is not in the room", headers)
        alias = requests.room_alias(room, slot, self.naming)
        identity = requests.hashed_identity([user, member], self.naming)
        other = self._chosen_sfu(request)
        if self._has_full_access(user.partition(":")[2]) and other is None:
            await self._create_room(alias)
        return {"jwt": self._issue(route, room, slot, alias, identity, user, other).token}

    def _takes_new_body(self, body: bytes) -> bool:
        """Whether ``/sfu/get`` reads the new body: before 0.4.3 and in app-service mode it tries that first."""
        if self.hs_token is None and self.naming == "0.4.3":
            return False
        try:
            return bool(decode(body, self._new_schema)["room_id"])
        except NotDecodable:
            return False

    async def _names(self, request: dict[str, Any]) -> tuple[str, str, str]:
        """User, alias and identity of a request with the new body."""
        member = request["member"]
        user = await self._dependencies.user_of(request["openid_token"])
        if user != member["claimed_user_id"] and not request.get("member_id"):
            raise requests.unauthorised()
        alias = requests.room_alias(request["room_id"], request["slot_id"], self.naming)
        parts = [user, member["claimed_device_id"], member["id"]] if member["id"] else [user, request["member_id"]]
        return user, alias, requests.hashed_identity(parts, self.naming)

    def _has_full_access(self, server_name: str) -> bool:
        return self.full_access == ["*"] or server_name in self.full_access

    async def _prepare(self, request: dict[str, Any], alias: str, identity: str, *, at_own_sfu: bool = True) -> None:
        """Create the room and the delayed-leave job. This happens before the answer and is never undone."""
        delegates = request["delay_id"] != ""
        if not self._has_full_access(request["openid_token"]["matrix_server_name"]):
            if delegates:
                raise requests.bad_json("Delegation of delayed events is only supported for full access users")
            return
        if at_own_sfu:
            await self._create_room(alias)
        if delegates:
            self._schedule(request, alias, identity)

    async def _create_room(self, alias: str) -> None:
        token = mint(self.key, self.secret, {"video": {"roomCreate": True}}, now=self.now(), valid_for=21600)
        await self._dependencies.create_room(self.sfu_url, alias, token)

    @property
    def _new_schema(self) -> dict[str, Any]:
        return requests.MULTI_SFU_BODY if self.other_sfus else requests.BODY

    def _new_body(self, asked: Asked) -> dict[str, Any]:
        return requests.read(asked.body, self._new_schema)

    def _chosen_sfu(self, request: dict[str, Any]) -> OtherSfu | None:
        """The SFU that the request chooses by ``url`` or ``server_name``; ``None`` for our own."""
        url, name = request.get("url"), request.get("server_name")
        return next((one for one in self.other_sfus if one.url == url or (name and one.server_name == name)), None)

    def _schedule(self, request: dict[str, Any], alias: str, identity: str) -> None:
        server_name = request["openid_token"]["matrix_server_name"]
        job = Job(server_name, request["delay_id"], request["delay_timeout"], alias, identity)
        older = self.jobs.get((alias, identity))
        if older is not None:
            self.replaced.append(older)
        self.jobs[alias, identity] = job
        if len(self.jobs) > REMEMBERED:
            del self.jobs[next(iter(self.jobs))]

    def _issue(
        self, route: str, room: str, slot: str, alias: str, identity: str, user: str, other: OtherSfu | None = None
    ) -> Issued:
        sfu = other or OtherSfu(self.livekit_url, self.key, self.secret)
        video: dict[str, Any] = {
            "roomJoin": True,
            "room": alias,
            "canPublish": True,
            "canSubscribe": True,
            "canUpdateOwnMetadata": True,
        }
        claims: dict[str, Any] = {"sub": identity, "identity": identity, "video": video}
        claims |= self.extra_claims
        claims["video"] = video | dict(self.extra_claims.get("video", {}))
        token = mint(sfu.key, sfu.secret, claims, now=self.now(), valid_for=3600)
        issued = Issued(route, room, slot, alias, identity, user, token, sfu.url)
        self.issued.append(issued)
        return issued

    def _webhook(self, asked: Asked) -> Reply:
        try:
            claims = verify(asked.header("Authorization") or "", self.secret, now=self.now())
            digest = base64.b64encode(hashlib.sha256(asked.body).digest()).decode()
            verified = claims.api_key == self.key and claims.sha256 == digest
        except BadToken:
            verified = False
        self.webhooks.append(WebhookSeen(asked.headers, asked.body, verified))
        return Reply(200)
