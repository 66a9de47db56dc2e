# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` asks lk-jwt-service: does it answer, and do our key and secret verify its tokens? For that it is
asked for a token of an invented room.
"""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from twisted.internet.threads import deferToThreadPool

from lotusguard.check.asking import NoAnswer, Service, errcode_of, json_of
from lotusguard.check.homeserver import Us
from lotusguard.check.livekit import SAME_KEY, LiveKitCheck
from lotusguard.check.report import Findings
from lotusguard.clients.http import Answer
from lotusguard.config import Settings
from lotusguard.rules.identity import room_alias, server_of
from lotusguard.rules.jwt import NotOurs, SfuKey, read_unverified
from lotusguard.rules.tokens import issued_to

DEVICE = "LOTUSGUARD_CHECK"
ADDRESS = "correct GUARD_UPSTREAM: lk-jwt-service's own address, usually http://127.0.0.1:8071"


class UpstreamCheck:
    """Asks lk-jwt-service, after making sure that the address is not our own."""

    def __init__(self, settings: Settings, upstream: Service, findings: Findings, reactor: Any) -> None:
        self._settings = settings
        self._upstream = upstream
        self._say = findings
        self._reactor = reactor
        self.livekit_url: str | None = None
        """LiveKit's address as clients are told it; known after the trial."""

    async def run(self) -> bool:
        """:return: whether it is lk-jwt-service. Problems become findings, not exceptions."""
        try:
            if await self._is_ourselves():
                return False
            return await self._is_there() and await self._has_routes()
        except NoAnswer as why:
            self._say.wrong("reachable", str(why), why.remedy)
            return False

    async def _is_ourselves(self) -> bool:
        """Checked before anything is asked: a guard in front of itself would forward our request for ever."""
        settings = self._settings
        parts = urlsplit(settings.guard_upstream)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        ours = {settings.guard_bind_port: "GUARD_BIND_PORT", settings.guard_admin_port: "GUARD_ADMIN_PORT"}
        if port not in ours or not await self._is_here(parts.hostname or ""):
            return False
        self._say.wrong(
            "reachable",
            f"GUARD_UPSTREAM ({settings.guard_upstream}) is the guard itself: {port} is {ours[port]}",
            "let lk-jwt-service listen on another port (LIVEKIT_JWT_BIND=127.0.0.1:8071); name it in GUARD_UPSTREAM",
        )
        return True

    async def is_here(self) -> bool:
        """Whether lk-jwt-service runs on this machine."""
        return await self._is_here(urlsplit(self._settings.guard_upstream).hostname or "")

    async def _is_here(self, host: str) -> bool:
        """Whether a host is this machine."""
        if host in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
            return True
        pool = self._reactor.getThreadPool()
        try:
            found = await deferToThreadPool(self._reactor, pool, socket.getaddrinfo, host, None)
        except OSError:
            return False
        return any(_can_bind(family, str(address[0])) for family, _, _, _, address in found)

    async def _is_there(self) -> bool:
        base = self._settings.guard_upstream
        answer = await self._upstream.ask("GET", "/healthz")
        if "version" in json_of(answer):
            self._say.wrong("reachable", f"{base} is a guard's operators' listener, not lk-jwt-service", ADDRESS)
            return False
        if answer.code != 200:
            self._say.wrong(
                "reachable", f"{base} answers, but not as lk-jwt-service ({answer.code} to /healthz)", ADDRESS
            )
            return False
        self._say.fine("reachable", base)
        return True

    async def _has_routes(self) -> bool:
        legacy = await self._upstream.ask("OPTIONS", "/sfu/get")
        modern = await self._upstream.post_json("/get_token", {})
        has_legacy = legacy.code == 200 and _has_cors(legacy)
        has_modern = modern.code == 400 and json_of(modern).get("errcode") in ("M_BAD_JSON", "M_NOT_JSON")
        if has_legacy and has_modern:
            self._say.fine("is lk-jwt-service", "speaks /sfu/get and /get_token")
        elif has_legacy:
            self._say.fine("is lk-jwt-service", f"speaks /sfu/get only, an older release ({modern.code} to /get_token)")
        elif has_modern:
            self._say.fine("is lk-jwt-service", f"speaks /get_token only ({legacy.code} to /sfu/get)")
        else:
            self._say.wrong(
                "is lk-jwt-service",
                f"has neither of its routes ({legacy.code} to /sfu/get, {modern.code} to /get_token)",
                ADDRESS,
            )
        return has_legacy or has_modern

    # -- the trial ---------------------------------------------------------------------------------------

    async def trial(self, us: Us, livekit: LiveKitCheck) -> bool:
        """Ask for a token as a client does, and see who signed it.

        :return: whether LiveKit created and deleted a room for it, and so has webhooks to send.
        """
        room_id = f"!lotusguard-check-{uuid4().hex}:{server_of(us.user)}"
        try:
            body = {"room": room_id, "openid_token": us.openid, "device_id": DEVICE}
            answer = await self._upstream.post_json("/sfu/get", body)
        except NoAnswer as why:
            self._say.wrong("its tokens", str(why), why.remedy)
            return False
        token = json_of(answer).get("jwt")
        if answer.code != 200 or not isinstance(token, str):
            self._say.wrong("its tokens", *_no_token(answer, us))
            return False
        url = json_of(answer).get("url")
        self.livekit_url = url if isinstance(url, str) else None
        claims = self._signed(token)
        issued = issued_to(claims or {})
        if issued is None:
            return False
        self._naming(room_id, issued.alias)
        try:
            return await self._clear_up(issued.alias, livekit)
        except NoAnswer as why:
            self._say.warning("the trial's room", f"LiveKit: {why}", "none: it closes after five minutes")
            return False

    def _signed(self, token: str) -> dict[str, Any] | None:
        """The claims, if they can be read. Reports whether our key signed them."""
        key: SfuKey | None = self._settings.sfu_key
        claims = read_unverified(token)
        if claims is None:
            self._say.wrong("its tokens", "what it issues is not a token", ADDRESS)
            return None
        if key is None:
            self._say.unknown("its tokens", f"issued with the API key {claims.get('iss')!r}; we have no key to compare")
            return claims
        try:
            key.read(token)
        except NotOurs:
            other = claims.get("iss")
            reason = (
                f"with the API key {other!r}, ours is {key.key!r}"
                if other != key.key
                else f"with the API key {key.key!r}, but not with our LIVEKIT_SECRET"
            )
            self._say.wrong("its tokens", f"it signs them {reason}: permissions cannot be removed from them", SAME_KEY)
        else:
            self._say.fine("its tokens", "a token for an invented room is signed with our key and secret")
        return claims

    def _naming(self, room_id: str, alias: str) -> None:
        if alias == room_alias(room_id):
            self._say.fine("release", "names rooms as 0.4.3 and later do")
        else:
            old = "before 0.4.0" if alias == room_id else "before 0.4.3"
            self._say.warning(
                "release",
                f"names SFU rooms as releases {old} do: the names change with an upgrade",
                "upgrade lk-jwt-service while nobody is in a call",
            )

    async def _clear_up(self, alias: str, livekit: LiveKitCheck) -> bool:
        made = await livekit.has_room(alias)
        if made is None:
            self._say.unknown(
                "the trial's room", "LiveKit does not say whether it exists; it closes after five minutes"
            )
        elif not made:
            self._say.warning(
                "the trial's room",
                "is not at LIVEKIT_API: lk-jwt-service uses another LiveKit, or may not create rooms for this server",
                "compare lk-jwt-service's LIVEKIT_URL with LIVEKIT_API, and see its LIVEKIT_FULL_ACCESS_HOMESERVERS",
            )
        elif await livekit.delete_room(alias):
            self._say.fine("the trial's room", "was created at LIVEKIT_API and deleted again")
            return True
        else:
            self._say.warning(
                "the trial's room",
                "was created at LIVEKIT_API and could not be deleted",
                "none: it closes in five minutes",
            )
        return False


def _no_token(answer: Answer, us: Us) -> tuple[str, str]:
    """Reason and remedy of an answer without a token."""
    server = server_of(us.user)
    if answer.code == 401:
        return (
            f"it cannot verify an OpenID token that Synapse has just given to {us.user} (401)",
            f"let lk-jwt-service reach {server}'s federation API (.well-known, port 8448 or 443); see its log",
        )
    if answer.code >= 500:
        return (
            f"it issues none ({errcode_of(answer)}): LiveKit did not let it create a room, or cannot be reached",
            "see lk-jwt-service's log, and its LIVEKIT_URL, LIVEKIT_KEY and LIVEKIT_SECRET",
        )
    return f"it issues none to {us.user} ({errcode_of(answer)})", "see lk-jwt-service's log"


def _has_cors(answer: Answer) -> bool:
    headers = answer.headers
    methods = b",".join(headers.getRawHeaders(b"access-control-allow-methods") or [])
    return headers.hasHeader(b"access-control-allow-origin") and b"POST" in methods


def _can_bind(family: int, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trying:
            trying.bind((address, 0))
    except OSError:
        return False
    return True
