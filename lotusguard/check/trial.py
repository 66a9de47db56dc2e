# SPDX-License-Identifier: Apache-2.0
"""``lotusguard trial``: one join through a running guard, as a client makes it. ``deploy/upgrade`` relies on it."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

from attrs import define

from lotusguard.check.asking import Asking, NoAnswer, Service, errcode_of, json_of, listener_address
from lotusguard.check.livekit import LiveKitCheck
from lotusguard.check.report import Findings, Report
from lotusguard.clients.http import Answer, ConnectionPool
from lotusguard.config import Settings
from lotusguard.rules.jwt import NotOurs
from lotusguard.rules.tokens import issued_to

PATIENCE = 30.0
"""Seconds for one answer: a join may be held for GUARD_UPSTREAM_GRACE and GUARD_UPSTREAM_TIMEOUT."""
ALIAS = "lotusguard-trial"
DEVICE = "LOTUSGUARD_TRIAL"
FORBIDDEN_GRANTS = ("roomCreate", "roomAdmin", "roomList")


class TrialFailed(Exception):
    """The text says at which step, what was seen and what to do."""


async def try_join(settings: Settings, reactor: Any, url: str = "", room: str = "") -> str:
    """Join, and check the token.

    :param url: the guard's public listener; by default as the settings say.
    :param room: a room that the account of MATRIX_TOKEN is joined to; by default one is made for this.
    :return: what was seen, in one sentence.
    :raises TrialFailed:
    """
    pool = ConnectionPool(reactor)
    asking = Asking(reactor, pool, PATIENCE, time.time)
    base = url.rstrip("/") or listener_address(settings.guard_bind_host, settings.guard_bind_port)
    try:
        trial = Trial(
            settings,
            asking.service("SYNAPSE_API", settings.synapse_api),
            asking.service("GUARD_BIND_PORT", base),
            LiveKitCheck(settings, asking.service("LIVEKIT_API", settings.livekit_api), _nowhere(), time.time),
        )
        return await trial.run(room)
    except NoAnswer as why:
        raise TrialFailed(f"{why}: {why.remedy}") from None
    finally:
        await pool.close()


@define
class Trial:
    """One join, step by step."""

    _settings: Settings
    _synapse: Service
    _guard: Service
    _livekit: LiveKitCheck

    async def run(self, room: str) -> str:
        """:raises TrialFailed: :raises NoAnswer:"""
        user = str((await self._ask("GET", "/_matrix/client/v3/account/whoami")).get("user_id"))
        openid = await self._ask("POST", f"/_matrix/client/v3/user/{quote(user, safe='')}/openid/request_token", b"{}")
        room_id = room or await self._room(user)
        body = {"room": room_id, "openid_token": openid, "device_id": DEVICE}
        answer = await self._guard.post_json("/sfu/get", body)
        token = json_of(answer).get("jwt")
        if answer.code != 200 or not isinstance(token, str):
            said = f"{errcode_of(answer)} {json_of(answer).get('error', '')!r}"
            raise TrialFailed(f"the guard answers {said} to a join; `lotusguard check` looks for the cause")
        return await self._checked(token)

    async def _checked(self, token: str) -> str:
        key = self._settings.sfu_key
        if key is None:
            return "a token was issued; without LIVEKIT_KEY and LIVEKIT_SECRET it cannot be checked"
        try:
            claims = key.read(token)
        except NotOurs as other:
            raise TrialFailed(f"our LIVEKIT_SECRET did not sign the token ({other})") from None
        issued = issued_to(claims)
        if issued is not None and await self._livekit.has_room(issued.alias):
            await self._livekit.delete_room(issued.alias)
        if self._settings.guard_dry_run or self._settings.guard_tokens != "all":
            return "a token was issued; it is not rebuilt with these settings (GUARD_DRY_RUN, GUARD_TOKENS)"
        life = float(claims.get("exp", 0)) - float(claims.get("nbf") or claims.get("iat") or 0)
        wide = [grant for grant in FORBIDDEN_GRANTS if claims.get("video", {}).get(grant)]
        if wide or life > self._settings.guard_token_ttl + 60:
            raise TrialFailed("the token came back as lk-jwt-service issued it: the guard did not rebuild it")
        return "a token was issued and rebuilt"

    async def _room(self, user: str) -> str:
        """The ID of the trial room, which is created the first time. An account that replaces another has a room of its
        own."""
        localpart, _, server = user[1:].partition(":")
        joined = (await self._ask("GET", "/_matrix/client/v3/joined_rooms")).get("joined_rooms")
        for name in (ALIAS, f"{ALIAS}-{localpart}"):
            alias = f"#{name}:{server}"
            known = await self._request("GET", f"/_matrix/client/v3/directory/room/{quote(alias, safe='')}")
            room_id = json_of(known).get("room_id")
            if known.code != 200 or not isinstance(room_id, str):
                return await self._new_room(user, name)
            if isinstance(joined, list) and room_id in joined:
                return room_id
        raise TrialFailed(f"{user} is not in {alias}: name a room that it is in with --room")

    async def _new_room(self, user: str, name: str) -> str:
        new = {"preset": "private_chat", "room_alias_name": name, "name": "lotusguard: trial joins"}
        answer = await self._synapse.post_json("/_matrix/client/v3/createRoom", new, **self._headers)
        room_id = json_of(answer).get("room_id")
        if answer.code != 200 or not isinstance(room_id, str):
            raise TrialFailed(f"{user} cannot create #{name} ({errcode_of(answer)}): name a room with --room")
        return room_id

    async def _ask(self, method: str, target: str, body: bytes | None = None) -> dict[str, Any]:
        answer = await self._request(method, target, body)
        if answer.code != 200:
            path = target.partition("?")[0]
            raise TrialFailed(
                f"the homeserver answers {errcode_of(answer)} to {path}; `lotusguard check` looks for the cause"
            )
        return json_of(answer)

    async def _request(self, method: str, target: str, body: bytes | None = None) -> Answer:
        return await self._synapse.ask(method, target, body, self._headers)

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._settings.matrix_token.get_secret_value()}"}


def _nowhere() -> Findings:
    return Findings(Report(), "livekit")
