# SPDX-License-Identifier: Apache-2.0
"""``lotusguard check`` asks the homeserver: does it answer, is our token an admin's, can policies be read?"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from attrs import frozen

from lotusguard.check.asking import NoAnswer, Service, errcode_of, json_of
from lotusguard.check.report import Findings
from lotusguard.config import Settings
from lotusguard.rules.identity import server_of

NEW_TOKEN = (
    "log in as a server admin, or as an account of the guard's own (docs/resident.md), and put the access token into "
    "MATRIX_TOKEN"
)
MAIN_PROCESS = (
    "point SYNAPSE_API to the main process's own listener, with the `client` resource, not to a proxy or worker"
)

BLOCKED = "something in front of it answers 403, without a Matrix error code: a proxy that blocks this path"


@frozen
class Us:
    """The user of our access token, and an OpenID token of theirs if Synapse issued one."""

    user: str
    openid: dict[str, Any] | None


class HomeserverCheck:
    """Asks the homeserver. :param findings: where findings are added."""

    def __init__(self, settings: Settings, synapse: Service, findings: Findings) -> None:
        self._settings = settings
        self._synapse = synapse
        self._say = findings
        self._headers = {"Authorization": f"Bearer {settings.matrix_token.get_secret_value()}"}

    async def run(self) -> Us | None:
        """:return: the user of our token, if known. Problems become findings, not exceptions."""
        say = self._say
        try:
            if not await self._is_there():
                return None
            if not self._settings.matrix_token.get_secret_value():
                say.wrong(
                    "access token",
                    "MATRIX_TOKEN is not set: no room's policy can be read, nothing is enforced",
                    NEW_TOKEN,
                )
                return None
            user = await self._whose_token()
            if user is None:
                return None
            self._server_name(user)
            room_id = await self._room_for_admins(user)
            if room_id is not None:
                await self._type_filter(room_id)
            return Us(user, await self._openid(user))
        except NoAnswer as why:
            say.wrong("reachable", str(why), why.remedy)
            return None

    async def _is_there(self) -> bool:
        base = self._settings.synapse_api
        answer = await self._synapse.ask("GET", "/_matrix/client/versions")
        if answer.code != 200 or "versions" not in json_of(answer):
            self._say.wrong(
                "reachable",
                f"{base} answers, but not as a Matrix homeserver ({answer.code} to /_matrix/client/versions)",
                "correct SYNAPSE_API: Synapse's own listener, usually http://127.0.0.1:8008",
            )
            return False
        answer = await self._synapse.ask("GET", "/_synapse/admin/v1/server_version", headers=self._headers)
        version = json_of(answer).get("server_version")
        if answer.code == 403 and "errcode" not in json_of(answer):
            self._say.wrong("reachable", f"{base} is a homeserver, but {BLOCKED}", MAIN_PROCESS)
            return False
        self._say.fine("reachable", f"{base}, Synapse {version}" if version else f"{base}, version unknown")
        return True

    async def _whose_token(self) -> str | None:
        answer = await self._synapse.ask("GET", "/_matrix/client/v3/account/whoami", headers=self._headers)
        user = json_of(answer).get("user_id")
        if answer.code == 200 and isinstance(user, str) and user.startswith("@"):
            return user
        if answer.code == 403 and "errcode" not in json_of(answer):
            self._say.wrong("access token", BLOCKED, MAIN_PROCESS)
        elif answer.code in (401, 403):
            self._say.wrong("access token", f"Synapse does not accept MATRIX_TOKEN ({errcode_of(answer)})", NEW_TOKEN)
        else:
            self._say.wrong("access token", f"Synapse does not say whose it is ({errcode_of(answer)})", MAIN_PROCESS)
        return None

    def _server_name(self, user: str) -> None:
        ours, theirs = self._settings.guard_server_name, server_of(user)
        if ours and ours != theirs:
            self._say.wrong(
                "server name",
                f"GUARD_SERVER_NAME is {ours!r}, Synapse's is {theirs!r}: callers are not verified before a refusal",
                f"set GUARD_SERVER_NAME={theirs}, or leave it out",
            )
        else:
            self._say.fine("server name", theirs if ours else f"{theirs} (asked of Synapse)")

    async def _room_for_admins(self, user: str) -> str | None:
        """The ID of some room; ``""`` if there is none, None if we may not list rooms."""
        answer = await self._synapse.ask("GET", "/_synapse/admin/v1/rooms?limit=1", headers=self._headers)
        if answer.code == 404:
            await self._without_admin_api(user)
            return None
        if answer.code == 403:
            await self._without_admin_rights(user)
            return None
        rooms = json_of(answer).get("rooms")
        if answer.code != 200 or not isinstance(rooms, list):
            self._say.wrong("access token", f"the admin API does not list rooms ({errcode_of(answer)})", MAIN_PROCESS)
            return None
        self._say.fine("access token", f"{user}, a server admin")
        return str(rooms[0].get("room_id", "")) if rooms else ""

    async def _without_admin_api(self, user: str) -> None:
        """The homeserver is of another make, or ``SYNAPSE_API`` leads to a worker or proxy."""
        nothing = "this homeserver has no admin API"
        if await self._accepts_invitations():
            self._say.warning(
                "access token",
                f"{nothing}: rooms are enforced where {user} is invited",
                f"invite it into the rooms that need it; see docs/resident.md. If this is Synapse: {MAIN_PROCESS}",
            )
        else:
            self._say.wrong(
                "access token",
                f"{nothing}, and {user} accepts no invitations: no room's policy can be read",
                f"make it an account that nobody else uses, or set GUARD_INVITES=local; see docs/resident.md. "
                f"If this is Synapse: {MAIN_PROCESS}",
            )

    async def _without_admin_rights(self, user: str) -> None:
        if await self._accepts_invitations():
            self._say.warning(
                "access token",
                f"{user} is not a server admin: only the rooms to which it was invited are enforced",
                "invite it into the rooms that need it; see docs/resident.md",
            )
        else:
            self._say.wrong(
                "access token",
                f"MATRIX_TOKEN is {user}'s, who is not a server admin: no room's policy can be read",
                f"make {user} an admin (PUT /_synapse/admin/v1/users/{user}/admin), or {NEW_TOKEN}; or set "
                "GUARD_INVITES=local and invite the account into the rooms that need it",
            )

    async def _accepts_invitations(self) -> bool:
        """Whether an account that is no admin's accepts invitations. By default, only if nobody else uses it."""
        invites = self._settings.guard_invites
        if invites is not None:
            return invites != "off"
        answer = await self._synapse.ask("GET", "/_matrix/client/v3/devices", headers=self._headers)
        if answer.code in (400, 401, 403, 404):  # an app-service's account
            return True
        devices = json_of(answer).get("devices")
        return answer.code == 200 and isinstance(devices, list) and len(devices) <= 1

    async def _type_filter(self, room_id: str) -> None:
        if not room_id:
            self._say.unknown("state by type", "Synapse has no room to try this with")
            return
        target = f"/_synapse/admin/v1/rooms/{quote(room_id, safe='')}/state?type=m.room.create"
        answer = await self._synapse.ask("GET", target, headers=self._headers)
        events = json_of(answer).get("state")
        if answer.code != 200 or not isinstance(events, list):
            self._say.unknown("state by type", f"the state of {room_id} could not be read ({errcode_of(answer)})")
        elif any(event.get("type") != "m.room.create" for event in events):
            self._say.warning(
                "state by type",
                "this release ignores the requested type and returns the whole state: correct, but slow in large rooms",
                "upgrade Synapse when you can",
            )
        else:
            self._say.fine("state by type", "only the requested type is sent")

    async def _openid(self, user: str) -> dict[str, Any] | None:
        """An OpenID token of our own; also checks whether the guard can verify it."""
        target = f"/_matrix/client/v3/user/{quote(user, safe='')}/openid/request_token"
        answer = await self._synapse.post_json(target, {}, **self._headers)
        openid = json_of(answer)
        token = openid.get("access_token")
        if answer.code != 200 or not isinstance(token, str):
            self._say.unknown("OpenID", f"Synapse issues no OpenID token to {user} ({errcode_of(answer)})")
            return None
        target = f"/_matrix/federation/v1/openid/userinfo?access_token={quote(token, safe='')}"
        answer = await self._synapse.ask("GET", target)
        if answer.code == 200 and json_of(answer).get("sub") == user:
            self._say.fine("OpenID", "callers can be verified before they are refused")
        else:
            self._say.warning(
                "OpenID",
                f"callers cannot be verified here ({errcode_of(answer)}): they are refused only after lk-jwt-service "
                "has made a room for them",
                "add the `openid` resource (or `federation`) to the listener that SYNAPSE_API points to; in "
                "Dendrite, leave federation on",
            )
        return openid
