# SPDX-License-Identifier: Apache-2.0
"""Which source answers for which room: the room itself, where our account is in it, else the admin API."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

from attrs import define

from lotusguard.clients.dependency import DependencyFailed, DependencyRefused
from lotusguard.clients.synapse import MatrixClient, SynapseClient
from lotusguard.guard.rooms.residence.account import AdminAccess, GuardAccount, Invites
from lotusguard.guard.rooms.residence.residence import Residence, SyncStatus
from lotusguard.guard.rooms.source import PushedState
from lotusguard.rules.membership import Membership
from lotusguard.rules.state import CREATE, StateEvent

NOT_RESIDENT = "not_resident"
"""Why nothing is known of a room: our account is not in it, and is not an admin's."""


class Source(Enum):
    """Where a room's state comes from now."""

    RESIDENCE = "residence"
    """It is pushed: every change arrives at once."""
    ADMIN_API = "admin_api"
    """It is asked for, and believed for a while."""
    CLIENT_API = "client_api"
    """The same, asked as a member of the room, while its changes do not arrive."""
    NONE = "none"
    """Nothing is known, and nothing is enforced."""


@define(eq=False)
class RoomSources:
    """A `RoomStateSource` for lookups in any room, and the `PushedRooms` that save most of them."""

    _admin_api: SynapseClient
    _client: MatrixClient
    _residence: Residence
    _account: GuardAccount

    def source_of(self, room_id: str) -> Source:
        """Where the room's state comes from now."""
        pushed = self._residence.state_of(room_id)
        if pushed is not None and pushed.live:
            return Source.RESIDENCE
        if self._account.admin is not AdminAccess.NO:
            return Source.ADMIN_API
        return Source.CLIENT_API if self._residence.is_resident(room_id) else Source.NONE

    # -- what is pushed ------------------------------------------------------------------------------------

    def state_of(self, room_id: str) -> PushedState | None:
        """See `PushedRooms`."""
        return self._residence.state_of(room_id)

    def is_joined(self, room_id: str, user: str) -> bool:
        """See `PushedRooms`."""
        return self._residence.is_joined(room_id, user)

    # -- lookups -------------------------------------------------------------------------------------------

    async def room_state(self, room_id: str, types: Collection[str]) -> Mapping[str, StateEvent] | None:
        """See `RoomStateSource`."""
        if self._account.admin is not AdminAccess.NO:
            try:
                return await self._admin_api.room_state(room_id, types)
            except DependencyRefused:
                if not self._residence.is_resident(room_id):
                    raise
        self._check_resident(room_id)
        found = dict(await self._client.room_state(room_id, [kind for kind in types if kind != CREATE]))
        pushed = self._residence.state_of(room_id)
        if pushed is not None and CREATE in types:  # it never changes, and the client API does not tell its sender
            found[CREATE] = pushed.events[CREATE]
        return found

    async def membership(self, user_id: str, room_id: str) -> Membership:
        """See `RoomStateSource`."""
        if self._account.admin is not AdminAccess.NO:
            try:
                return await self._admin_api.membership(user_id, room_id)
            except DependencyRefused:
                if not self._residence.is_resident(room_id):
                    raise
        self._check_resident(room_id)
        return await self._client.membership(user_id, room_id)

    async def members(self, room_id: str) -> Collection[str] | None:
        """See `RoomStateSource`."""
        if self._account.admin is not AdminAccess.NO:
            try:
                return await self._admin_api.members(room_id)
            except DependencyRefused:
                if not self._residence.is_resident(room_id):
                    raise
        self._check_resident(room_id)
        return await self._client.joined_members(room_id)

    def _check_resident(self, room_id: str) -> None:
        """What the client API says of other rooms may be old, or of no member."""
        if not self._residence.is_resident(room_id):
            raise DependencyRefused("synapse", NOT_RESIDENT)

    # -- health --------------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """Ask whether anything is known of any room.

        :raises DependencyFailed: why not.
        """
        await self._account.probe()
        if self._account.admin is AdminAccess.YES or self._residence.alive:
            return
        if self._residence.status is SyncStatus.OFF:
            raise DependencyFailed("synapse", "no_admin_and_no_invites")
        if self._residence.status is SyncStatus.FAILING:
            raise DependencyFailed("synapse", f"sync_{self._residence.reason}")

    @property
    def refused(self) -> str | None:
        """The status with which the homeserver refuses our access token, as far as the guard depends on it."""
        return self._account.refused or (self._admin_api.refused if self._account.admin is not AdminAccess.NO else None)

    def report(self) -> dict[str, Any]:
        """For ``/readyz``."""
        return {
            "admin_api": self._account.admin.value,
            "invites": self._account.invites.value if self._account.user_id else "unknown",
            "invites_off_because": self._account.why_off if self._is_off else None,
            "sync": self._residence.status.value,
            "sync_error": self._residence.reason or None,
            "resident": len(self._residence),
        }

    @property
    def _is_off(self) -> bool:
        return bool(self._account.user_id) and self._account.invites is Invites.OFF

    def shortcomings(self) -> list[str]:
        """What is not known, in words."""
        found = []
        resident = len(self._residence)
        if self._account.admin is AdminAccess.NO:
            found.append(
                f"MATRIX_TOKEN is not an admin's: only the rooms that its account is in ({resident}) are enforced"
            )
        if self._residence.full:
            found.append(f"the account of MATRIX_TOKEN is in {resident} rooms, as many as fit: it declines invitations")
        if self._residence.status is SyncStatus.FAILING:
            found.append(f"changes in rooms do not arrive by /sync ({self._residence.reason}); rooms are looked up")
        return found
