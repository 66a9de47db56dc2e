# SPDX-License-Identifier: Apache-2.0
"""Whom the stand-in authorizer calls: the callers' homeservers and the SFU. Sandbox.

Read from lk-jwt-service's ``helper.go`` and gomatrixserverlib's ``LookupUserInfo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from livekit.protocol.room import CreateRoomRequest
from twisted.web.client import Agent, FileBodyProducer
from twisted.web.http_headers import Headers

from lotusguard.sandbox.go.lax_json import decode
from lotusguard.sandbox.livekit.tokens import mint
from lotusguard.sandbox.lk_jwt_service import requests

if TYPE_CHECKING:
    from lotusguard.sandbox.lk_jwt_service.service import FakeLkJwtService
from lotusguard.sandbox.wire import answer_of

CREATE_ROOM = "/twirp/livekit.RoomService/CreateRoom"


class Dependencies:
    """Real HTTP calls on behalf of ``authorizer``."""

    def __init__(self, authorizer: FakeLkJwtService) -> None:
        self._authorizer = authorizer
        self._agent = Agent(authorizer.reactor, connectTimeout=10, pool=authorizer.pool)

    async def user_of(self, token: Mapping[str, Any]) -> str:
        """Look the OpenID token up at the homeserver that it names.

        :raises Refusal: 401, whatever went wrong.
        """
        name = token["matrix_server_name"]
        base = self._authorizer.homeservers.get(name)
        if base is None:
            raise requests.unauthorised()
        query = f"access_token={quote(token['access_token'], safe='')}"
        url = f"{base}/_matrix/federation/v1/openid/userinfo?{query}"
        try:
            response = await self._agent.request(b"GET", url.encode())
            user = decode(await answer_of(response), {"sub": str}, known_only=False)["sub"]
        except Exception:
            raise requests.unauthorised() from None
        if not 200 <= response.code < 300 or ":" not in user or user.split(":", 1)[1] != name:
            raise requests.unauthorised()
        return str(user)

    async def create_room(self, alias: str) -> None:
        """Open the room; it stays open for five minutes without anybody in it.

        :raises Refusal: 500.
        """
        wanted = CreateRoomRequest(name=alias, empty_timeout=300, departure_timeout=20)
        token = mint(
            self._authorizer.key,
            self._authorizer.secret,
            {"video": {"roomCreate": True}},
            now=self._authorizer.now(),
            valid_for=21600,
        )
        headers = Headers({"Authorization": [f"Bearer {token}"], "Content-Type": ["application/protobuf"]})
        url = f"{self._authorizer.sfu_url}{CREATE_ROOM}".encode()
        try:
            body = FileBodyProducer(BytesIO(wanted.SerializeToString()))
            response = await self._agent.request(b"POST", url, headers, body)
            await answer_of(response)
            created = response.code == 200
        except Exception:
            created = False
        if not created:
            raise requests.refusal(500, "M_UNKNOWN", "Unable to create room on SFU")
