# SPDX-License-Identifier: Apache-2.0
"""Verifies OpenID tokens at the homeserver.

Anybody can send made-up tokens, and each takes a question to the homeserver. So these questions have a `Dependency` of
their own: however many wait or fail, no lookup of a policy or a membership waits behind them or finds an open circuit.
"""

from __future__ import annotations

from urllib.parse import quote

from attrs import define
from twisted.web.http_headers import Headers

from lotusguard.clients.dependency_client import DependencyClient
from lotusguard.clients.http import Answer
from lotusguard.clients.synapse.answers import ok, read_user_id
from lotusguard.clients.synapse.client import SynapseClient
from lotusguard.rules.identity import server_of
from lotusguard.rules.requests import OpenID

CALLS_AT_ONCE = 16
"""Questions in flight at once; together with the lookups' they stay below the backlog of Synapse's listener."""
LONGEST_TOKEN = 2048
"""Characters of an OpenID token; Synapse's have a tenth of that. It is sent in a request target."""
NO_TOKEN = "lotusguard-probe"
_BAD_TOKEN = (401, 403)


@define(eq=False)
class OpenIDClient(DependencyClient):
    """The questions of the guard about OpenID tokens.

    :param homeserver: knows the homeserver's name.
    """

    _homeserver: SynapseClient

    def __attrs_post_init__(self) -> None:
        self._dependency.probe = self.probe

    @property
    def server_name(self) -> str:
        """The homeserver's name; "" while it is unknown."""
        return self._homeserver.server_name

    async def know_server_name(self) -> str:
        """The homeserver's name. It is looked up once. :raises DependencyFailed: the homeserver does not tell."""
        return await self._homeserver.know_server_name()

    def is_local(self, openid: OpenID) -> bool:
        """Whether an OpenID token claims to be of this homeserver. Needs its name: see `know_server_name`."""
        return bool(self.server_name) and openid.server_name == self.server_name

    async def local_user(self, openid: OpenID) -> str | None:
        """The user whose OpenID token this is; None if the homeserver says that the token is not valid.

        Only for tokens that `is_local`: the configured address alone is asked, whatever server the token names, and
        for other servers the answer is None. The token is sent in the target, as the federation API wants it.

        :raises DependencyFailed: the homeserver does not tell.
        """
        await self.know_server_name()
        token = openid.access_token
        if not self.is_local(openid) or not token.isascii() or not token.isprintable() or len(token) > LONGEST_TOKEN:
            return None
        user = await self._user_of(token)
        return user if user is not None and server_of(user) == openid.server_name else None

    async def probe(self) -> None:
        """Ask about a token that does not exist. :raises DependencyFailed: the homeserver does not tell."""
        await self._user_of(NO_TOKEN, is_probe=True)

    async def _user_of(self, token: str, *, is_probe: bool = False) -> str | None:
        path = f"/_matrix/federation/v1/openid/userinfo?access_token={quote(token, safe='')}"
        return await self._dependency.call(
            b"GET", path.encode("ascii"), Headers(), read=_user, turn=token, expected=_BAD_TOKEN, is_probe=is_probe
        )


def _user(answer: Answer) -> str | None:
    return None if answer.code in _BAD_TOKEN else read_user_id(ok(answer)["sub"])
