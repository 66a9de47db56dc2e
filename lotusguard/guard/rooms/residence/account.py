# SPDX-License-Identifier: Apache-2.0
"""The guard's own account: what its access token may do, and whose invitations it accepts."""

from __future__ import annotations

from enum import Enum

from attrs import define, field

from lotusguard.clients.dependency import DependencyRefused
from lotusguard.clients.synapse import MatrixClient, SynapseClient
from lotusguard.rules.identity import server_of

ANOTHER_ACCOUNT = "another_account"
"""Why the rooms are not listened to: the access token that is used by now is not this account's."""


class AdminAccess(Enum):
    """Whether the access token can use the admin API."""

    UNKNOWN = "unknown"
    YES = "yes"
    NO = "no"


class Invites(Enum):
    """``GUARD_INVITES``."""

    LOCAL = "local"
    ANY = "any"
    OFF = "off"


@define(eq=False)
class GuardAccount:
    """The account of ``MATRIX_TOKEN``.

    :param setting: ``GUARD_INVITES``; ``None`` if it is not set.
    :ivar user_id: ``""`` until `learn` has been told.
    :ivar other_devices: whether somebody else may use the account too: it has more devices than ours.
    """

    _admin_api: SynapseClient
    _client: MatrixClient
    _setting: Invites | None
    user_id: str = field(default="", init=False)
    other_devices: bool = field(default=False, init=False)
    admin: AdminAccess = field(default=AdminAccess.UNKNOWN, init=False)
    _verified_token: str = field(default="", init=False, repr=False)

    @property
    def server_name(self) -> str:
        return server_of(self.user_id) if self.user_id else ""

    @property
    def refused(self) -> str | None:
        """``status_401`` if the homeserver does not accept the access token."""
        refused = {self._admin_api.refused, self._client.refused}
        return "status_401" if "status_401" in refused else None

    @property
    def invites(self) -> Invites:
        """Whose invitations are accepted, once `learn` has been told."""
        if self._setting is not None:
            return self._setting
        return Invites.OFF if self.admin is AdminAccess.YES or self.other_devices else Invites.LOCAL

    @property
    def why_off(self) -> str:
        """Why no invitations are accepted."""
        if self._setting is Invites.OFF:
            return "GUARD_INVITES is off"
        return "the account is an admin's" if self.admin is AdminAccess.YES else "the account has other devices"

    async def learn(self) -> None:
        """Ask the homeserver about the account.

        :raises DependencyFailed: it does not answer, or does not accept the token.
        """
        token = self._client.token.value
        self.user_id = (await self._client.whoami()).user_id
        await self.probe()
        self.other_devices = await self._client.devices() > 1
        self._verified_token = token

    async def verify_token(self) -> None:
        """Make sure that the access token is this account's: another one may be used since `learn`.

        Devices are not counted again: the old token's device is still there while tokens are exchanged.

        :raises DependencyFailed: the homeserver does not tell, or it is the token of `ANOTHER_ACCOUNT`.
        """
        while (token := self._client.token.value) != self._verified_token:
            if (await self._client.whoami()).user_id != self.user_id:
                raise DependencyRefused("matrix", ANOTHER_ACCOUNT)
            self._verified_token = token

    async def probe(self) -> None:
        """Ask whether the homeserver answers and accepts the token, and whether as an admin's.

        :raises DependencyFailed: it does not.
        """
        try:
            await self._admin_api.probe()
        except DependencyRefused as refused:
            if refused.reason not in ("status_403", "status_404"):
                raise
            await self._client.whoami()
            self.admin = AdminAccess.NO
        else:
            self.admin = AdminAccess.YES
