# SPDX-License-Identifier: Apache-2.0
"""The HTTP requests that lk-jwt-service makes: to the callers' homeservers and to the SFU. Sandbox.

Read from lk-jwt-service's ``helper.go`` and gomatrixserverlib's ``LookupUserInfo``.
"""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any
from urllib.parse import quote

from livekit.protocol.room import CreateRoomRequest
from twisted.web.client import Agent, FileBodyProducer, HTTPConnectionPool
from twisted.web.http_headers import Headers

from lotusguard.sandbox.go.lax_json import decode
from lotusguard.sandbox.lk_jwt_service import requests
from lotusguard.sandbox.wire import answer_of

CREATE_ROOM = "/twirp/livekit.RoomService/CreateRoom"


class Dependencies:
    """The homeservers and the SFU.

    :param homeservers: base address by server name; may be changed at any time.
    """

    def __init__(self, reactor: Any, pool: HTTPConnectionPool, homeservers: Mapping[str, str]) -> None:
        self._homeservers = homeservers
        self._agent = Agent(reactor, connectTimeout=10, pool=pool)

    async def user_of(self, token: Mapping[str, Any]) -> str:
        """Verify an OpenID token at the homeserver that it names. :return: the user ID.

        :raises Refusal: 401 on any failure.
        """
        name = token["matrix_server_name"]
        base = self._homeservers.get(name)
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

    async def create_room(self, sfu_url: str, alias: str, token: str) -> None:
        """Create the SFU room; it stays open for five minutes without participants.

        :param token: has the ``roomCreate`` grant.
        :raises Refusal: 500 if that fails.
        """
        wanted = CreateRoomRequest(name=alias, empty_timeout=300, departure_timeout=20)
        headers = Headers({"Authorization": [f"Bearer {token}"], "Content-Type": ["application/protobuf"]})
        try:
            body = FileBodyProducer(BytesIO(wanted.SerializeToString()))
            response = await self._agent.request(b"POST", f"{sfu_url}{CREATE_ROOM}".encode(), headers, body)
            await answer_of(response)
            created = response.code == 200
        except Exception:
            created = False
        if not created:
            raise requests.refusal(500, "M_UNKNOWN", "Unable to create room on SFU")
